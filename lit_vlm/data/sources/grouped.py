"""A source that joins several records of another to one."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lit_vlm.data.records import Message, Record
from lit_vlm.data.sources.base import Source


class Grouped(Source):
    """Consecutive captions of a source, drawn together and each a sequence of its own: VILA takes COYO four at a time.

    So a sample of captions has about as many pictures as one of interleaved documents. Each answer becomes a document:
    its pictures, its text and the end of the sequence, without question and template (VILA, release 1.0). The
    sequences of a group stand in one row and do not see each other. Records at the end of the source that fill no group
    are not used.

    Args:
        source: a source of captions (a question about pictures, and an answer) or of documents.
        size: records of a group.
        name: name of the source; default: that of the source that is grouped.

    Raises:
        ValueError: for a size below 1, or a source with fewer records than `size`.
    """

    def __init__(self, source: Source, size: int = 4, name: str | None = None) -> None:
        if size < 1 or len(source) < size:
            raise ValueError(f"Grouped: size is {size}, and the source {source.name} has {len(source)} samples")
        self.source, self.size, self.name = source, size, name if name is not None else source.name
        self.named = source.named if name is None else True
        self.path, self.image_folder = source.path, source.image_folder
        self._prefix = self.name  # ids stay as they are when a source is renamed
        self.chunked, self.provenance, self.captions = source.chunked, source.provenance, source.captions

    def __len__(self) -> int:
        return len(self.source) // self.size

    def record(self, index: int) -> Record:
        """The documents of one group as one record.

        Raises:
            RecordError: as the source, when any record of the group cannot be read.
        """
        return self._join(index, [self.source.record(i) for i in self._members(index)])

    def outline(self, index: int) -> Record:
        """The record of one group without the bytes of its images.

        Raises:
            RecordError: as the source, when any record of the group cannot be read.
        """
        return self._join(index, [self.source.outline(i) for i in self._members(index)])

    def places(self) -> list[Path | str]:
        """Those of the source."""
        return self.source.places()

    def shuffled(self, generator: np.random.Generator) -> NDArray[np.int64]:
        """All groups in random order, `[n]`; for a chunked source in the order of its own `shuffled`."""
        if not self.chunked:
            return generator.permutation(len(self))
        groups = self.source.shuffled(generator) // self.size
        _, first = np.unique(groups[groups < len(self)], return_index=True)
        return groups[groups < len(self)][np.sort(first)]

    def fingerprint(self) -> str:
        """A hash of the source's fingerprint and the size."""
        return hashlib.sha256(f"{self.source.fingerprint()} {self.size}".encode()).hexdigest()[:16]

    def _members(self, index: int) -> range:
        return range(index * self.size, (index + 1) * self.size)

    def _join(self, index: int, records: list[Record]) -> Record:
        documents = tuple(_document(record) for record in records)
        urls = tuple(url for record in records for url in record.urls)
        earlier = tuple(message for record in records for message in record.earlier)
        return Record(f"{self._prefix}-{index}", self.name, documents, urls=urls, earlier=earlier)


def _document(record: Record) -> Message:
    answer = record.messages[-1].content
    return Message("document", (*(image for image in record.images if image not in answer), *answer))
