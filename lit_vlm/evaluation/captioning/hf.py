"""Image-text-to-text models of transformers as captioners."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from PIL import Image as PILImage
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    LogitsProcessor,
    LogitsProcessorList,
    ProcessorMixin,
)

from lit_vlm.core.pretrained import shortened
from lit_vlm.core.sampling import Sampling
from lit_vlm.data.records import Record, open_image
from lit_vlm.evaluation.captioning.captioner import Answer
from lit_vlm.model.generate import draw_apart, warpers

AUTO = "AutoModelForImageTextToText"
UNREADABLE = (SafetensorError, UnpicklingError, EOFError, OSError, RuntimeError)
"""What a file of weights raises that is absent, damaged or of another model."""


@dataclass(frozen=True)
class HFInputs:
    """Pictures and prompts by a processor of transformers and its chat template.

    Attributes:
        processor: the processor.
    """

    processor: Any

    def one(self, question: Record) -> tuple[PILImage.Image, str]:
        """The picture as a whole, and the prompt; raises as `open_image`."""
        (message,) = question.messages
        (image,) = question.images
        return open_image(image, Path()), message.text.strip()

    def join(self, questions: Sequence[tuple[PILImage.Image, str]]) -> Any:
        """Tensors of all questions, padded in front."""
        chats = [
            [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": prompt}]}]
            for picture, prompt in questions
        ]
        return self.processor.apply_chat_template(
            chats,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
        )


class DrawApart(LogitsProcessor):
    """Leaves of each row's tokens one, drawn with the row's own generator, so that the likeliest token is that.

    transformers draws all rows of a batch with one generator, and so each depends on the others.

    Args:
        sampling: of the rows; they differ in nothing but their seeds.
    """

    def __init__(self, sampling: Sequence[Sampling]) -> None:
        self.warpers = warpers(sampling[0].temperature, sampling[0].top_p)
        self.own = [random.Random(one.seed) for one in sampling]

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Scores `[b, v]` of which one of each row is 0, and the others are minus infinity."""
        drawn = draw_apart(self.warpers(input_ids, scores).softmax(-1), self.own)
        return torch.full_like(scores, -torch.inf).scatter(1, drawn[:, None], 0.0)


class HFCaptioner:
    """An image-text-to-text model of transformers.

    Args:
        folder: with configuration, weights and processor.
        device: device that the model is put on.
        dtype: type of the weights.
        trust: whether code that the folder brings may run.

    Raises:
        ValueError: as `check_hf`, and for weights that cannot be read or are missing.
    """

    def __init__(self, folder: str, device: str, dtype: torch.dtype, trust: bool) -> None:
        self.inputs = HFInputs(read_processor(folder, trust))
        self.device, self.dtype = device, dtype
        try:
            model, info = AutoModelForImageTextToText.from_pretrained(
                folder, dtype=dtype, trust_remote_code=trust, output_loading_info=True
            )
        except UNREADABLE as error:
            raise ValueError(f"the weights of {folder} cannot be read: {str(error).splitlines()[0]}") from error
        if missing := sorted(info["missing_keys"]):
            raise ValueError(f"{folder} lacks weights of its {type(model).__name__}: {shortened(missing)}")
        self.model = model.to(device).eval()

    @torch.no_grad()
    def write(self, batch: Any, sampling: Sequence[Sampling]) -> list[Answer]:
        """As `Captioner.write`."""
        inputs = batch.to(self.device, dtype=self.dtype)
        drawing = [DrawApart(sampling)] if sampling[0].temperature > 0 else []
        found = self.model.generate(
            **inputs,
            max_new_tokens=sampling[0].max_new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=self.inputs.processor.tokenizer.pad_token_id,
            logits_processor=LogitsProcessorList(drawing),
        )
        start = 0 if self.model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
        ends = self.model.generation_config.eos_token_id
        stops = set(ends if isinstance(ends, list) else [ends])
        return [self._answer(row, stops) for row in found[:, start:].tolist()]

    def _answer(self, ids: list[int], stops: Collection[int | None]) -> Answer:
        end = next((place for place, token in enumerate(ids) if token in stops), None)
        text = self.inputs.processor.tokenizer.decode(ids[:end], skip_special_tokens=True)
        return Answer(text.strip(), cut=end is None)


def read_processor(folder: str, trust: bool) -> Any:
    """The processor of a folder; raises ValueError for one that has none or no chat template."""
    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=trust)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"the processor of {folder} cannot be read: {str(error).strip().splitlines()[0]}") from error
    if not isinstance(processor, ProcessorMixin):  # a tokenizer or a processor of pictures alone
        raise ValueError(f"{folder} has no processor of pictures and text: it needs preprocessor_config.json")
    if not processor.chat_template:
        raise ValueError(
            f"{folder} has no chat template, so how a question is written is not known: it needs chat_template.jinja"
        )
    if processor.tokenizer.pad_token is None:  # only to fill rows, where the mask hides it
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    return processor


def check_hf(folder: str, trust: bool) -> None:
    """Check that a folder holds a model that answers questions on pictures, without reading its weights.

    Raises:
        ValueError: for a configuration that cannot be read, is of another kind of model, or brings code that is not
            trusted; and as `read_processor`.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
    except (OSError, ValueError, KeyError) as error:
        why = str(error).strip().splitlines()[0]
        if "trust_remote_code" in str(error):
            why = "it brings code of its own, as exports of this kit do: --trust-remote-code runs it"
        raise ValueError(f"{folder}: {why}") from error
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and AUTO not in (getattr(config, "auto_map", {}) or {}):
        raise ValueError(
            f"{folder} is a '{config.model_type}', which {AUTO} of transformers does not open: name a model that "
            "writes text on pictures, such as llava-hf/llava-1.5-7b-hf"
        )
    read_processor(folder, trust)
