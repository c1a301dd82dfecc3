"""The plan of a loader: which samples each batch of each epoch takes, on each rank."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from lit_vlm.data.feed.batching import Batching, EpochPlan, GlobalBatch, Measures
from lit_vlm.data.feed.elastic import Moved, described
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

    The order depends on the seed and the epoch only, and with some mixtures and batchings on how rows are dealt out
    when the run begins. A global batch is a stretch of it, dealt out to the ranks, so any number of ranks sees the same
    global batches as long as ranks × batch size stays the same; and the same optimizer steps as long as that times the
    accumulated micro-batches stays the same, as the order is that of the run's beginning. No sample of the order is
    dropped: the last batch may be short, and even empty on some rank. Every epoch has as many batches as the first, so
    that the steps of a run are known when it starts.

    Attributes:
        ordered_for: how rows were dealt out when the run began, which the order was made for.
        moved: how places of an epoch changed, where the run went on with other micro-batches; None where not.

    Args:
        ordering: what decides the order.
        global_batch: how rows are dealt out to ranks.
        rank: the rank whose batches these are.
        shuffle: False for held-out data, which is taken in order.
    """

    def __init__(self, ordering: Ordering, global_batch: GlobalBatch, rank: int, shuffle: bool) -> None:
        self.ordering, self.global_batch, self.rank, self.shuffle = ordering, global_batch, rank, shuffle
        self.ordered_for = global_batch
        self.moved: Moved | None = None
        self.epoch = 0
        self.start = 0
        self._current: tuple[int, EpochPlan] | None = None
        self._digest: tuple[int, str] | None = None
        self._epoch_rows = len(self._plan(0).ends)

    @property
    def sampler(self) -> BatchPlan:
        """This plan: Lightning looks for `set_epoch` behind this name."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, and so the order of samples; Lightning calls this before each epoch."""
        if epoch != self.epoch:
            self.start = 0  # a place was for the epoch that it was saved in
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return -(-self._epoch_rows // self.global_batch.rows)

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

    def state_dict(self, done: int) -> dict[str, Any]:
        """The place behind `done` batches of this epoch, and what the order was made from."""
        dealt = {"dealt": list(self.global_batch), "ordered_for": list(self.ordered_for)}
        return {"epoch": self.epoch, "batches": done, "plan": self.identity()} | dealt

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken: set epoch and `start`.

        With other micro-batches and the same rows per optimizer step, the order stays that of the run's beginning.

        Raises:
            ValueError: when the order of samples could not be the same, or the place is inside an optimizer step whose
                micro-batches are others now.
        """
        self.epoch = state["epoch"]
        # Checkpoints of earlier versions do not say how rows were dealt out.
        then = GlobalBatch(*state["dealt"]) if "dealt" in state else None
        if then is not None and then.step == self.global_batch.step:
            self._order_for(GlobalBatch(*state["ordered_for"]))
        if changed := self.changed(state["plan"]):
            raise ValueError(self._refusal(state["plan"], changed, then))
        done, self.moved = state["batches"], None
        if then is not None and then.rows != self.global_batch.rows:
            self.moved = Moved(then, self.global_batch, self._epoch_rows)
            done = self.moved.batches(done)
        self.start = done if done < len(self) else 0

    def _order_for(self, began: GlobalBatch) -> None:
        """Take the order that a run with these ranks and batch size would have."""
        if began != self.ordered_for:
            self.ordered_for, self._current, self._digest = began, None, None
            self._epoch_rows = len(self._plan(0).ends)

    def _refusal(self, saved: Mapping[str, Any], changed: Sequence[str], then: GlobalBatch | None) -> str:
        mine = self.identity()
        differ = [f"{key}: {saved.get(key)} then, {mine.get(key)} now" for key in changed]
        as_before = "devices × batch size"
        if then is not None:
            as_before = f"devices × data.batch_size × trainer.accumulate_grad_batches = {then.step}"
            if then.step != self.global_batch.step:
                now = self.global_batch
                differ.append(
                    f"rows per optimizer step: {then.step} ({described(then)}) then, {now.step} ({described(now)}) now"
                )
        return (
            f"this run cannot go on exactly, as its order of samples would be another ({'; '.join(differ)}). Resume "
            f"with the same data and seed, and {as_before} as before, or start a new run from its weights with "
            "model.stage.start_from"
        )

    def identity(self) -> dict[str, Any]:
        """All that the order of samples depends on; written with every checkpoint."""
        began, ordering = self.ordered_for, self.ordering
        identity = self._settings | {
            "rows per micro-batch on all devices": began.rows,
            "batches": -(-self._epoch_rows // began.rows),
        }
        if ordering.mixture.by_rank:
            identity["batch_size"] = began.batch_size
        if ordering.batching.by_step:
            identity["accumulate_grad_batches"] = began.accumulate
        return identity | {"samples": self.num_samples, "order": self._order_digest()}

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
        ordering = self.ordering
        return {
            "sources": [[source.name, source.fingerprint()] for source in ordering.sources],
            "mixture": describe(ordering.mixture),
            "batching": describe(ordering.batching),
            "seed": ordering.seed,
        }

    def _order_digest(self) -> str:
        """A hash of this epoch's rows, or of its steps for a batching that deals a step out by the number of ranks."""
        if self._digest is not None and self._digest[0] == self.epoch:
            return self._digest[1]
        plan = self._plan(self.epoch)
        digest = hashlib.sha256()
        if self.ordering.batching.by_step:
            steps, rest = np.split(plan.samples, [len(plan.samples) // self.ordered_for.step * self.ordered_for.step])
            digest.update(np.sort(steps.reshape(-1, self.ordered_for.step), axis=1).data)
            digest.update(np.sort(rest).data)
        else:
            digest.update(np.ascontiguousarray(plan.samples).data)
        digest.update(plan.ends.data)
        self._digest = (self.epoch, digest.hexdigest()[:16])
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
            ordering, global_batch = self.ordering, self.ordered_for
            if self.shuffle:
                order = ordering.mixture.order(ordering.sources, ordering.seed, epoch, global_batch)
            else:
                order = np.arange(sum(len(source) for source in ordering.sources))
            streams = np.random.SeedSequence((abs(ordering.seed), epoch, BATCHING_STREAM))
            plan = ordering.batching.plan(order, ordering.measures, global_batch, np.random.default_rng(streams))
            self._current = (epoch, plan)
        return self._current[1]
