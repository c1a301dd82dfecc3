"""The loader: a fixed plan of batches, the same on every machine, that can be left and taken up anywhere."""

from __future__ import annotations

import json
import logging
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch.utils.data import DataLoader, Dataset

from lit_vlm.core.batch import BadSample, Batch, Counts, Window
from lit_vlm.data.feed.plan import BatchPlan, Place
from lit_vlm.data.records import RecordError
from lit_vlm.data.sample.encode import Sample, SampleEncoder
from lit_vlm.data.sets.parallel import heed_parent_alone
from lit_vlm.data.sources import Source

ENOUGH = 100
"""Number of samples after which the share of unusable ones is judged at every batch; before, when the run stops."""

logger = logging.getLogger(__name__)

Collate = Callable[[Sequence[Sequence[Sample]], Sequence[BadSample]], Batch]


@dataclass(frozen=True)
class BadSamples:
    """What happens to samples that cannot be used.

    Attributes:
        action: `skip` counts and lists them in bad_samples.jsonl of the run; `fail` stops at the first.
        max_share: a run whose share of unusable samples is above this stops, naming the reasons. Samples that a
            deny-list names are left out of the share.
    """

    action: Literal["skip", "fail"] = "skip"
    max_share: float = 0.05


class Placed(NamedTuple):
    """The samples of a record, and the row of the batch that they go to."""

    row: int
    items: list[Sample] | BadSample


class SourceDataset(Dataset[Placed]):
    """All samples of several sources, one after the other, encoded."""

    def __init__(self, sources: Sequence[Source], encode: SampleEncoder) -> None:
        self.sources = list(sources)
        self.encode = encode
        self._ends = list(accumulate(len(source) for source in self.sources))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, place: Place) -> Placed:
        which = bisect_right(self._ends, place.sample)
        source = self.sources[which]
        local = place.sample - (self._ends[which - 1] if which else 0)
        identity = str(local)
        try:
            record = source.record(local)
            identity = record.id
            return Placed(place.row, self.encode.sequences(record, source.image_folder))
        except RecordError as error:
            return Placed(place.row, BadSample(identity, source.name, error.reason, error.detail))


