"""The plan of a loader: which samples each batch of each epoch takes, on each rank."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from lit_vlm.data.feed.batching import Batching, EpochPlan, GlobalBatch, Measures
from lit_vlm.data.feed.mixture import Mixture
from lit_vlm.data.sources.base import Source, describe

BATCHING_STREAM = 1 << 20
"""Number of the random stream of batchings, far from those of the sources."""


class Place(NamedTuple):
    """A sample in a batch: its row, and its index into all sources end to end."""

    row: int
    sample: int


@dataclass(frozen=True)
class Ordering:
    """What decides the order of samples.

    Attributes:
        sources: the sources; samples are numbered over them one after the other.
        mixture: how much of each source an epoch takes.
        batching: how samples become rows.
        measures: measures of all samples, for the batching.
        seed: seed of every random choice.
    """

    sources: Sequence[Source]
    mixture: Mixture
    batching: Batching
    measures: Measures
    seed: int


class BatchPlan:
    """Which samples each step of an epoch takes, for one rank.

    The order depends on the seed and the epoch only. A global batch is a stretch of it, dealt out to the ranks, so any
    number of ranks sees the same global batches as long as ranks × batch size stays the same. No sample of the order is
    dropped: the last batch may be short, and even empty on some rank. Every epoch has as many batches as the first, so
    that the steps of a run are known when it starts.

    Args:
        ordering: what decides the order.
        global_batch: how rows are dealt out to ranks.
        rank: the rank whose batches these are.
        shuffle: False for held-out data, which is taken in order.
    """

    def __init__(self, ordering: Ordering, global_batch: GlobalBatch, rank: int, shuffle: bool) -> None:
        self.ordering, self.global_batch, self.rank, self.shuffle = ordering, global_batch, rank, shuffle
        self.epoch = 0
        self.start = 0
        self._current: tuple[int, EpochPlan] | None = None
        self._digest: tuple[int, str] | None = None
        self._batches = -(-len(self._plan(0).ends) // global_batch.rows)

    @property
    def sampler(self) -> BatchPlan:
        """This plan: Lightning looks for `set_epoch` behind this name."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, and so the order of samples; Lightning calls this before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return self._batches

    @property
    def num_samples(self) -> int:
        """Samples of an epoch, on all ranks."""
        return len(self._plan(self.epoch).samples)

    def __iter__(self) -> Iterator[list[Place]]:
        """The samples of each batch, from `start` on."""
        plan = self._plan(self.epoch)
        # Read now, not when the first batch is asked for: `start` holds for one epoch only.
        batches = range(self.start, len(self))
        return ([Place(row, i) for row, items in enumerate(self._rows(plan, b)) for i in items] for b in batches)

    def identity(self) -> dict[str, Any]:
        """All that the order of samples depends on; written with every checkpoint."""
        return self._settings | {"samples": self.num_samples, "order": self._order_digest()}

    def changed(self, saved: Mapping[str, Any]) -> list[str]:
        """Keys of a saved `identity` whose values differ now, so that the order of samples would be another.

        Sources are compared by their fingerprints in order; their names may differ.
        """
        mine = self.identity()
        compared = [{**one, "sources": [mark for _, mark in one.get("sources", [])]} for one in (mine, saved)]
        return [key for key in {**mine, **saved} if compared[0].get(key) != compared[1].get(key)]

    @cached_property
    def _settings(self) -> dict[str, Any]:
        """The part of `identity` that is the same in all epochs; kept, as fingerprints read whole files."""
        ordering, global_batch = self.ordering, self.global_batch
        same = {
            "sources": [[source.name, source.fingerprint()] for source in ordering.sources],
            "mixture": describe(ordering.mixture),
            "batching": describe(ordering.batching),
            "seed": ordering.seed,
            "rows per micro-batch on all devices": global_batch.rows,
            "batches": len(self),
        }
        if ordering.mixture.by_rank:
            same["batch_size"] = global_batch.batch_size
        if ordering.batching.by_step:
            same["accumulate_grad_batches"] = global_batch.accumulate
        return same

    def _order_digest(self) -> str:
        """A hash of this epoch's rows, or of its steps for a batching that deals a step out by the number of ranks."""
        if self._digest is not None and self._digest[0] == self.epoch:
            return self._digest[1]
        plan = self._plan(self.epoch)
        samples = plan.samples
        if self.ordering.batching.by_step:
            step = self.global_batch.rows * self.global_batch.accumulate
            samples = np.concatenate([np.sort(samples[i : i + step]) for i in range(0, max(1, len(samples)), step)])
        self._digest = (self.epoch, hashlib.sha256(samples.tobytes() + plan.ends.tobytes()).hexdigest()[:16])
        return self._digest[1]

    def _rows(self, plan: EpochPlan, batch: int) -> list[list[int]]:
        size = self.global_batch.batch_size
        first = (batch * self.global_batch.world_size + self.rank) * size
        rows = plan.rows(first, first + size)
        if batch == len(self) - 1 and len(plan.ends) > (end := len(self) * self.global_batch.rows):
            # A later epoch packed into a few rows more than the first: the last batch of each rank takes them.
            rows += plan.rows(end, len(plan.ends))[self.rank :: self.global_batch.world_size]
        return rows

    def _plan(self, epoch: int) -> EpochPlan:
        if self._current is None or self._current[0] != epoch:
            ordering, global_batch = self.ordering, self.global_batch
            if self.shuffle:
                order = ordering.mixture.order(ordering.sources, ordering.seed, epoch, global_batch)
            else:
                order = np.arange(sum(len(source) for source in ordering.sources))
            streams = np.random.SeedSequence((abs(ordering.seed), epoch, BATCHING_STREAM))
            plan = ordering.batching.plan(order, ordering.measures, global_batch, np.random.default_rng(streams))
            self._current = (epoch, plan)
        return self._current[1]
