"""Pictures as people hand them to transformers' processors, and as a model of the kit takes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage
from torch import Tensor
from transformers.image_utils import load_image

from lit_vlm.data.records import Image, RecordError, decode_image
from lit_vlm.data.records.record import as_rgb
from lit_vlm.data.sample.chat_template import IMAGE_MARK


def by_text(images: Any, texts: Sequence[str]) -> list[list[Any]]:
    """The pictures of each text.

    Raises:
        ValueError: where numbers of pictures and of marks differ.
    """
    counts = [text.count(IMAGE_MARK) for text in texts]
    if images is None:
        rows: list[list[Any]] = [[] for _ in texts]
    elif isinstance(images, list | tuple) and images and all(isinstance(row, list | tuple) for row in images):
        rows = [list(row) for row in images]
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
    """A picture as 8-bit RGB."""
    if isinstance(image, str | Path) and Path(str(image)[:4096]).is_file():
        return decode_image(Image(path=str(Path(image).resolve())), Path("/"))[0]
    if isinstance(image, Tensor):
        image = image.numpy(force=True)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3:
            raise RecordError(
                "corrupt_image", f"an array must be uint8 [h, w, 3] or [3, h, w], not {image.dtype} {image.shape}"
            )
        image = PILImage.fromarray(image if image.shape[-1] in (3, 4) else np.moveaxis(image, 0, -1))
    return as_rgb(load_image(image) if isinstance(image, str) else image)


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
