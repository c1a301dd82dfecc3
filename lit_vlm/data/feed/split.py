"""Held-out data: a share of a source by a hash of the record id, so that it stays the same whatever is added."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lit_vlm.data.records import Record
from lit_vlm.data.sets.engine import Local
from lit_vlm.data.sets.scan import id_value, scan
from lit_vlm.data.sources.base import Source


class Subset(Source):
    """Some records of a source, under its name.

    Args:
        parent: the source that holds the records.
        indices: `[n]`, indices of the records in the parent, in order.
    """

    def __init__(self, parent: Source, indices: NDArray[np.int64]) -> None:
        self.parent, self.indices = parent, indices
        self.name, self.named, self.path = parent.name, parent.named, parent.path
        self.image_folder, self.chunked = parent.image_folder, parent.chunked
        self.provenance = parent.provenance

    def __len__(self) -> int:
        return len(self.indices)

    def record(self, index: int) -> Record:
        """The record at an index of this subset.

        Raises:
            RecordError: as the parent.
        """
        return self.parent.record(int(self.indices[index]))

    def outline(self, index: int) -> Record:
        """The record without the bytes of its images.

        Raises:
            RecordError: as the parent.
        """
        return self.parent.outline(int(self.indices[index]))

    def places(self) -> list[Path | str]:
        """Those of the parent."""
        return self.parent.places()

    def shuffled(self, generator: np.random.Generator) -> NDArray[np.int64]:
        """All indices of the subset in random order, in the order of the parent's `shuffled`."""
        own = np.full(len(self.parent), -1, np.int64)
        own[self.indices] = np.arange(len(self.indices))
        order = own[self.parent.shuffled(generator)]
        return order[order >= 0]

    def fingerprint(self) -> str:
        """A hash of the parent's fingerprint and the indices."""
        return hashlib.sha256(self.parent.fingerprint().encode() + self.indices.tobytes()).hexdigest()[:16]


def split(source: Source, share: float, workers: int = 0) -> tuple[Subset, Subset]:
    """Split a source into records to train on and held-out ones.

    Args:
        source: the source; it is read once for its ids, which are kept in the cache folder.
        share: share of records that is held out, 0 to 1.
        workers: number of processes; 0 works in this one.

    Returns:
        the records to train on, and the held-out ones.
    """
    values = scan(source, id_value, 1, "id", Local(workers), "ids of", ids=True)[:, 0]
    # A record that cannot be read has no id; it stays in training, where it is counted and listed.
    held_out = (values >= 0) & (values < share * 2.0**62)
    return Subset(source, np.flatnonzero(~held_out)), Subset(source, np.flatnonzero(held_out))
