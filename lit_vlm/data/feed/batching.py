"""Batching: how an epoch's order is cut into rows and batches.

A plan is a function of the order, the lengths and the seed: nothing is decided while samples are read.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lit_vlm.data.feed.bins import Integers, first_fit_decreasing

FULL = np.iinfo(np.int64).max
"""The sum of a part that takes no more samples."""
DEALT_TOGETHER = 1 << 17
"""Most parts, of all groups, that samples are dealt out to at a time: their sums stay in a processor's cache."""


class GlobalBatch(NamedTuple):
    """How rows are dealt out.

    Attributes:
        batch_size: rows of a micro-batch on one rank.
        world_size: number of ranks; each in turn gets a micro-batch.
        accumulate: micro-batches of an optimizer step on one rank.
    """

    batch_size: int
    world_size: int
    accumulate: int = 1

    @property
    def rows(self) -> int:
        """Rows of one micro-batch over all ranks."""
        return self.batch_size * self.world_size

    @property
    def step(self) -> int:
        """Rows of one optimizer step over all ranks."""
        return self.rows * self.accumulate


@dataclass(frozen=True)
class EpochPlan:
    """The samples of an epoch in order, cut into rows.

    Attributes:
        samples: `[n]`, indices into all sources end to end.
        ends: `[r]`, index into `samples` behind the last sample of each row.
    """

    samples: Integers
    ends: Integers

    @staticmethod
    def of_samples(samples: Integers) -> EpochPlan:
        """A plan with one sample per row."""
        return EpochPlan(samples, np.arange(1, len(samples) + 1))

    def rows(self, start: int, stop: int) -> list[list[int]]:
        """The samples of rows `start` to `stop` (exclusive)."""
        rows = range(len(self.ends))[start:stop]
        return [self.samples[self.ends[row - 1] if row else 0 : self.ends[row]].tolist() for row in rows]


@dataclass(frozen=True)
class Measures:
    """Measures of all samples that a batching may need; a function is called only by batchings that need it.

    Attributes:
        modality_lengths: gives the words of each sample, negative without an image: `[n]`.
        sizes: gives the positions and images of each sample: `[n, 2]`.
        capacity: most positions of a row.
    """

    modality_lengths: Callable[[], Integers]
    sizes: Callable[[], Integers]
    capacity: int


class Batching(ABC):
    """How samples become rows and batches.

    Attributes:
        by_step: whether the plan depends on how many micro-batches make up an optimizer step.
        packs: whether a row may hold several samples.
    """

    by_step = False
    packs = False

    @abstractmethod
    def plan(
        self, order: Integers, measures: Measures, global_batch: GlobalBatch, generator: np.random.Generator
    ) -> EpochPlan:
        """Cut an order into rows.

        Args:
            order: samples of the epoch.
            measures: of all samples.
            global_batch: how rows are dealt out to ranks.
            generator: for random choices.
        """


@dataclass
class Padded(Batching):
    """One sample per row, in the order they come."""

    def plan(
        self, order: Integers, measures: Measures, global_batch: GlobalBatch, generator: np.random.Generator
    ) -> EpochPlan:
        """The order as it is."""
        return EpochPlan.of_samples(order)


