"""Records of one picture and one text, or of any pictures, kept in memory."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image as PILImage

from lit_vlm.data.records import Image, Message, Record, Text
from lit_vlm.data.sources import Source


class Pairs(Source):
    """Records of given pictures and texts.

    Args:
        name: of the source.
        rows: id, pictures, and text of each record.
    """

    def __init__(self, name: str, rows: Sequence[tuple[str, Sequence[bytes], str]]) -> None:
        self.name, self.image_folder = name, Path()
        self._rows = list(rows)

    def __len__(self) -> int:
        return len(self._rows)

    def record(self, index: int) -> Record:
        identity, pictures, text = self._rows[index]
        user = Message("user", (*(Image(data=content) for content in pictures), Text("Describe it.")))
        return Record(identity, self.name, (user, Message("assistant", (Text(text),))))

    def fingerprint(self) -> str:
        return hashlib.sha256(repr(self._rows).encode()).hexdigest()[:16]


def field(seed: int, quality: int | None = None, size: tuple[int, int] = (48, 36)) -> bytes:
    """A picture of soft colours, as PNG, or as JPEG of a quality."""
    noise = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    picture = PILImage.fromarray(noise).resize((192, 144), PILImage.Resampling.BICUBIC).resize(size)
    buffer = io.BytesIO()
    if quality is None:
        picture.save(buffer, "PNG")
    else:
        picture.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()
