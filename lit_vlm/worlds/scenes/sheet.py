"""A sheet of samples: pictures, maps and text."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont

from lit_vlm.worlds.scenes.language import caption
from lit_vlm.worlds.scenes.questions import QUESTION_KINDS, ask
from lit_vlm.worlds.scenes.render import Rendering, render
from lit_vlm.worlds.scenes.world import FAR

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
TILE = 160
GAP, MARGIN = 6, 20
COLUMNS = 2
LINE, FONT_SIZE = 17, 13
NEAR = 2.0
"""Depth in metres that is drawn white."""
CELL_WIDTH = 3 * TILE + 2 * GAP
PALETTE = np.array(
    [(38, 38, 44), (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (204, 121, 167), (213, 94, 0)],
    np.uint8,
)
"""Colours of the background and of things 1 to 6, which the colour-blind tell apart, too."""


def sheet(count: int, seed: int = 0) -> PILImage.Image:
    """Draw samples: picture, depth (near is light), segmentation, and below them a caption and a question.

    Args:
        count: how many; the kinds of questions take turns.
        seed: another seed gives other samples.

    Raises:
        ValueError: if `count` is less than 1.
    """
    if count < 1:
        raise ValueError(f"count is {count}; a sheet has at least 1 sample")
    font = ImageFont.load_default(FONT_SIZE)
    samples = [_Sample.draw(index, seed, font) for index in range(count)]
    rows = [samples[at : at + COLUMNS] for at in range(0, count, COLUMNS)]
    heights = [TILE + GAP + LINE * max(len(sample.lines) for sample in row) + MARGIN for row in rows]
    width = MARGIN + min(count, COLUMNS) * (CELL_WIDTH + MARGIN)
    canvas = PILImage.new("RGB", (width, MARGIN + sum(heights)), "white")
    pen = ImageDraw.Draw(canvas)
    top = MARGIN
    for row, height in zip(rows, heights, strict=True):
        for column, sample in enumerate(row):
            left = MARGIN + column * (CELL_WIDTH + MARGIN)
            for index, tile in enumerate(sample.tiles):
                canvas.paste(PILImage.fromarray(tile), (left + index * (TILE + GAP), top))
            for number, (line, colour) in enumerate(sample.lines):
                pen.text((left, top + TILE + GAP + number * LINE), line, fill=colour, font=font)
        top += height
    return canvas


@dataclass(frozen=True)
class _Sample:
    """The drawing of one scene: square pictures, and lines of text with their colours."""

    tiles: list[NDArray[np.uint8]]
    lines: list[tuple[str, str]]

    @classmethod
    def draw(cls, index: int, seed: int, font: Font) -> _Sample:
        scene, question = ask(QUESTION_KINDS[index % len(QUESTION_KINDS)], f"sheet-{seed}-{index}")
        told = caption(scene, random.Random(f"sheet-{seed}-{index}"))
        lines = [(line, "black") for line in _wrap(told, font)]
        lines += [(line, "#0a58a6") for line in _wrap(f"{question.text} {question.answer}", font)]
        return cls(_tiles(render(scene, TILE)), lines)


def _tiles(rendering: Rendering) -> list[NDArray[np.uint8]]:
    grey = np.clip((FAR - rendering.depth) / (FAR - NEAR), 0, 1)
    return [
        rendering.image,
        np.repeat((255 * grey).astype(np.uint8)[..., None], 3, axis=2),
        PALETTE[rendering.segmentation],
    ]


def _wrap(text: str, font: Font) -> list[str]:
    """Break a text into lines as wide as a sample."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= CELL_WIDTH:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
