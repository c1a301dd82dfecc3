"""The first pass: every record is read once, its pictures are decoded once, and all measures are taken of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from lit_vlm.core.written import write_whole
from lit_vlm.data.curation.device import DeviceMeasure
from lit_vlm.data.curation.step import Measure, Sample, identity
from lit_vlm.data.curation.table import RECORD_SCHEMA, RECORDS, Table, file_of, schema_of, to_arrow
from lit_vlm.data.records import RecordError, Videos
from lit_vlm.data.sets.convert import BLOCK, BLOCKS_WANTED, SMALLEST
from lit_vlm.data.sets.engine import HERE, Engine, paths_of
from lit_vlm.data.sets.parallel import Block, blocks_of
from lit_vlm.data.sets.shards import block_folder, claim
from lit_vlm.data.sets.shared import finish_once, run_blocks, run_models
from lit_vlm.data.sets.writer import verified
from lit_vlm.data.sources.base import Source

BATCH = 64
"""Most records that measures see at once."""
BATCH_PIXELS = 1 << 26
"""Pixels of decoded pictures after which a batch ends: 200 MB."""
DONE = "measures.json"
"""File that says which measures a folder holds; it is written last."""
VERSION = 1


@dataclass(frozen=True)
class _Batch:
    """A batch of records as a process that decodes leaves it.

    Attributes:
        read: which of them could be read: `[n]`.
        rows: number of rows of each measure.
        values: of each measure, what `DeviceMeasure.ready` gave, or its columns; None without rows.
    """

    read: NDArray[np.bool_]
    rows: tuple[int, ...]
    values: tuple[Any, ...]


@dataclass(frozen=True)
class _Reader(Dataset[tuple[dict[str, list[Any]], list[_Batch]]]):
    """A block's records in pieces of `BATCH`: their rows of `records.parquet`, and what is measured of them.

    Attributes:
        sources: the sources, one after the other.
        measures: what is measured.
        block: which records.
    """

    sources: tuple[Source, ...]
    measures: tuple[Measure, ...]
    block: Block

    def __len__(self) -> int:
        return -(-(self.block.end - self.block.start) // BATCH)

    def __getitem__(self, piece: int) -> tuple[dict[str, list[Any]], list[_Batch]]:
        start = self.block.start + piece * BATCH
        rows: dict[str, list[Any]] = {name: [] for name in RECORD_SCHEMA.names}
        entries = self._entries(range(start, min(start + BATCH, self.block.end)), rows)
        return rows, [self._ready(batch) for batch in _batches(entries)]

    def _ready(self, batch: Sequence[Sample | None]) -> _Batch:
        samples = [sample for sample in batch if sample is not None]
        pictures = sum(len(sample.pictures) for sample in samples)
        counts = tuple(len(samples) if measure.level == "record" else pictures for measure in self.measures)
        values = [
            None if not count else measure.ready(samples) if isinstance(measure, DeviceMeasure) else measure(samples)
            for measure, count in zip(self.measures, counts, strict=True)
        ]
        return _Batch(np.array([sample is not None for sample in batch]), counts, tuple(values))

    def _entries(self, indices: Sequence[int], rows: dict[str, list[Any]]) -> Iterator[tuple[int, Sample | None]]:
        """(number of the source, the record or None where it cannot be read); each leaves a row in `rows`."""
        ends = np.cumsum([len(source) for source in self.sources])
        for index in indices:
            which = int(np.searchsorted(ends, index, side="right"))
            local = index - int(ends[which]) + len(self.sources[which])
            name, reason, detail, sample = str(local), "", "", None
            try:
                record = self.sources[which].record(local)
                name = record.id
                with Videos() as videos:
                    read = [verified(image, self.sources[which].image_folder, videos=videos) for image in record.images]
                sample = Sample(record, tuple(content for content, _ in read), tuple(picture for _, picture in read))
            except RecordError as error:
                reason, detail = error.reason, error.detail
            pictures = len(sample.pictures) if sample is not None else 0
            for key, value in zip(RECORD_SCHEMA.names, (which, name, pictures, reason, detail), strict=True):
                rows[key].append(value)
            yield which, sample


@dataclass(frozen=True)
class _MeasureBlock:
    """Measures one block of the records of all sources, and writes a file for each measure.

    Attributes:
        sources: the sources, one after the other.
        measures: what is measured.
        readers: processes that decode while this one computes; 0 decodes in this one.
    """

    sources: tuple[Source, ...]
    measures: tuple[Measure, ...]
    readers: int

    def on(self, device: str) -> _MeasureBlock:
        """The same work with its models on a device (`shared.OpenWork`)."""
        measures = (one.on(device) if isinstance(one, DeviceMeasure) else one for one in self.measures)
        return replace(self, measures=tuple(measures))

    def __call__(self, block: Block, folder: Path) -> dict[str, Any]:
        """Measure a block.

        Returns:
            number of records that cannot be read.
        """
        rows: dict[str, list[Any]] = {name: [] for name in RECORD_SCHEMA.names}
        tables = [[schema_of(measure).empty_table()] for measure in self.measures]
        reader = _Reader(self.sources, self.measures, block)
        readers = min(self.readers, len(reader))
        for own, batches in DataLoader(reader, batch_size=None, num_workers=readers, collate_fn=_as_it_is):
            for name, values in own.items():
                rows[name] += values
            for batch in batches:
                for measure, table, count, value in zip(self.measures, tables, batch.rows, batch.values, strict=True):
                    table.append(_measured(measure, batch.read, count, value))
        pq.write_table(pa.Table.from_pydict(rows, RECORD_SCHEMA), folder / RECORDS)
        for measure, table in zip(self.measures, tables, strict=True):
            pq.write_table(pa.concat_tables(table), folder / file_of(measure))
        return {"unreadable": sum(reason != "" for reason in rows["reason"])}


def _as_it_is(item: Any) -> Any:
    return item


def _measured(measure: Measure, read: NDArray[np.bool_], rows: int, value: Any) -> pa.Table:
    """The rows of a batch; those of records that cannot be read are zeros."""
    found = _blank(measure, 0) if value is None else value
    if isinstance(measure, DeviceMeasure) and value is not None:
        found = measure.compute(value)
    table = to_arrow(measure, found, rows)
    if measure.level == "picture" or read.all():
        return table
    table = pa.concat_tables([table, to_arrow(measure, _blank(measure, 1), 1)]).combine_chunks()
    return table.take(pa.array(np.where(read, np.cumsum(read) - 1, rows)))


def _blank(measure: Measure, rows: int) -> dict[str, NDArray[Any]]:
    return {name: np.zeros((rows, *np.dtype(k).shape), np.dtype(k).base) for name, k in measure.columns.items()}


def _batches(entries: Iterator[tuple[int, Sample | None]]) -> Iterator[list[Sample | None]]:
    """Groups of entries of one source that follow each other."""
    batch: list[Sample | None] = []
    pixels, source = 0, -1
    for which, sample in entries:
        if batch and (which != source or len(batch) == BATCH or pixels >= BATCH_PIXELS):
            yield batch
            batch, pixels = [], 0
        source = which
        batch.append(sample)
        pixels += sum(picture.width * picture.height for picture in sample.pictures) if sample is not None else 0
    if batch:
        yield batch


def measured(sources: Sequence[Source], measures: Sequence[Measure], folder: Path, engine: Engine = HERE) -> Table:
    """Measure all records of sources; what a folder holds already is not measured again.

    Args:
        sources: the sources, whose names differ.
        measures: what is measured; equal ones once.
        folder: holds the measures of any sources: a folder for each list of sources, and in it one for each group of
            measures that were taken together.
        engine: starts the workers.

    Raises:
        ValueError: when a measure raises it, gives what it did not announce, or the folder holds something else.
    """
    wanted = {measure.key: measure for measure in measures}
    names = [source.name for source in sources]
    described = [identity(source) for source in sources]
    home = folder / _hash(described)
    held = _held(home)
    missing = [wanted[key] for key in sorted(wanted) if key not in held]
    if missing or not held:
        group = home / _hash([measure.key for measure in missing])
        _measure(tuple(sources), described, tuple(missing), group, engine)
        held = _held(home)
    # Of all groups of these sources any holds the same records.
    first = min(home.glob(f"*/{DONE}")).parent
    return Table(names, first, {key: held[key] for key in wanted})


def _measure(
    sources: tuple[Source, ...],
    described: Sequence[str],
    measures: tuple[Measure, ...],
    out: Path,
    engine: Engine,
) -> None:
    total = sum(len(source) for source in sources)
    plan = {"version": VERSION, "sources": list(described), "measures": [identity(measure) for measure in measures]}
    size = claim(out, plan, max(SMALLEST, min(BLOCK, -(-total // BLOCKS_WANTED))))
    blocks = blocks_of(total, size)
    if not (out / DONE).is_file():
        title = f"measuring {', '.join(source.name for source in sources)}"
        if any(isinstance(measure, DeviceMeasure) for measure in measures):
            # Each device has a process that holds the model, and the workers decode for it.
            work = _MeasureBlock(sources, measures, engine.readers)
            run_models(blocks, work.on, out, title, engine, paths_of(*sources))
        else:
            run_blocks(blocks, _MeasureBlock(sources, measures, 0), out, title, engine, paths_of(*sources))
    finish_once(out, DONE, lambda: _merge(blocks, measures, out))


def _merge(blocks: Sequence[Block], measures: Sequence[Measure], out: Path) -> None:
    made: dict[str, Callable[[], pa.Schema]] = {RECORDS: lambda: RECORD_SCHEMA}
    made |= {file_of(measure): partial(schema_of, measure) for measure in measures}
    for name, schema in made.items():
        files = [block_folder(out, block.index) / name for block in blocks]
        # The blocks say it: to ask a measure could load its model.
        write_whole(out / name, _joined(files, pq.read_schema(files[0]) if files else schema()))
    keys = {measure.key: file_of(measure) for measure in measures}
    write_whole(out / DONE, json.dumps({"version": VERSION, "measures": keys}, indent=1) + "\n")


def _joined(files: Sequence[Path], schema: pa.Schema) -> Callable[[Path], None]:
    """Writes the rows of all files to one, a row group for each file."""

    def write(target: Path) -> None:
        with pq.ParquetWriter(target, schema) as writer:
            for file in files:
                writer.write_table(pq.read_table(file, schema=schema), row_group_size=1 << 20)

    return write


def _held(home: Path) -> dict[str, Path]:
    """Key of each measure that is there → its file."""
    found: dict[str, Path] = {}
    for done in sorted(home.glob(f"*/{DONE}")):
        for key, name in json.loads(done.read_text(encoding="utf-8"))["measures"].items():
            found.setdefault(key, done.parent / name)
    return found


def _hash(parts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(parts)).encode()).hexdigest()[:16]
