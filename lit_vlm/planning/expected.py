"""Means and extremes of a stage's records, from the statistics of its data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lit_vlm.planning.statistics import Group, Stage

BYTES_PER_PIXEL = 0.5
"""Of a photograph as JPEG: COCO's train2017 has 118,287 pictures of about 640 × 480 pixels in 19 GB."""
TokensOf = Callable[[tuple[int, int]], int]
"""(width, height) of a picture → its visual tokens, as `SampleEncoder.tokens_of`."""


@dataclass(frozen=True)
class Expected:
    """Means over the records of a stage, or of one source.

    Attributes:
        records: number of records of an epoch.
        text: text tokens of a record, template included.
        supervised: those of them that carry a loss.
        visual: visual tokens of a record.
        positions: text and visual tokens of a record, where a sequence has at most `max_length`.
        pictures: pictures of a record.
        picture_bytes: bytes of a record's pictures as JPEG files.
    """

    records: int
    text: float
    supervised: float
    visual: float
    positions: float
    pictures: float
    picture_bytes: float


def expected(stage: Stage, tokens_of: TokensOf, max_length: int | None = None) -> Expected:
    """The means over all records of a stage, each source with as many records as it has.

    Args:
        stage: statistics of the stage, or of some of its sources.
        tokens_of: (width, height) of a picture → its visual tokens, as `SampleEncoder.tokens_of`.
        max_length: most positions of a sequence; default: any number.
    """
    total = sum(source.records for source in stage.values())
    sums = np.zeros(6)
    for source in stage.values():
        for group in source.groups:
            shares = sum(group.share for group in source.groups)  # nearly 1
            weight = source.records / total * source.sequences * group.share / shares
            sums += weight * _means(group, tokens_of, max_length)
    return Expected(total, *sums.tolist())


def _means(group: Group, tokens_of: TokensOf, max_length: int | None, steps: int = 400) -> NDArray[np.float64]:
    text = group.text_tokens.at((np.arange(steps) + 0.5) / steps).astype(float)
    per_picture = sum(size.share * tokens_of((size.width, size.height)) for size in group.picture_sizes)
    area = sum(size.share * size.width * size.height for size in group.picture_sizes)
    pictures = float(np.mean(group.counts))
    lengths = np.concatenate([text + count * per_picture for count in group.counts])
    capped = np.minimum(lengths, max_length) if max_length else lengths
    return np.array(
        [
            text.mean(),
            text.mean() * group.supervised,
            pictures * per_picture,
            capped.mean(),
            pictures,
            pictures * area * BYTES_PER_PIXEL,
        ]
    )


def longest_group(stage: Stage, tokens_of: TokensOf, max_length: int) -> tuple[str, int]:
    """The kind of records with the most positions; among those as long, the one with the most visual tokens.

    Records whose pictures alone fill a sequence do not count, as they are dropped in training.

    Args:
        stage: statistics of the stage.
        tokens_of: (width, height) of a picture → its visual tokens.
        max_length: most positions of a sequence.

    Returns:
        name of the source, and number of the group in it: the argument `longest` of `planning.mock.Mock`.

    Raises:
        ValueError: where there is no other kind than these.
    """
    sizes: dict[tuple[str, int], tuple[float, float]] = {}
    for name, source in stage.items():
        for number, group in enumerate(source.groups):
            largest = max((tokens_of((size.width, size.height)) for size in group.picture_sizes), default=0)
            visual = max(group.counts) * largest
            whole = min(group.text_tokens.values[-1] + visual, max_length)
            if visual < max_length:
                sizes[name, number] = (whole * source.sequences, visual * source.sequences)
    if not sizes:
        raise ValueError(f"the pictures of all records fill data.max_length {max_length} alone: set it larger")
    return max(sizes, key=lambda key: sizes[key])
