"""Drawn shapes: pictures and questions that need no file."""

from __future__ import annotations

import hashlib
import io
import random
from pathlib import Path

from PIL import Image as PILImage
from PIL import ImageDraw

from lit_vlm.data.records import Image, Message, Record, Text
from lit_vlm.data.sources import Source

COLOURS = ("red", "green", "blue", "yellow", "black", "white", "purple", "orange")
SHAPES = ("circle", "square", "triangle")


class Shapes(Source):
    """One coloured shape per picture, with its name as the answer; every third sample is text only.

    Args:
        count: number of samples.
        seed: another seed draws other pictures.
        text_only: whether every third sample has no picture.
    """

    def __init__(self, count: int = 256, seed: int = 0, text_only: bool = True) -> None:
        self.name = "shapes"
        self.image_folder = Path()
        self.count, self.seed, self.text_only = count, seed, text_only

    def __len__(self) -> int:
        return self.count

    def record(self, index: int) -> Record:
        """Draw one sample."""
        rng = random.Random(f"{self.seed}-{index}")
        colour, shape = rng.choice(COLOURS), rng.choice(SHAPES)
        if self.text_only and index % 3 == 2:
            question = Message("user", (Text(f"Write: {colour}"),))
            return Record(f"{self.seed}-{index}", self.name, (question, Message("assistant", (Text(colour),))))
        question = Message("user", (Image(data=_draw(rng, colour, shape)), Text("\nWhat is this?")))
        answer = Message("assistant", (Text(f"a {colour} {shape}"),))
        return Record(f"{self.seed}-{index}", self.name, (question, answer))

    def fingerprint(self) -> str:
        """A hash of the arguments, which decide everything."""
        return hashlib.sha256(f"shapes-{self.count}-{self.seed}-{self.text_only}".encode()).hexdigest()[:16]


def _draw(rng: random.Random, colour: str, shape: str) -> bytes:
    size = (rng.randint(40, 80), rng.randint(40, 80))
    picture = PILImage.new("RGB", size, "grey")
    pen = ImageDraw.Draw(picture)
    radius = rng.randint(10, 18)
    x, y = (rng.randint(radius, side - radius) for side in size)
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        pen.ellipse(box, fill=colour)
    elif shape == "square":
        pen.rectangle(box, fill=colour)
    else:
        pen.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=colour)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()