class Loader:
    """A DataLoader over a plan, with the counts of each optimizer step, a log of bad samples, and exact resume.

    Args:
        dataset: encoded samples by their place.
        plan: which samples each batch takes.
        collate: rows of samples, and bad samples → batch.
        num_workers: loader processes.
        window: micro-batches per optimizer step; each batch carries the counts of its whole step.
        own_counts: head → function that counts a batch for the denominator of the head's loss; called for all batches
            of a step before the step begins.
        bad_samples: what happens to samples that cannot be used.
        log: where bad samples are listed, or None.
        pin_memory: pin batches, for an accelerator.
        stops_at: (batch that the epoch begins with, batches of a whole epoch) → batch that the run stops in front of;
            default: the epoch's end. Samples are judged there, however few they are.
        on_start: called whenever the batches of an epoch are asked for.
        resumes_at: batches that were handed out → batch that a run resumed now begins with; default: the next one.
    """

    def __init__(
        self,
        dataset: Dataset[Placed],
        plan: BatchPlan,
        collate: Collate,
        num_workers: int,
        window: int,
        bad_samples: BadSamples,
        log: Path | None,
        pin_memory: bool,
        stops_at: Callable[[int, int], int] | None = None,
        on_start: Callable[[], None] | None = None,
        own_counts: Mapping[str, Callable[[Batch], float]] | None = None,
        resumes_at: Callable[[int], int] | None = None,
    ) -> None:
        self.dataset, self.batch_sampler, self.window = dataset, plan, window
        self.bad_samples, self.log, self.stops_at = bad_samples, log, stops_at
        self.on_start, self.own_counts, self.resumes_at = on_start, dict(own_counts or {}), resumes_at
        self._loader = DataLoader(
            dataset,
            batch_sampler=plan,
            num_workers=num_workers,
            collate_fn=partial(assemble, collate=collate),
            pin_memory=pin_memory,
            prefetch_factor=4 if num_workers else None,
            worker_init_fn=heed_parent_alone,
        )
        self._done = 0
        self.seen = 0
        self.bad: Counter[tuple[str, str]] = Counter()
        self._faulty: list[BadSample] = []
        self._denied = 0
        self._unlisted = False

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Batch]:
        if self.on_start is not None:
            self.on_start()
        self._done = self.batch_sampler.start
        batches = iter(self._loader)
        last = len(self) if self.stops_at is None else min(len(self), self.stops_at(self._done, len(self)))
        self.batch_sampler.start = 0  # a resumed epoch starts late, the next one does not
        while group := list(islice(batches, self.window)):
            own = {name: sum(count(batch) for batch in group) for name, count in self.own_counts.items()}
            window = Window(sum((batch.counts for batch in group), Counts()), own)
            for batch in group:
                self._note(batch)
                self._done += 1
                if self.seen >= ENOUGH or self._done >= last:
                    self.judge()
                yield replace(batch, window=window)

    def state_dict(self) -> dict[str, Any]:
        """Epoch, number of batches that were trained on, and the identity of the plan."""
        return self.batch_sampler.state_dict(self._done if self.resumes_at is None else self.resumes_at(self._done))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken.

        Raises:
            ValueError: as `BatchPlan.load_state_dict`, when the order of samples could not be the same.
        """
        self.batch_sampler.load_state_dict(state)
        self._done = self.batch_sampler.start

    def _note(self, batch: Batch) -> None:
        dropped = [sample for sample in batch.bad if sample.dropped]
        self.seen += len(batch.samples) + len(dropped)
        faulty = [sample for sample in dropped if sample.faulty]
        self._faulty += faulty
        self._denied += len(dropped) - len(faulty)
        for sample in batch.bad:
            self.bad[sample.source, sample.reason] += 1
        if self.log is not None and batch.bad:
            self._list(self.log, batch.bad)
        if faulty and self.bad_samples.action == "fail":
            sample = faulty[0]
            raise ValueError(
                f"sample '{sample.id}' of source '{sample.source}' cannot be used: {sample.reason}: {sample.detail}. "
                "data.bad_samples.action skip would leave such samples out"
            )

    def _list(self, file: Path, bad: Sequence[BadSample]) -> None:
        """Add samples to the file of bad ones; that it cannot be written is warned of once, and ends nothing."""
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("a", encoding="utf-8") as lines:
                lines.writelines(json.dumps(sample._asdict()) + "\n" for sample in bad)
        except OSError as error:
            if not self._unlisted:
                logger.warning("%s cannot be written, and samples are missing in it: %s", file, error)
            self._unlisted = True

    def judge(self) -> None:
        """Stop the run if too many of its samples cannot be used.

        Raises:
            ValueError: naming the reasons and the last samples, when their share is above `bad_samples.max_share`; or
                when all samples are denied.
        """
        total, judged = len(self._faulty), self.seen - self._denied
        if self.seen and not judged:
            raise ValueError(
                f"all of {self.seen} samples are denied, by the deny-lists of their sources: there is nothing to train "
                "on" + (f". They are listed in {self.log}" if self.log else "")
            )
        if total > self.bad_samples.max_share * judged:
            reasons = Counter[str]()
            for (source, reason), count in self.bad.items():
                reasons[f"{reason} in {source}"] += count
            examples = "; ".join(f"{s.id} ({s.source}): {s.reason}: {s.detail}" for s in self._faulty[-3:])
            raise ValueError(
                f"{total} of {judged} samples cannot be used, more than data.bad_samples.max_share "
                f"{self.bad_samples.max_share}: {dict(reasons)}. The last: {examples}"
                + (f". All are listed in {self.log}" if self.log else "")
            )


def assemble(placed: Sequence[Placed], collate: Collate) -> Batch:
    """Make a batch in a worker: samples are gathered by row, bad ones are listed."""
    rows: dict[int, list[Sample]] = {}
    for row, items in placed:
        if not isinstance(items, BadSample):
            rows.setdefault(row, []).extend(items)
    return collate(list(rows.values()), [items for _, items in placed if isinstance(items, BadSample)])
