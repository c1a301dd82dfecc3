"""What a curation measured of records: clusters, similarities and other numbers in parquet files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

DONE = "measures.json"
"""File of a folder of measures that are whole."""
ROWS = "records.parquet"
"""File beside it with a row for each record: number of its `source`, `id`, and `pictures`, their number."""


class Measures:
    """Columns of numbers, whose rows are found by the id of a record.

    Args:
        keys: `[n]`, sorted, the key of each row's id.
        columns: name → `[n]` numbers.
    """

    NONE = -1
    """Row of a record that was not measured."""

    def __init__(
        self, keys: NDArray[np.uint64] | None = None, columns: Mapping[str, NDArray[np.float64]] | None = None
    ) -> None:
        keys = np.zeros(0, np.uint64) if keys is None else keys
        self._keys, self._columns = keys, dict(columns or {})

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def names(self) -> Sequence[str]:
        """Names of the columns."""
        return list(self._columns)

    def row_of(self, identity: str) -> int:
        """The row of a record by its id, or `NONE`; in sets of several sources their names stand in front of ids."""
        for name in (identity, identity.partition("/")[2]):
            key = _key(name)
            at = int(np.searchsorted(self._keys, key))
            if at < len(self._keys) and self._keys[at] == key:
                return at
        return self.NONE

    def values(self, name: str, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """The numbers of a column in some rows, `[n]`; NaN where there is none.

        Raises:
            ValueError: for an unknown name.
        """
        if name not in self._columns:
            raise ValueError(f"there is no measure '{name}'")
        if not len(self):
            return np.full(len(rows), np.nan)
        return np.where(rows == self.NONE, np.nan, self._columns[name][rows])


def read_measures(folder: Path) -> Measures:
    """Read the measures of a curation: every `records.parquet` in and below a folder, and the tables beside it.

    A column of numbers has a value per record, or per picture; then that of a record's first picture is taken.
    Embeddings and texts are passed over, and so are ids that several sources have. Columns of one name are told apart
    by the name of their file.

    Raises:
        ValueError: for a folder without such files, or a file that is no parquet file.
    """
    files = [done.with_name(ROWS) for done in sorted(folder.rglob(DONE))] if folder.is_dir() else []
    if not files:
        raise ValueError(f"{folder} holds no measures of lit-vlm data curate: there is no {DONE} in it")
    keys, sources, columns, count = [], [], [], 0
    for file in files:
        table = _read(file, ("source", "id", "pictures"))
        pictures = np.asarray(table["pictures"], np.int64)
        keys.append(np.array([_key(identity) for identity in table["id"]], np.uint64))
        sources.append(np.asarray(table["source"], np.int64))
        columns += [(count, *column) for column in _beside(file, pictures)]
        count += len(pictures)
    titles = [name for _, _, name, _ in columns]
    joined: dict[str, NDArray[np.float64]] = {}
    for start, stem, name, values in columns:
        # Groups of one curation hold the same records, so a name comes once per measure; sets have groups of their own.
        others = {other for _, other, title, _ in columns if title == name and other != stem}
        title = f"{name} ({stem})" if others and titles.count(name) > 1 else name
        whole = joined.setdefault(title, np.full(count, np.nan))
        whole[start : start + len(values)] = values
    return Measures(*_unambiguous(np.concatenate(keys), np.concatenate(sources), joined))


def _unambiguous(
    keys: NDArray[np.uint64], sources: NDArray[np.int64], columns: Mapping[str, NDArray[np.float64]]
) -> tuple[NDArray[np.uint64], dict[str, NDArray[np.float64]]]:
    """A row for each id that one source alone has, with what all rows of it say."""
    unique, inverse = np.unique(keys, return_inverse=True)
    low, high = np.full(len(unique), np.iinfo(np.int64).max), np.full(len(unique), -1)
    np.minimum.at(low, inverse, sources)
    np.maximum.at(high, inverse, sources)
    own = low == high
    joined = {}
    for name, values in columns.items():
        found = np.full(len(unique), np.nan)
        known = np.flatnonzero(~np.isnan(values))[::-1]
        found[inverse[known]] = values[known]  # of several, the first
        joined[name] = found[own]
    return unique[own], joined


def _beside(file: Path, pictures: NDArray[np.int64]) -> Iterator[tuple[str, str, NDArray[np.float64]]]:
    """(name of the file, name of the column, `[n]` values) of the tables beside a file of rows."""
    firsts = np.cumsum(pictures) - pictures
    for other in sorted(file.parent.glob("*.parquet")):
        if other.name == ROWS:
            continue
        for name, values in _read(other).items():
            if len(values) == len(pictures):
                yield other.stem, name, values
            elif len(values) == pictures.sum():
                own = np.full(len(pictures), np.nan)
                own[pictures > 0] = values[firsts[pictures > 0]]
                yield other.stem, name, own


def _read(file: Path, names: Sequence[str] | None = None) -> dict[str, Any]:
    """The named columns, or all columns of numbers, of a parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(file)
        if names is None:
            kinds = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean)
            numbers = [field.name for field in schema if any(kind(field.type) for kind in kinds)]
            table = pq.read_table(file, columns=numbers)
            return {name: table[name].to_numpy().astype(np.float64) for name in numbers}
        if missing := [name for name in names if name not in schema.names]:
            raise ValueError(f"it has no column {', '.join(missing)}")
        table = pq.read_table(file, columns=list(names))
        return {name: table[name].to_pylist() for name in names}
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} holds no measures: {error}") from error


def _key(identity: str) -> np.uint64:
    digest = hashlib.blake2b(identity.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "big"))
