"""Held-out data: a share of a source by a hash of the record id, so that it stays the same whatever is added."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from lit_vlm.data.records import Record
from lit_vlm.data.sets.scan import id_value, scan
from lit_vlm.data.sources.base import Source


class Subset(Source):
    """Some records of a source, under its name.

    Args:
        parent: whose records these are.
        indices: `[n]`, which of them, in order.
    """

    def __init__(self, parent: Source, indices: NDArray[np.int64]) -> None:
        self.parent, self.indices = parent, indices
        self.name, self.named, self.path = parent.name, parent.named, parent.path
        self.image_folder, self.chunked = parent.image_folder, parent.chunked

    def __len__(self) -> int:
        return len(self.indices)

    def record(self, index: int) -> Record:
        """One record of the parent."""
        return self.parent.record(int(self.indices[index]))

    def outline(self, index: int) -> Record:
        """The same without image bytes."""
        return self.parent.outline(int(self.indices[index]))

    def shuffled(self, generator: np.random.Generator) -> NDArray[np.int64]:
        """In the parent's shuffled order."""
        own = np.full(len(self.parent), -1, np.int64)
        own[self.indices] = np.arange(len(self.indices))
        order = own[self.parent.shuffled(generator)]
        return order[order >= 0]

    def fingerprint(self) -> str:
        """A hash of the parent's and of the choice."""
        return hashlib.sha256(self.parent.fingerprint().encode() + self.indices.tobytes()).hexdigest()[:16]


def split(source: Source, share: float, workers: int = 0) -> tuple[Subset, Subset]:
    """What is trained on, and what is held out.

    Args:
        source: is read once for its ids; the result is kept in the cache folder.
        share: held out, 0 to 1.
        workers: processes.
    """
    values = scan(source, id_value, 1, "id", workers, "ids of")[:, 0]
    # A record that cannot be read has no id; it stays in training, where it is counted and listed.
    held_out = (values >= 0) & (values < share * 2.0**62)
    return Subset(source, np.flatnonzero(~held_out)), Subset(source, np.flatnonzero(held_out))
