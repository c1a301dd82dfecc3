"""Items of a LitData set by their index, however many shards it has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from litdata import StreamingDataset
from litdata.exceptions import ChunkWaitTimeoutError
from litdata.streaming.sampler import ChunkedIndex

from lit_vlm.data.records.json_files import read_json
from lit_vlm.data.sources.node_cache import NodeCache

INDEX = "index.json"


class ShardReader:
    """LitData's reader over a folder, for one process: open files are not shared with forked workers.

    LitData looks through all shards for that of an item, which takes milliseconds where there are tens of thousands; so
    it is found here.

    Args:
        folder: folder of the set on this node.
        cache: fetches the shards of a set in a bucket into the folder; None where they are all there.
        part: path of the folder below the address that the cache reads, or empty.
    """

    def __init__(self, folder: Path, cache: NodeCache | None = None, part: str = "") -> None:
        self.cache, self.part = cache, f"{part}/" if part else ""
        if cache is not None:
            folder = cache.file(self.part + INDEX).parent
        self._stream = StreamingDataset(str(folder), shuffle=False)
        self._chunks = read_json(folder / INDEX)["chunks"]
        self._ends = np.cumsum([chunk["chunk_size"] for chunk in self._chunks])

    def __getitem__(self, index: int) -> dict[str, Any]:
        """An item.

        Raises:
            IndexError: when there is none of this index.
            ValueError: as `NodeCache.file`.
        """
        if not 0 <= index < self._ends[-1]:
            raise IndexError(f"{index} of {self._ends[-1]} items")
        chunk = int(np.searchsorted(self._ends, index, side="right"))
        place = ChunkedIndex(int(index), chunk)
        if self.cache is None:
            return self._read(place)
        self.cache.file(self.part + self._chunks[chunk]["filename"], self._chunks[chunk]["chunk_bytes"])
        try:
            return self._read(place)
        except (FileNotFoundError, ChunkWaitTimeoutError):  # another process made room meanwhile
            self.cache.file(self.part + self._chunks[chunk]["filename"], self._chunks[chunk]["chunk_bytes"])
            return self._read(place)

    def _read(self, place: ChunkedIndex) -> dict[str, Any]:
        item: dict[str, Any] = self._stream[place]
        return item
