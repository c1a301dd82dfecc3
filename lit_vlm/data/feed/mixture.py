"""Mixtures: how much of each source an epoch takes, and in which order.

An order is a function of the seed and the epoch alone: no state is carried from sample to sample, so a run can be left
and taken up anywhere.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lit_vlm.data.feed.batching import GlobalBatch
from lit_vlm.data.sources.base import Source

Order = NDArray[np.int64]


class Mixture(ABC):
    """The order of an epoch's samples.

    Attributes:
        by_rank: whether the order depends on how many ranks there are, not only on ranks × batch size.
    """

    by_rank = False

    @abstractmethod
    def order(self, sources: Sequence[Source], seed: int, epoch: int, global_batch: GlobalBatch) -> Order:
        """Samples of an epoch, as indices into all sources end to end; as many in every epoch.

        Raises:
            ValueError: for settings that do not fit the sources.
        """


@dataclass
class Shuffled(Mixture):
    """Every source in full, shuffled together.

    Args:
        passes: source → how often it is gone through in an epoch; 1 for sources that are not named. With a fraction the
            next epoch takes other samples, until all were seen.

    Raises:
        ValueError: for negative numbers.
    """

    passes: dict[str, float] | None = None

    def __post_init__(self) -> None:
        if bad := {name: passes for name, passes in (self.passes or {}).items() if passes < 0}:
            raise ValueError(f"Shuffled: passes are 0 or more, not {bad}")

    def order(self, sources: Sequence[Source], seed: int, epoch: int, global_batch: GlobalBatch) -> Order:
        """All samples in random order.

        Raises:
            ValueError: when `passes` names an unknown source, or two sources have one name.
        """
        passes = _by_name(self.passes, sources, "data.mixture.passes")
        counts = [int(len(source) * passes.get(source.name, 1.0)) for source in sources]
        return _merged(_draw(sources, counts, seed, epoch), _generator(seed, epoch, 0))


@dataclass
class Weighted(Mixture):
    """Sources by weight; each goes through all of its samples before one comes again.

    Args:
        weights: share of each source, by name, relative to each other. Without them, shares are sizes to the power of
            1 / temperature.
        temperature: 1 takes sources by their size, larger ones even them out.
        samples: number of samples per epoch; default: that of all samples of all sources.
        max_passes: how often a source is gone through in an epoch at most; other sources fill what it cannot give.
    """

    weights: dict[str, float] | None = None
    temperature: float = 1.0
    samples: int | None = None
    max_passes: float | None = None

    def order(self, sources: Sequence[Source], seed: int, epoch: int, global_batch: GlobalBatch) -> Order:
        """Samples with exact shares in every epoch, in random order.

        Raises:
            ValueError: as `counts`.
        """
        counts = self.counts(sources)
        return _merged(_draw(sources, counts, seed, epoch), _generator(seed, epoch, 0))

    def counts(self, sources: Sequence[Source]) -> list[int]:
        """Number of samples of each source in an epoch.

        Raises:
            ValueError: for weights of unknown or missing sources, or when the caps leave too little.
        """
        sizes = np.array([len(source) for source in sources], np.float64)
        if not self.temperature > 0 or (self.samples is not None and self.samples < 1):
            raise ValueError(
                f"Weighted: temperature is above 0 and samples at least 1, not {self.temperature} and {self.samples}"
            )
        if self.weights is None:
            shares = np.where(sizes > 0, sizes, 0) ** (1 / self.temperature)
        else:
            weights = _by_name(self.weights, sources, "data.mixture.weights")
            if missing := [source.name for source in sources if source.name not in weights]:
                raise ValueError(f"data.mixture.weights lacks {', '.join(missing)} (0 leaves a source out)")
            shares = np.where(sizes > 0, [weights[source.name] for source in sources], 0.0)
        if not (shares >= 0).all() or not shares.sum():
            raise ValueError(f"data.mixture.weights are {self.weights}; weights are not negative, and one is above 0")
        total = self.samples or int(sizes.sum())
        caps = np.full(len(sizes), np.inf) if self.max_passes is None else np.floor(sizes * self.max_passes)
        return _shared_out(total, shares, caps)


@dataclass
class Interleaved(Mixture):
    """VILA's sampler: sources spread evenly over the epoch, and all ranks on the same source at any time.

    Each rank owns a stretch of each source, of which whole batches are used; the samples of the larger sources are
    placed first, each source at even distances over the places that are still free (VILA's release 1.0,
    `VILADistributedSampler`; there are no weights).
    """

    by_rank = True

    def order(self, sources: Sequence[Source], seed: int, epoch: int, global_batch: GlobalBatch) -> Order:
        """The orders of all ranks, interleaved batch by batch.

        Raises:
            ValueError: for a source too small to give each rank a whole batch.
        """
        size, world = global_batch.batch_size, global_batch.world_size
        usable = [len(source) // (world * size) * size for source in sources]
        for source, count in zip(sources, usable, strict=True):
            if len(source) and not count:
                raise ValueError(
                    f"Interleaved takes whole batches of each source on each rank, and '{source.name}' has "
                    f"{len(source)} samples for {world} × {size}: use fewer rows, or data.mixture Shuffled"
                )
        total = sum(usable)
        places = _even_places(usable)
        starts = np.cumsum([0, *(len(source) for source in sources)])
        ranks = np.empty((world, total), np.int64)
        for rank in range(world):
            rng = random.Random(seed + epoch)  # the same on all ranks
            for count, start, place in zip(usable, starts, places, strict=False):
                own = list(range(start + rank * count, start + (rank + 1) * count))
                rng.shuffle(own)
                ranks[rank, place] = own
        return ranks.reshape(world, -1, size).transpose(1, 0, 2).reshape(-1)


def _even_places(counts: Sequence[int]) -> list[Order]:
    """Places in the whole order that each part takes: larger parts first, each evenly over the places still free."""
    free = np.arange(sum(counts))
    places: list[Order] = [np.empty(0, np.int64)] * len(counts)
    for index in sorted(range(len(counts)), key=lambda i: -counts[i]):
        count = counts[index]
        taken = np.arange(count) * len(free) // max(1, count)
        places[index] = free[taken]
        free = np.delete(free, taken)
    return places


def _by_name(values: Mapping[str, float] | None, sources: Sequence[Source], key: str) -> Mapping[str, float]:
    names = [source.name for source in sources]
    if values and (unknown := set(values) - set(names)):
        raise ValueError(f"{key} names {', '.join(sorted(unknown))}; sources: {', '.join(names)}")
    if values and len(set(names)) < len(names):
        raise ValueError(f"{key} needs sources of different names; they are {', '.join(names)}: set init_args.name")
    return values or {}


def _shared_out(total: int, shares: NDArray[np.float64], caps: NDArray[np.float64]) -> list[int]:
    """Share `total` out in proportion to `shares`, none above its cap; rounding follows the largest remainders."""
    if caps[shares > 0].sum() < total:
        raise ValueError(
            f"data.mixture: {total} samples an epoch are more than data.mixture.max_passes lets the sources give "
            f"({int(caps[shares > 0].sum())}); lower data.mixture.samples"
        )
    wanted = np.zeros(len(shares))
    open_ = shares > 0
    while open_.any():
        rest = total - wanted[~open_].sum()
        wanted[open_] = rest * shares[open_] / shares[open_].sum()
        full = open_ & (wanted > caps)
        if not full.any():
            break
        wanted[full] = caps[full]
        open_ &= ~full
    counts = np.floor(wanted).astype(int)
    for index in np.argsort(counts - wanted, kind="stable")[: total - counts.sum()]:
        counts[index] += 1
    return counts.tolist()


def _draw(sources: Sequence[Source], counts: Sequence[int], seed: int, epoch: int) -> list[Order]:
    """Draw the samples of each source in this epoch: its permutations continue where the last epoch stopped."""
    drawn = []
    start = 0
    for number, (source, count) in enumerate(zip(sources, counts, strict=True)):
        size = len(source)
        first, last = epoch * count, (epoch + 1) * count
        parts = [np.empty(0, np.int64)]
        for turn in range(first // size, -(-last // size)) if size else ():
            shuffled = source.shuffled(_generator(seed, turn, number + 1))
            parts.append(shuffled[max(0, first - turn * size) : last - turn * size])
        drawn.append(np.concatenate(parts))
        drawn[-1] += start
        start += size
    return drawn


def _merged(parts: Sequence[Order], generator: np.random.Generator) -> Order:
    """Merge sequences to one at random; each keeps its own order."""
    if len(parts) == 1:
        return parts[0]
    # The narrowest integers, as there is one for each sample: a permutation draws the same for all of them.
    numbers = np.arange(len(parts), dtype=np.min_scalar_type(len(parts)))
    owner = np.repeat(numbers, [len(part) for part in parts])
    generator.shuffle(owner)
    merged = np.empty(len(owner), np.int64)
    for number, part in enumerate(parts):
        merged[owner == number] = part
    return merged


def _generator(seed: int, epoch: int, stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((abs(seed), epoch, stream))))
