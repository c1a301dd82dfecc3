"""A source of some records of other sources: what a curation kept, as it is written to a set."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lit_vlm.data.records import Content, Image, Record, Videos, image_bytes
from lit_vlm.data.sources.base import Source
from lit_vlm.data.sources.provenance import joined


class Selected(Source):
    """Records of sources by their numbers, where the records of one source come after those of the one before.

    Of several sources, ids have the source's name in front (`laion/000123`), so that they stay unique.

    Args:
        sources: the sources.
        indices: ascending numbers of the records: `[n]`.
        name: name of the source.
    """

    def __init__(self, sources: Sequence[Source], indices: NDArray[np.int64], name: str) -> None:
        self.name, self.image_folder = name, Path()
        self.provenance = joined([source.provenance for source in sources])
        told = {source.name: source.captions for source in sources if source.captions}
        self.captions = sources[0].captions if len(sources) == 1 else told or None
        self._sources, self._indices = tuple(sources), indices
        self._ends = np.cumsum([len(source) for source in sources])

    def __len__(self) -> int:
        return len(self._indices)

    def record(self, index: int) -> Record:
        """The record with the bytes of its pictures.

        Raises:
            RecordError: as its source, and as `image_bytes`.
        """
        which, local = locate(self._ends, int(self._indices[index]))
        source = self._sources[which]
        record = source.record(local)

        def loaded(part: Content, videos: Videos) -> Content:
            return (
                replace(part, data=image_bytes(part, source.image_folder, videos)) if isinstance(part, Image) else part
            )

        with Videos() as videos:
            messages = tuple(
                replace(message, content=tuple(loaded(part, videos) for part in message.content))
                for message in record.messages
            )
        name = record.id if len(self._sources) == 1 else f"{source.name}/{record.id}"
        return replace(record, id=name, messages=messages)

    def places(self) -> list[Path | str]:
        """Those of all sources."""
        return [place for source in self._sources for place in source.places()]

    def fingerprint(self) -> str:
        """A hash of the sources' fingerprints and the numbers, 16 hex digits."""
        digest = hashlib.sha256(" ".join(source.fingerprint() for source in self._sources).encode())
        digest.update(self._indices.astype("<i8").tobytes())
        return digest.hexdigest()[:16]


def locate(ends: NDArray[np.int64], index: int) -> tuple[int, int]:
    """(number of the source, number of the record in it).

    Args:
        ends: number behind the last record of each source: `[s]`.
        index: number of a record over all sources.
    """
    which = int(np.searchsorted(ends, index, side="right"))
    return which, index - (int(ends[which - 1]) if which else 0)
