"""Batching: how an epoch's order is cut into rows and batches.

A plan is a function of the order, the lengths and the seed: nothing is decided while samples are read.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]


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

    @staticmethod
    def of_rows(rows: Sequence[Sequence[int]]) -> EpochPlan:
        """A plan with several samples per row."""
        flat = [sample for row in rows for sample in row]
        return EpochPlan(np.array(flat, np.int64), np.cumsum([len(row) for row in rows], dtype=np.int64))

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
        step = global_batch.step
        steps: list[Integers] = []
        left: list[Integers] = []
        for members in (order[lengths[order] > 0], order[lengths[order] <= 0]):
            whole = len(members) // step * step
            steps += list(members[:whole].reshape(-1, step))
            left.append(members[whole:])
        dealt = [deal_out(group, np.abs(lengths[group]), step // global_batch.batch_size) for group in steps]
        dealt = [dealt[i] for i in generator.permutation(len(dealt))]
        rest = np.concatenate(left)
        return EpochPlan.of_samples(np.concatenate([*dealt, rest]) if len(order) else order)


def deal_out(samples: Integers, lengths: Integers, parts: int) -> Integers:
    """Deal samples out to parts of equal size: longest first, each to the part with the smallest sum that has room.

    Args:
        samples: `[n]`.
        lengths: `[n]`, not negative.
        parts: number of parts, which divides n.

    Returns:
        `[n]`, the samples of each part, one part after the other.
    """
    size = len(samples) // parts
    members: list[list[int]] = [[] for _ in range(parts)]
    sums = [0] * parts
    for index in np.argsort(-lengths, kind="stable"):
        part = min((p for p in range(parts) if len(members[p]) < size), key=lambda p: sums[p])
        members[part].append(int(samples[index]))
        sums[part] += int(lengths[index])
    return np.array([sample for part in members for sample in part], np.int64)


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
        sizes = np.maximum(measures.sizes(), 0)
        capacity, rows = measures.capacity, global_batch.rows
        whole: list[list[int]] = []
        waiting: list[list[int]] = []  # rows that are full but do not make up a step yet
        carried = order[:0]
        for start in range(0, len(order), self.window):
            items = np.concatenate([carried, order[start : start + self.window]])
            last = start + self.window >= len(order)
            packed = self._pack(items, sizes, capacity)
            fill = np.array([sizes[row, 0].sum() for row in packed])
            by_fill = [packed[i] for i in np.argsort(-fill, kind="stable")]
            keep = len(by_fill) if last else self._full_enough(by_fill, np.sort(fill)[::-1], capacity)
            carried = np.array([sample for row in by_fill[keep:] for sample in row], np.int64)
            ready = sorted(waiting + by_fill[:keep], key=lambda row: -int(sizes[row, 0].sum()))
            cut = len(ready) // rows * rows
            groups = [ready[i : i + rows] for i in range(0, cut, rows)]
            whole += [row for g in generator.permutation(len(groups)) for row in groups[g]]
            waiting = ready[cut:]
        return EpochPlan.of_rows(whole + waiting)

    def _pack(self, items: Integers, sizes: Integers, capacity: int) -> list[list[int]]:
        bins = first_fit_decreasing(sizes[items, 0].tolist(), capacity, sizes[items, 1].tolist(), self.max_images)
        return [[int(items[i]) for i in members] for members in bins]

    def _full_enough(self, rows: Sequence[Sequence[int]], fill: Integers, capacity: int) -> int:
        """How many rows, fullest first, are final: those of 98 % fill or more, and others while too many wait."""
        keep = int((fill >= 0.98 * capacity).sum())
        spare = self.window // 4 - sum(len(row) for row in rows[keep:])
        while spare < 0 and keep < len(rows):
            spare += len(rows[keep])
            keep += 1
        return keep


def first_fit_decreasing(
    lengths: Sequence[int], capacity: int, images: Sequence[int] | None = None, max_images: int | None = None
) -> list[list[int]]:
    """Pack items into bins: longest first, each into the first bin that has room.

    Args:
        lengths: length of each item.
        capacity: most length of a bin.
        images: number of images of each item.
        max_images: most images of a bin; an item with more has a bin of its own.

    Returns:
        indices of the items in each bin, in order.
    """
    bins: list[list[int]] = []
    room = np.zeros(len(lengths), np.int64)
    places = np.zeros(len(lengths), np.int64)
    counts = images if images is not None and max_images is not None else [0] * len(lengths)
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = (room[: len(bins)] >= lengths[index]) & (places[: len(bins)] >= counts[index])
        place = int(fits.argmax()) if len(bins) else 0
        if not len(bins) or not fits[place]:
            place = len(bins)
            bins.append([])
            room[place], places[place] = capacity, max_images or 0
        bins[place].append(index)
        room[place] -= lengths[index]
        places[place] -= counts[index]
    return bins
