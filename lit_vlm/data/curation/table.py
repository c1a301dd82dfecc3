"""The columns of measured records: how they lie in parquet files, and how steps read them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from lit_vlm.data.curation.step import Measure

RECORDS = "records.parquet"
"""File with a row per record: its source, id, number of pictures, and why it cannot be read (`reason`, `detail`)."""
RECORD_SCHEMA = pa.schema(
    [
        ("source", pa.int32()),
        ("id", pa.string()),
        ("pictures", pa.int32()),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)


def file_of(measure: Measure) -> str:
    """Name of the file that holds the columns of a measure."""
    return f"{type(measure).__name__}-{measure.key}.parquet"


def schema_of(measure: Measure) -> pa.Schema:
    """The types of a measure's columns in parquet."""
    return pa.schema([(name, _arrow_type(np.dtype(kind))) for name, kind in measure.columns.items()])


def _arrow_type(kind: np.dtype[Any]) -> pa.DataType:
    if len(kind.shape) > 1:
        raise ValueError(f"a column holds numbers, words or vectors, and no arrays of the shape {list(kind.shape)}")
    if kind.subdtype is not None:
        return pa.list_(_arrow_type(kind.base), kind.shape[0])
    return pa.string() if kind.kind == "U" else pa.from_numpy_dtype(kind)


def _kind_of(stored: pa.DataType) -> np.dtype[Any]:
    """The type of a column by its file: to ask the measure could load a model."""
    if pa.types.is_fixed_size_list(stored):
        return np.dtype((stored.value_type.to_pandas_dtype(), (stored.list_size,)))
    return np.dtype(str) if pa.types.is_string(stored) else np.dtype(stored.to_pandas_dtype())


def to_arrow(measure: Measure, values: Mapping[str, NDArray[Any]], rows: int) -> pa.Table:
    """What a measure gave for a batch, as a table.

    Args:
        measure: the measure.
        values: name → `[rows, ...]`.
        rows: number of records or pictures of the batch.

    Raises:
        ValueError: for columns, shapes or types that the measure did not announce.
    """
    kind = type(measure).__name__
    if set(values) != set(measure.columns):
        raise ValueError(f"{kind} gives the columns {sorted(values)}, and announces {sorted(measure.columns)}")
    arrays = []
    for name, announced in measure.columns.items():
        wanted, found = np.dtype(announced), np.asarray(values[name])
        if found.shape != (rows, *wanted.shape) or not np.can_cast(found.dtype, wanted.base, "same_kind"):
            raise ValueError(
                f"{kind}: the column '{name}' is {found.dtype} {list(found.shape)}; announced is {wanted.base} "
                f"{[rows, *wanted.shape]}"
            )
        arrays.append(_to_array(found.astype(wanted.base), wanted))
    return pa.Table.from_arrays(arrays, schema=schema_of(measure))


def _to_array(values: NDArray[Any], kind: np.dtype[Any]) -> pa.Array:
    if kind.subdtype is None:
        return pa.array(values, _arrow_type(kind))
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), kind.shape[0])


def _from_array(array: pa.Array, kind: np.dtype[Any]) -> NDArray[Any]:
    if kind.subdtype is not None:
        return array.flatten().to_numpy(zero_copy_only=False).reshape(-1, *kind.shape)
    found = array.to_numpy(zero_copy_only=False)
    return found.astype(kind) if kind.kind == "U" else found


class Table:
    """Measured records, read from the files of a folder as columns are asked for; it is a `step.Measured`.

    Args:
        names: of the sources.
        folder: where `records.parquet` lies.
        files: key of each measure → its file.
    """

    def __init__(self, names: Sequence[str], folder: Path, files: Mapping[str, Path]) -> None:
        self.names: Sequence[str] = tuple(names)
        self.folder = folder
        self._files = dict(files)
        rows = pq.read_table(folder / RECORDS, columns=["source", "pictures", "reason"])
        self.source: NDArray[np.int64] = rows["source"].to_numpy().astype(np.int64)
        self.offsets: NDArray[np.int64] = np.concatenate([[0], np.cumsum(rows["pictures"].to_numpy(), dtype=np.int64)])
        self.readable = np.flatnonzero(pc.equal(rows["reason"], "").to_numpy(zero_copy_only=False))

    def __len__(self) -> int:
        return len(self.source)

    def column(self, measure: Measure, name: str) -> NDArray[Any]:
        """A whole column: `[n, ...]` for measures of records, `[p, ...]` for those of pictures."""
        pieces = [piece for _, piece in self.pieces(measure, name)]
        kind = _kind_of(pq.read_schema(self._files[measure.key]).field(name).type)
        return np.concatenate(pieces) if pieces else np.zeros((0, *kind.shape), kind.base)

    def pieces(self, measure: Measure, name: str) -> Iterator[tuple[int, NDArray[Any]]]:
        """(number of its first row, rows) of a column in order, for columns that memory does not hold."""
        start = 0
        with pq.ParquetFile(self._files[measure.key]) as file:
            kind = _kind_of(file.schema_arrow.field(name).type)
            for group in range(file.num_row_groups):
                array = file.read_row_group(group, [name]).column(0).combine_chunks()
                yield start, _from_array(array, kind)
                start += len(array)

    def ids(self, indices: NDArray[np.int64]) -> list[str]:
        """Ids of records."""
        found: dict[int, str] = {}
        wanted = np.unique(indices)
        for start, rows in self.rows():
            inside = wanted[np.searchsorted(wanted, start) : np.searchsorted(wanted, start + len(rows))]
            taken = rows["id"].take(pa.array(inside - start)).to_pylist() if len(inside) else []
            found |= dict(zip(inside.tolist(), taken, strict=True))
        return [found[index] for index in np.asarray(indices).tolist()]

    def rows(self) -> Iterator[tuple[int, pa.Table]]:
        """(number of its first record, rows of `records.parquet`), in order."""
        start = 0
        with pq.ParquetFile(self.folder / RECORDS) as file:
            for group in range(file.num_row_groups):
                rows = file.read_row_group(group)
                yield start, rows
                start += len(rows)


def of_records(
    table: Any, values: NDArray[Any], candidates: NDArray[np.int64], join: np.ufunc, empty: float
) -> NDArray[np.float64]:
    """Join the values of each candidate's pictures.

    Args:
        table: a `step.Measured`.
        values: one number per picture: `[p]`.
        candidates: numbers of records: `[c]`.
        join: such as `np.minimum`.
        empty: the value of a record without pictures.

    Returns:
        `[c]`.
    """
    starts, ends = table.offsets[candidates], table.offsets[candidates + 1]
    held = ends > starts
    found = np.full(len(candidates), empty, np.float64)
    if held.any():
        # Between two candidates lie pictures of others: every second sum is of those, and left out.
        bounds = np.stack([starts[held], ends[held]], axis=1).reshape(-1)
        padded = np.append(values.astype(np.float64), empty)
        found[held] = join.reduceat(padded, bounds)[::2]
    return found
