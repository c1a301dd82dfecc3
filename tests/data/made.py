"""Sources without content, to test orders on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from lit_vlm.data.feed.batching import Batching, GlobalBatch, Measures, Padded
from lit_vlm.data.feed.mixture import Mixture, Shuffled
from lit_vlm.data.feed.plan import BatchPlan, Ordering
from lit_vlm.data.records import Message, Record, Text
from lit_vlm.data.sources import Source


class Count(Source):
    """Records 0, 1, ... whose text is their number; `content` tells two of one name apart."""

    def __init__(self, name: str, count: int, content: str | None = None) -> None:
        self.name, self.count, self.image_folder = name, count, Path()
        self._content = content or f"{name}-{count}"
        self._on_record: Callable[[int], None] = lambda index: None

    def __len__(self) -> int:
        return self.count

    def record(self, index: int) -> Record:
        self._on_record(index)
        turns = (Message("user", (Text(f"{index}?"),)), Message("assistant", (Text(f"{self.name} {index}"),)))
        return Record(f"{self.name}-{index}", self.name, turns)

    def fingerprint(self) -> str:
        return self._content


def measures_of(sizes: Sequence[tuple[int, int]], capacity: int) -> Measures:
    """Given positions and images; words are positions, negative without an image."""
    table = np.array(sizes, np.int64).reshape(-1, 2)
    signed = np.where(table[:, 1] > 0, table[:, 0], -table[:, 0])
    return Measures(lambda: signed, lambda: table, capacity)


def plan_over(
    sources: Sequence[Source],
    layout: GlobalBatch,
    rank: int = 0,
    shuffle: bool = True,
    mixture: Mixture = Shuffled(),  # noqa: B008 - never changed
    batching: Batching = Padded(),  # noqa: B008 - never changed
    measures: Measures | None = None,
    seed: int = 5,
) -> BatchPlan:
    """A plan over sources."""
    measures = measures or measures_of([], 1)
    return BatchPlan(Ordering(sources, mixture, batching, measures, seed), layout, rank, shuffle)
