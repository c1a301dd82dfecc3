"""The records of several sources end to end, and what is known of each: found when it is first asked for, and kept."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lit_vlm.data.records import Record, RecordError
from lit_vlm.data.sample.encode import Sample, SampleEncoder
from lit_vlm.data.sources.base import Source
from lit_vlm.data.view.measures import Measures

COUNTED = ("words", "pictures", "positions")
"""What is counted of every record; positions only for a model."""


class Looked(NamedTuple):
    """A record without the bytes of its pictures, or why it cannot be used.

    Attributes:
        record: the record; None where its source cannot read it.
        error: why it cannot be used; None where it can.
    """

    record: Record | None
    error: RecordError | None


class Records:
    """All records, for several threads at a time.

    Args:
        sources: the sources, whose names differ.
        encode: a model's encoder of samples, which counts positions and finds what the model cannot use.
        measures: what a curation measured of the records.
    """

    def __init__(
        self, sources: Sequence[Source], encode: SampleEncoder | None = None, measures: Measures | None = None
    ):
        self.sources, self.encode = list(sources), encode
        self.measures = Measures() if measures is None else measures
        self._ends = list(accumulate(len(source) for source in self.sources))
        self._lock = threading.RLock()  # neither open files nor tokenizers are made for several threads
        self.reasons: list[str] = [""]
        # Zeros take no memory until a record is looked at.
        self.known = np.zeros(len(self), bool)
        self.counts = np.zeros((len(self), len(COUNTED)), np.int32)
        self.reason = np.zeros(len(self), np.int16)
        self.row = np.zeros(len(self) if self.measures else 0, np.int64)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def span(self, name: str) -> tuple[int, int]:
        """First index and end of a source's records; raises ValueError for an unknown name."""
        names = [source.name for source in self.sources]
        if name not in names:
            raise ValueError(f"there is no source '{name}': there are {', '.join(names)}")
        which = names.index(name)
        return self._ends[which] - len(self.sources[which]), self._ends[which]

    def place(self, index: int) -> tuple[Source, int]:
        """The source of a record, and its index there."""
        which = bisect_right(self._ends, index)
        return self.sources[which], index - (self._ends[which - 1] if which else 0)

    def record(self, index: int) -> Record:
        """A record with its pictures; raises `RecordError` as its source."""
        source, local = self.place(index)
        with self._lock:
            return source.record(local)

    def samples(self, index: int, record: Record) -> list[Sample]:
        """What the model gets of a record; nothing without a model.

        Raises:
            RecordError: as `SampleEncoder.sequences`.
        """
        with self._lock:
            folder = self.place(index)[0].image_folder
            return [] if self.encode is None else self.encode.sequences(record, folder)

    def look(self, index: int) -> Looked:
        """Read a record without the bytes of its pictures, and keep what is counted of it."""
        source, local = self.place(index)
        record, error = None, None
        counts = [0] * len(COUNTED)
        with self._lock:
            try:
                record = source.outline(local)
                counts[:2] = sum(len(message.text.split()) for message in record.messages), len(record.images)
                if self.encode is not None:
                    counts[2] = self.encode.measure(record, source)[0]
            except RecordError as found:
                error = found
            self.counts[index] = counts
            self.reason[index] = self._number("" if error is None else error.reason)
            if self.measures and record is not None:
                self.row[index] = self.measures.row_of(record.id)
            elif self.measures:
                self.row[index] = self.measures.NONE
            self.known[index] = True
        return Looked(record, error)

    def _number(self, reason: str) -> int:
        if reason not in self.reasons:
            self.reasons.append(reason)
        return self.reasons.index(reason)

    def values(self, name: str, indices: NDArray[np.int64]) -> NDArray[np.float64]:
        """What is counted or measured of records that were looked at, `[n]`; NaN where it is not known.

        Raises:
            ValueError: for an unknown name.
        """
        if name in COUNTED:
            return self.counts[indices, COUNTED.index(name)].astype(np.float64)
        return self.measures.values(name, self.row[indices])

    def facts(self, index: int) -> Mapping[str, float]:
        """All that is known of a record that was looked at, by name."""
        here = np.array([index])
        names = COUNTED if self.encode is not None else COUNTED[:2]
        found = {name: float(self.values(name, here)[0]) for name in (*names, *self.measures.names)}
        return {name: value for name, value in found.items() if not np.isnan(value)}