@dataclass
class ModalityLength(Batching):
    """One sample per row; an optimizer step takes samples of one modality and of similar length.

    This is LLaVA's grouping for fine-tuning (`llava_trainer.py`): samples with and without images are permuted apart
    and cut into optimizer steps; each step is sorted by length and dealt out so that its batches come to similar sums;
    the steps of both kinds are permuted together. Samples of both kinds that fill no step come last, as one mixed step
    or two.
    """

    by_step = True

    def plan(
        self, order: Integers, measures: Measures, global_batch: GlobalBatch, generator: np.random.Generator
    ) -> EpochPlan:
        """Steps of one modality."""
        lengths = measures.modality_lengths()
        step, parts = global_batch.step, global_batch.step // global_batch.batch_size
        dealt: list[Integers] = []
        left: list[Integers] = []
        for members in (order[lengths[order] > 0], order[lengths[order] <= 0]):
            whole = len(members) // step * step
            groups = members[:whole].reshape(-1, step)
            block = max(1, DEALT_TOGETHER // parts)
            for one in (groups[start : start + block] for start in range(0, len(groups), block)):
                dealt.append(deal_out(one, np.abs(lengths[one]), parts))
            left.append(members[whole:])
        steps = np.concatenate(dealt) if dealt else order[:0].reshape(-1, step)
        steps = steps[generator.permutation(len(steps))]
        return EpochPlan.of_samples(np.concatenate([steps.reshape(-1), *left]))


def deal_out(samples: Integers, lengths: Integers, parts: int) -> Integers:
    """Deal samples of groups out to parts of one size: longest first, each to the part with room and the smallest sum.

    Args:
        samples: `[g, n]`.
        lengths: `[g, n]`, not negative.
        parts: number of parts, which divides n.

    Returns:
        `[g, n]`, the samples of each part of a group, one part after the other.
    """
    count, size = len(samples), samples.shape[1] // parts
    groups = np.arange(count)
    sums, members = np.zeros((count, parts), np.int64), np.zeros((count, parts), np.int64)
    dealt = np.empty((count, parts, size), np.int64)
    for column in np.argsort(-lengths, axis=1, kind="stable").T:
        part = sums.argmin(1)
        place = members[groups, part]
        dealt[groups, part, place] = samples[groups, column]
        members[groups, part] += 1
        total = sums[groups, part] + lengths[groups, column]
        sums[groups, part] = np.where(place + 1 == size, FULL, total)
    return dealt.reshape(count, -1)


class Rows(NamedTuple):
    """Rows of samples, one after the other.

    Attributes:
        samples: `[n]`, the samples of all rows.
        counts: `[r]`, number of samples of each row.
        fill: `[r]`, positions of each row.
    """

    samples: Integers
    counts: Integers
    fill: Integers

    @staticmethod
    def empty() -> Rows:
        """No rows."""
        return Rows(*np.zeros((3, 0), np.int64))

    def take(self, index: Integers) -> Rows:
        """These rows, in this order."""
        counts = self.counts[index]
        ends = np.cumsum(counts)
        starts = (np.cumsum(self.counts) - self.counts)[index]
        places = np.repeat(starts - (ends - counts), counts) + np.arange(counts.sum())
        return Rows(self.samples[places], counts, self.fill[index])

    def by_fill(self) -> Rows:
        """The rows in order, fullest first."""
        return self.take(np.argsort(-self.fill, kind="stable"))

    def split(self, row: int) -> tuple[Rows, Rows]:
        """The rows in front of one, and that one and those behind it."""
        sample = int(self.counts[:row].sum())
        return (
            Rows(self.samples[:sample], self.counts[:row], self.fill[:row]),
            Rows(self.samples[sample:], self.counts[row:], self.fill[row:]),
        )

    def joined(self, more: Rows) -> Rows:
        """These rows, and more behind them."""
        return Rows(*(np.concatenate(pair) for pair in zip(self, more, strict=True)))


@dataclass
class Packed(Batching):
    """Several samples per row; attention and loss do not cross between them.

    First-fit, longest first, over a window of samples. Rows that are not full enough wait for the next window. The rows
    of a step are of similar fill, so that all ranks get nearly as many tokens.

    Args:
        window: samples that are packed together; a larger window fills rows better and mixes samples less.
        max_images: most images of a row; a sample with more gets a row of its own.

    Raises:
        ValueError: for a window or a number of images below 1.
    """

    packs = True
    window: int = 4096
    max_images: int | None = None

    def __post_init__(self) -> None:
        if self.window < 1 or (self.max_images is not None and self.max_images < 1):
            raise ValueError(f"Packed: window and max_images are at least 1, not {self.window}, {self.max_images}")

    def plan(
        self, order: Integers, measures: Measures, global_batch: GlobalBatch, generator: np.random.Generator
    ) -> EpochPlan:
        """Rows of at most `measures.capacity` positions."""
        sizes, rows = measures.sizes(), global_batch.rows
        samples, done = np.empty(len(order), np.int64), 0
        counts: list[Integers] = []
        waiting = Rows.empty()  # rows that are full but do not make up a step yet
        carried = order[:0]
        for start in range(0, len(order), self.window):
            items = np.concatenate([carried, order[start : start + self.window]])
            packed = self._pack(items, np.maximum(sizes[items], 0), measures.capacity)
            last = start + self.window >= len(order)
            final, open_ = packed.split(len(packed.fill) if last else self._full_enough(packed, measures.capacity))
            carried = open_.samples
            ready = waiting.joined(final).by_fill()
            cut = len(ready.fill) // rows * rows
            steps, waiting = ready.split(cut)
            steps = steps.take((generator.permutation(cut // rows)[:, None] * rows + np.arange(rows)).reshape(-1))
            for one in (steps, waiting) if last else (steps,):
                samples[done : done + len(one.samples)] = one.samples
                done += len(one.samples)
                counts.append(one.counts)
        return EpochPlan(samples, np.cumsum(np.concatenate(counts)) if counts else samples)

    def _pack(self, items: Integers, sizes: Integers, capacity: int) -> Rows:
        """Rows of items of these positions and images, fullest first."""
        placed, bins = first_fit_decreasing(sizes[:, 0], capacity, sizes[:, 1], self.max_images)
        placed = placed[np.argsort(bins, kind="stable")]
        counts = np.bincount(bins)
        return Rows(items[placed], counts, np.add.reduceat(sizes[placed, 0], np.cumsum(counts) - counts)).by_fill()

    def _full_enough(self, rows: Rows, capacity: int) -> int:
        """How many rows, fullest first, are final: those of 98 % fill or more, and others while too many wait."""
        keep = int((rows.fill >= 0.98 * capacity).sum())
        waiting = np.cumsum(rows.counts[keep:][::-1])[::-1]  # samples of each row and of those behind it
        return keep + int((waiting > self.window // 4).sum())
