"""Scans: one or several integers for every record of a source, found once and kept in the cache folder."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lit_vlm.core.cache import cache_dir, held
from lit_vlm.data.records import Record, RecordError
from lit_vlm.data.sets.engine import HERE, Engine, paths_of
from lit_vlm.data.sets.parallel import Block, blocks_of, map_blocks
from lit_vlm.data.sources.base import Source, describe

BLOCK = 2048
UNUSABLE = -1
"""The value in all columns of a record that cannot be read."""

Measure = Callable[[Record, Source], Sequence[int]]
"""(record, its source) → integers; raises `RecordError` for a record that cannot be used."""


@dataclass(frozen=True)
class _ScanBlock:
    source: Source
    measure: Measure
    columns: int
    indices: NDArray[np.int64] | range

    def __call__(self, block: Block) -> NDArray[np.int64]:
        found = np.full((block.end - block.start, self.columns), UNUSABLE, np.int64)
        for line, index in enumerate(self.indices[block.start : block.end]):
            try:
                found[line] = self.measure(self.source.outline(int(index)), self.source)
            except RecordError:
                continue  # it will be counted and listed when it is met in training
        return found


def scan(
    source: Source,
    measure: Measure,
    columns: int,
    key: str,
    engine: Engine = HERE,
    title: str = "measuring",
    ids: bool = False,
) -> NDArray[np.int64]:
    """Measure every record of a source.

    Args:
        source: the source, whose outlines are read.
        measure: gives `columns` integers for a record.
        columns: number of integers per record.
        key: what the result depends on besides the source's content, as text.
        engine: starts the workers, if there is more than a block.
        title: of the progress bar.
        ids: whether the measure reads ids, so that records that differ in nothing else (`Source.repeats`) are measured
            one by one.

    Returns:
        `[n, columns]`; -1 where a record cannot be used. It lies in the kept file, not in memory, and is read-only.
    """
    identity = f"{describe(source)} {source.fingerprint()} {key}"
    file = cache_dir() / "scans" / f"{hashlib.sha256(identity.encode()).hexdigest()[:24]}.npy"
    file.parent.mkdir(parents=True, exist_ok=True)
    if (kept := _kept(file, len(source), columns)) is not None:
        return kept
    # The first process of those that share the cache measures, the others wait for its file.
    with held(file.with_suffix(".lease"), f"measures {source.name}"):
        if (kept := _kept(file, len(source), columns)) is not None:
            return kept
        first = None if ids else source.repeats()
        indices = range(len(source)) if first is None else np.unique(first)
        work = _ScanBlock(source, measure, columns, indices)
        blocks = blocks_of(len(indices), BLOCK)
        found = np.empty((len(indices), columns), np.int64)
        used = engine if len(blocks) > 1 else HERE
        parts = map_blocks(blocks, work, used, f"{title} {source.name}", paths_of(source))
        for block, part in zip(blocks, parts, strict=True):
            found[block.start : block.end] = part
        if first is not None:
            found = found[np.searchsorted(indices, first)]
        scratch = file.with_suffix(f".{uuid.uuid4().hex}.partial.npy")
        np.save(scratch, found)
        scratch.replace(file)
    return np.load(file, mmap_mode="r")


def _kept(file: Path, records: int, columns: int) -> NDArray[np.int64] | None:
    """What was measured before; None if it was not."""
    if not file.is_file():
        return None
    found: NDArray[np.int64] = np.load(file, mmap_mode="r")
    return found if found.shape == (records, columns) else None


def id_value(record: Record, source: Source) -> tuple[int]:
    """`id_hash` of the record id, as a measure."""
    return (id_hash(record.id),)


def id_hash(identity: str) -> int:
    """62 bits of a hash of a record id, the same on every machine."""
    content = identity.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") >> 2


def modality_length(record: Record, source: Source) -> tuple[int]:
    """Words of a record, at least one, negative when it has no image: what LLaVA groups samples by."""
    words = sum(len(message.text.split()) for message in record.messages) + len(record.images)
    return (max(1, words) * (1 if record.images else -1),)
