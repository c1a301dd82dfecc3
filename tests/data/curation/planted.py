"""Captioned pictures with known faults, written to a folder, and a classifier from outside the kit."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PILImage

from lit_vlm.data.curation import Step
from lit_vlm.data.curation.measuring import measured
from lit_vlm.data.curation.step import Verdict
from lit_vlm.data.sources import Captions, Source

CAPTION = "a small dog runs along the beach in the sun"


def encoded(size: tuple[int, int] = (40, 30), form: str = "PNG", level: int | None = None, seed: int = 0) -> bytes:
    """A picture of one grey level, or of noise."""
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    pixels = noise if level is None else np.full_like(noise, level)
    buffer = io.BytesIO()
    PILImage.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


def write(folder: Path, entries: Sequence[tuple[bytes, str]]) -> str:
    """Write pictures with captions; their ids are `0.img`, `1.img`, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, (content, _) in enumerate(entries):
        (folder / f"{index}.img").write_bytes(content)
    rows = [{"image": f"{index}.img", "caption": text} for index, (_, text) in enumerate(entries)]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder / "captions.jsonl")


def verdict_of(step: Step, source: Source, folder: Path) -> tuple[dict[str, str], Verdict]:
    """What a step drops of the readable records of one source, id → reason, and its verdict."""
    table = measured([source], step.measures(), folder)
    verdict = step.decide(table, table.readable, np.random.default_rng(0), None)
    reasons = ("", *verdict.reasons)
    ids = table.ids(table.readable)
    return {name: reasons[code] for name, code in zip(ids, verdict.codes, strict=True) if code}, verdict


def captions(folder: Path, entries: Sequence[tuple[bytes, str]], **changes: Any) -> Captions:
    return Captions(write(folder, entries), **changes)


class Brightness:
    """Mean grey level of a picture, 0 to 1.

    Args:
        power: exponent of the level.
    """

    def __init__(self, power: float = 1.0) -> None:
        self.power = power

    def __call__(self, pictures: list[PILImage.Image]) -> list[float]:
        return [float(np.asarray(picture.convert("L")).mean() / 255) ** self.power for picture in pictures]


class Unfinished:
    """A classifier that forgets pictures."""

    def __call__(self, pictures: list[PILImage.Image]) -> list[float]:
        return [0.5] * (len(pictures) - 1)
