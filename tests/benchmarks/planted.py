"""Pictures with planted faults, for curations: scenes in files, a table of their descriptions, and a benchmark."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image as PILImage
from PIL import ImageEnhance

from lit_vlm.data.sources import Captions
from lit_vlm.worlds.scenes import caption, render, sample_scene

SIDE, SMALL = 96, 40
BENCHMARK = 400
"""Pictures of the benchmark, and questions about them."""
SHARES = {
    "wrong_caption": 0.05,
    "small": 0.04,
    "copy": 0.05,
    "encoded": 0.02,
    "scaled": 0.02,
    "brightened": 0.02,
    "cropped": 0.02,
    "benchmark": 0.015,
    "benchmark_encoded": 0.015,
}
"""Planted fault → share of the records."""
NEAR = ("encoded", "scaled", "brightened", "cropped")
CHANGES: dict[str, Callable[[PILImage.Image], PILImage.Image]] = {
    "scaled": lambda image: image.resize((round(0.8 * image.width),) * 2, PILImage.Resampling.BILINEAR),
    "brightened": lambda image: ImageEnhance.Brightness(image).enhance(1.15),
    "cropped": lambda image: image.crop((4, 4, image.width - 4, image.height - 4)),
}


@dataclass(frozen=True)
class Planted:
    """A source with faults and the benchmark of which it holds pictures.

    Attributes:
        source: the records; those that repeat others come behind them.
        benchmark: the benchmark.
        faults: of each record, "" for none.
    """

    source: Captions
    benchmark: Captions
    faults: list[str]


def plant(folder: Path, count: int) -> Planted:
    """Write `count` pictures, of which a quarter has a fault, and a benchmark."""
    (folder / "pictures").mkdir(parents=True)
    numbers = {fault: round(share * count) for fault, share in SHARES.items()}
    whole = count - sum(numbers.values())
    rng = random.Random(0)
    rows: list[tuple[str, bytes, str]] = []
    clean = [_scene(f"clean-{index}", rng) for index in range(whole)]
    rows += [("", _encoded(picture), text) for picture, text in clean]
    wrong = [_scene(f"wrong-{index}", rng) for index in range(numbers["wrong_caption"])]
    texts = [text for _, text in wrong]
    rows += [
        ("wrong_caption", _encoded(picture), text)
        for (picture, _), text in zip(wrong, texts[1:] + texts[:1], strict=True)
    ]
    for index in range(numbers["small"]):
        picture, text = _scene(f"small-{index}", rng)
        rows.append(("small", _encoded(picture.resize((SMALL, SMALL), PILImage.Resampling.BICUBIC)), text))
    asked = [_scene(f"asked-{index}", rng) for index in range(BENCHMARK)]
    for fault, quality in (("benchmark", 92), ("benchmark_encoded", 60)):
        shown = [asked[index % BENCHMARK] for index in range(numbers[fault])]
        rows += [(fault, _encoded(picture, quality), text) for picture, text in shown]
    repeated = iter(rng.sample(clean, sum(numbers[fault] for fault in ("copy", *NEAR))))
    for fault in ("copy", *NEAR):
        for _ in range(numbers[fault]):
            picture, text = next(repeated)
            changed = CHANGES.get(fault, lambda image: image)(picture)
            rows.append((fault, _encoded(changed, 60 if fault == "encoded" else 92), text))
    source = _written(folder, "made", [(content, text) for _, content, text in rows])
    benchmark = _written(folder, "asked", [(_encoded(picture), text) for picture, text in asked])
    return Planted(source, benchmark, [fault for fault, _, _ in rows])


def _scene(seed: str, rng: random.Random) -> tuple[PILImage.Image, str]:
    scene = sample_scene(seed)
    return PILImage.fromarray(render(scene, SIDE).image), caption(scene, rng)


def _encoded(picture: PILImage.Image, quality: int = 92) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _written(folder: Path, name: str, rows: list[tuple[bytes, str]]) -> Captions:
    lines = []
    for index, (content, text) in enumerate(rows):
        (folder / "pictures" / f"{name}-{index:06d}.jpg").write_bytes(content)
        lines.append(json.dumps({"image": f"pictures/{name}-{index:06d}.jpg", "caption": text}) + "\n")
    (folder / f"{name}.jsonl").write_text("".join(lines))
    return Captions(str(folder / f"{name}.jsonl"))
