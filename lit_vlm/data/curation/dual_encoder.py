"""Dual encoders of transformers, such as CLIP and SigLIP: vectors of pictures and of texts that can be compared."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as PILImage
from torch import Tensor

from lit_vlm.core.fetch import SETTINGS, WEIGHT_SUFFIXES
from lit_vlm.core.pretrained import resolve

Dtype = Literal["float32", "bfloat16"]
Inputs = Mapping[str, Tensor]
"""What a model takes, as its processor makes it."""


class DualEncoder:
    """A model with an encoder of pictures and one of texts, which give unit vectors of one width.

    It is loaded when it first computes. A copy that was pickled loads it anew.

    Args:
        name: hub name, folder or `made:` part of any model of transformers that has `get_image_features` and
            `get_text_features`.
        dtype: number format that it computes in.
        batch_size: pictures or texts that are computed at a time.

    Attributes:
        digest: hash of its weights, configuration, tokenizer and preprocessing.

    Raises:
        ValueError: for a model that does not exist, or an argument out of range.
    """

    def __init__(self, name: str, dtype: Dtype = "float32", batch_size: int = 64) -> None:
        if dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype is {dtype!r}; it must be float32 or bfloat16")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        self._name, self._batch_size = name, batch_size
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._folder = Path(resolve(name))
        self.dtype = dtype
        self.digest = digest_of_folder(self._folder)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return torch.device(self._device)

    def on(self, device: str) -> DualEncoder:
        """The same encoder, which computes on a device such as `cuda:1`."""
        other = copy.copy(self)
        other._device = device
        return other

    @property
    def width(self) -> int:
        """Length of its vectors; loads the model."""
        return self._width

    @cached_property
    def _width(self) -> int:
        return self.embed(self.text_inputs([""])).shape[1]

    def picture_inputs(self, pictures: Sequence[PILImage.Image]) -> Inputs:
        """What the model takes of RGB pictures, resized and normalised as its processor does; needs no weights."""
        return dict(self._processor.image_processor(images=list(pictures), return_tensors="pt"))

    def text_inputs(self, texts: Sequence[str]) -> Inputs:
        """What the model takes of texts: cut to its length, and padded to it, as SigLIP reads the last place."""
        tokenizer = self._processor.tokenizer
        padded = tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=self._text_length, return_tensors="pt"
        )
        return {name: padded[name] for name in tokenizer.model_input_names if name in padded}

    @torch.inference_mode()
    def embed(self, inputs: Inputs) -> NDArray[np.float32]:
        """Unit vectors `[n, width]` of pictures, or of texts, by their inputs.

        Raises:
            ValueError: for a model that gives no vector per picture or text.
        """
        model, parts = self._model, []
        compute = model.get_text_features if "input_ids" in inputs else model.get_image_features
        count = len(next(iter(inputs.values())))
        for start in range(0, count, self._batch_size):
            batch = {name: self._moved(value[start : start + self._batch_size]) for name, value in inputs.items()}
            found = compute(**batch)
            vectors = found if isinstance(found, Tensor) else found.pooler_output
            if vectors is None or vectors.ndim != 2:
                raise ValueError(f"{self._name}: {type(model).__name__} gives no vector for each picture and text")
            parts.append(torch.nn.functional.normalize(vectors.float(), dim=-1).cpu().numpy())
        return np.concatenate(parts)

    def _moved(self, value: Tensor) -> Tensor:
        return value.to(self.device, self._model.dtype if value.is_floating_point() else None)

    @cached_property
    def _text_length(self) -> int:
        processor, config = self._processor, self._config
        given = getattr(processor, "text_kwargs", None) or {}
        lengths = [given.get("max_length"), processor.tokenizer.model_max_length]
        lengths.append(getattr(getattr(config, "text_config", None), "max_position_embeddings", None))
        return min(int(length) for length in lengths if length)

    @cached_property
    def _config(self) -> Any:
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(self._folder)

    @cached_property
    def _processor(self) -> Any:
        from transformers import AutoProcessor

        try:
            found = AutoProcessor.from_pretrained(self._folder)
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"{self._name} has no processor that can be read: {_first_line(error)}") from error
        if not (hasattr(found, "image_processor") and hasattr(found, "tokenizer")):
            raise ValueError(f"{self._name} is no dual encoder: its processor, {type(found).__name__}, is for one kind")
        return found

    @property
    def _model(self) -> Any:
        return _loaded(self._name, self._folder, self.digest, self.dtype, str(self.device))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_processor", "_config")}


def encoder_of(given: str | DualEncoder) -> DualEncoder:
    """The dual encoder that a setting gives, or the one of the name that it gives; raises as `DualEncoder`."""
    return DualEncoder(given) if isinstance(given, str) else given


@lru_cache(maxsize=1)
def _loaded(name: str, folder: Path, digest: str, dtype: Dtype, device: str) -> Any:
    """The model of a folder: one for all steps of a process, as a device holds it once."""
    from transformers import AutoModel

    try:
        model, info = AutoModel.from_pretrained(folder, output_loading_info=True, dtype=getattr(torch, dtype))
    except Exception as error:  # files of any kind may be damaged in any way
        raise ValueError(f"{name} cannot be read: {_first_line(error)}") from error
    if not (hasattr(model, "get_image_features") and hasattr(model, "get_text_features")):
        raise ValueError(f"{name} is no dual encoder: {type(model).__name__} gives no features of pictures and texts")
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{name} lacks {len(missing)} weights of {type(model).__name__}, such as {missing[0]}")
    return model.to(device).eval()


def digest_of_folder(folder: Path) -> str:
    """A hash of the weights, configuration and tokenizer of a model's folder: 16 hex digits."""
    endings = (*WEIGHT_SUFFIXES, *SETTINGS)
    files = [file for file in sorted(folder.iterdir()) if file.suffix in endings and file.is_file()]
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(file.name.encode() + hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), repr(error))
