"""The loader: a fixed plan of batches, the same on every machine, that can be left and taken up anywhere."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader, Dataset

from lit_vlm.batch import BadSample, Batch, Counts
from lit_vlm.data.encode import Sample, SampleEncoder
from lit_vlm.data.records import RecordError
from lit_vlm.data.sources import Source


@dataclass(frozen=True)
class BadSamples:
    """What happens to samples that cannot be used.

    Attributes:
        action: `skip` counts and lists them in bad_samples.jsonl of the run; `fail` stops at the first.
        max_share: a run whose share of unusable samples is above this stops, naming the reasons.
    """

    action: Literal["skip", "fail"] = "skip"
    max_share: float = 0.05


class SourceDataset(Dataset[Sample | BadSample]):
    """All samples of several sources, one after the other, encoded."""

    def __init__(self, sources: Sequence[Source], encode: SampleEncoder) -> None:
        self.sources = list(sources)
        self.encode = encode
        self._ends = list(accumulate(len(source) for source in self.sources))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Sample | BadSample:
        which = next(i for i, end in enumerate(self._ends) if index < end)
        source = self.sources[which]
        local = index - (self._ends[which - 1] if which else 0)
        identity = str(local)
        try:
            record = source.record(local)
            identity = record.id
            return self.encode(record, source.image_folder)
        except RecordError as error:
            return BadSample(identity, source.name, error.reason, error.detail)


class BatchPlan:
    """Which samples each step of an epoch takes, for one rank.

    The order depends on the seed and the epoch only. A global batch is a stretch of it, dealt out to the ranks, so any
    number of ranks sees the same global batches as long as ranks × batch size stays the same. No sample is dropped: the
    last batch may be short, and even empty on some rank.
    """

    def __init__(self, length: int, batch_size: int, rank: int, world_size: int, shuffle: bool, seed: int) -> None:
        self.length, self.batch_size = length, batch_size
        self.rank, self.world_size = rank, world_size
        self.shuffle, self.seed = shuffle, seed
        self.epoch = 0
        self.start = 0

    @property
    def sampler(self) -> BatchPlan:
        """This plan: Lightning looks for `set_epoch` behind this name."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the order; Lightning calls this before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return -(-self.length // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[int]]:
        """The sample indices of each batch, from `start` on."""
        order: Sequence[int] = range(self.length)
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
            order = torch.randperm(self.length, generator=generator).tolist()
        # Read now, not when the first batch is asked for: `start` holds for one epoch only.
        firsts = [(index * self.world_size + self.rank) * self.batch_size for index in range(self.start, len(self))]
        return (list(order[first : first + self.batch_size]) for first in firsts)


class Loader:
    """A DataLoader over a plan, with the counts of each optimizer step, a log of bad samples, and exact resume.

    Args:
        dataset: what is read.
        plan: in which order.
        collate: samples and bad samples → batch.
        num_workers: loader processes.
        window: micro-batches per optimizer step; each batch carries the counts of its whole step.
        bad_samples: what happens to samples that cannot be used.
        log: where bad samples are listed, or None.
        pin_memory: pin batches, for an accelerator.
    """

    def __init__(
        self,
        dataset: Dataset[Sample | BadSample],
        plan: BatchPlan,
        collate: Callable[[Sequence[Sample], Sequence[BadSample]], Batch],
        num_workers: int,
        window: int,
        bad_samples: BadSamples,
        log: Path | None,
        pin_memory: bool,
    ) -> None:
        self.dataset, self.batch_sampler, self.window = dataset, plan, window
        self.bad_samples, self.log = bad_samples, log
        self._loader = DataLoader(
            dataset,
            batch_sampler=plan,
            num_workers=num_workers,
            collate_fn=_Collate(collate),
            pin_memory=pin_memory,
            prefetch_factor=4 if num_workers else None,
        )
        self._done = 0
        self.seen = 0
        self.bad: Counter[tuple[str, str]] = Counter()
        self._dropped: list[BadSample] = []

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Batch]:
        self._done = self.batch_sampler.start
        batches = iter(self._loader)
        self.batch_sampler.start = 0  # a resumed epoch starts late, the next one does not
        while group := list(islice(batches, self.window)):
            counts = sum((batch.counts for batch in group), Counts())
            for batch in group:
                self._note(batch)
                self._done += 1
                yield replace(batch, window=counts)

    def state_dict(self) -> dict[str, Any]:
        """Where in which epoch's plan the next batch lies."""
        plan = self.batch_sampler
        return {
            "epoch": plan.epoch,
            "batches": self._done,
            "plan": {"samples": plan.length, "global_batch": plan.batch_size * plan.world_size, "seed": plan.seed},
            "world_size": plan.world_size,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            ValueError: when the plan differs, so that the order of samples could not be the same.
        """
        mine = self.state_dict()["plan"]
        if mine != state["plan"]:
            raise ValueError(
                f"this run cannot go on exactly: its data plan was {state['plan']}, now it is {mine}. "
                "Resume with the same data, seed and devices × batch size, or start a new run from its weights "
                "with model.stage.start_from"
            )
        self.batch_sampler.epoch = state["epoch"]
        self.batch_sampler.start = state["batches"] if state["batches"] < len(self) else 0
        self._done = self.batch_sampler.start

    def _note(self, batch: Batch) -> None:
        dropped = [sample for sample in batch.bad if sample.dropped]
        self.seen += len(batch.samples) + len(dropped)
        self._dropped += dropped
        for sample in batch.bad:
            self.bad[sample.source, sample.reason] += 1
        if self.log is not None and batch.bad:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with self.log.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(sample._asdict()) + "\n" for sample in batch.bad)
        if dropped and self.bad_samples.action == "fail":
            sample = dropped[0]
            raise ValueError(
                f"sample '{sample.id}' of source '{sample.source}' cannot be used: {sample.reason}: {sample.detail}. "
                "data.bad_samples.action skip would leave such samples out"
            )
        self._check_share()

    def _check_share(self) -> None:
        """Stop once too many samples are unusable; judged after 100 samples, or at the end of a shorter epoch."""
        total = len(self._dropped)
        if self.seen < min(100, self.batch_sampler.length // self.batch_sampler.world_size):
            return
        if total > self.bad_samples.max_share * self.seen:
            reasons = Counter[str]()
            for (source, reason), count in self.bad.items():
                reasons[f"{reason} in {source}"] += count
            examples = "; ".join(f"{s.id} ({s.source}): {s.reason}: {s.detail}" for s in self._dropped[-3:])
            raise ValueError(
                f"{total} of {self.seen} samples cannot be used, more than data.bad_samples.max_share "
                f"{self.bad_samples.max_share}: {dict(reasons)}. The last: {examples}"
                + (f". All are listed in {self.log}" if self.log else "")
            )


@dataclass(frozen=True)
class _Collate:
    """Separate good samples from bad ones, in the worker."""

    collate: Callable[[Sequence[Sample], Sequence[BadSample]], Batch]

    def __call__(self, items: Sequence[Sample | BadSample]) -> Batch:
        samples = [item for item in items if isinstance(item, Sample)]
        return self.collate(samples, [item for item in items if isinstance(item, BadSample)])
