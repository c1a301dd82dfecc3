"""Pictures as people hand them to transformers' processors, and as a model of the kit takes them."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage
from torch import Tensor
from transformers.image_utils import load_image

from lit_vlm.data.records import Image, RecordError, decode_image
from lit_vlm.data.records.pictures import upright_rgb
from lit_vlm.data.sample.chat_template import IMAGE_MARK


def by_text(images: Any, texts: Sequence[str]) -> list[list[Any]]:
    """The pictures of each text.

    Raises:
        ValueError: where numbers of pictures and of marks differ.
    """
    counts = [text.count(IMAGE_MARK) for text in texts]
    if images is None:
        rows: list[list[Any]] = [[] for _ in texts]
    elif isinstance(images, list | tuple) and images and all(isinstance(row, list | tuple | None) for row in images):
        rows = [list(row or ()) for row in images]
    else:
        flat = list(images) if isinstance(images, list | tuple) else [images]
        if len(flat) != sum(counts):
            raise ValueError(f"{len(flat)} pictures for {sum(counts)} {IMAGE_MARK} marks in {len(texts)} texts")
        rest = iter(flat)
        rows = [[next(rest) for _ in range(count)] for count in counts]
    if len(rows) != len(texts):
        raise ValueError(f"pictures of {len(rows)} texts for {len(texts)} texts")
    for index, (row, count) in enumerate(zip(rows, counts, strict=True)):
        if len(row) != count:
            raise ValueError(f"text {index} has {count} {IMAGE_MARK} marks and {len(row)} pictures")
    return rows


def opened(image: Any) -> PILImage.Image:
    """A picture, upright and as 8-bit RGB, from any form that processors of transformers take.

    Args:
        image: a PIL picture, a uint8 array or tensor `[h, w, 3]` or `[3, h, w]`, the path of a file, a URL, base64
            text, bytes, or a mapping with `bytes` or `path`, as the package datasets has them.

    Raises:
        RecordError: for anything else, or a picture that cannot be read.
    """
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, PILImage.Image):
        return upright_rgb(image)
    if isinstance(image, Tensor | np.ndarray):
        return _of_array(image.numpy(force=True) if isinstance(image, Tensor) else image)
    if isinstance(image, bytes | bytearray):
        return decode_image(Image(data=bytes(image)), Path("/"))[0]
    if not isinstance(image, str | Path):
        raise RecordError("missing_image", f"{type(image).__name__} is no form that pictures come in")
    text = str(image)
    if text.startswith(("http://", "https://")):
        return upright_rgb(load_image(text))
    if not text.startswith("data:") and _is_file(text):
        return decode_image(Image(path=str(Path(text).resolve())), Path("/"))[0]
    try:
        data = base64.b64decode(text.partition("base64,")[2] or text, validate=True)
    except ValueError:
        raise RecordError("missing_image", f"there is no picture {text[:80]}") from None
    return decode_image(Image(data=data), Path("/"))[0]


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except OSError:  # longer than the name of any file
        return False


def _of_array(array: np.ndarray) -> PILImage.Image:
    if array.ndim == 3 and array.shape[-1] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = np.moveaxis(array, 0, -1)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] not in (1, 3, 4):
        raise RecordError(
            "corrupt_image", f"an array must be uint8 [h, w, 3] or [3, h, w], not {array.dtype} {array.shape}"
        )
    return upright_rgb(PILImage.fromarray(array[..., 0] if array.shape[-1] == 1 else array))


def stacked(rows: Sequence[Sequence[Tensor]]) -> tuple[Tensor, Tensor]:
    """Pixels `[b, n, 3, h, w]` and sizes `[b, n, 2]` of the pictures of all rows."""
    everything = [image for row in rows for image in row]
    most = max(len(row) for row in rows)
    height, width = (max(image.shape[axis] for image in everything) for axis in (1, 2))
    pixels = torch.zeros(len(rows), most, 3, height, width, dtype=torch.uint8)
    sizes = torch.zeros(len(rows), most, 2, dtype=torch.long)
    for r, row in enumerate(rows):
        for i, image in enumerate(row):
            pixels[r, i, :, : image.shape[1], : image.shape[2]] = image
            sizes[r, i] = torch.tensor(image.shape[1:])
    return pixels, sizes
