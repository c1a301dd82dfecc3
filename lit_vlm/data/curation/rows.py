"""Rows of picture columns that belong to candidates."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lit_vlm.data.curation.step import Measure, Measured


def picture_rows(table: Measured, records: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Numbers of the records' pictures in order, and the place of each one's record in `records`: `[p]`, `[p]`."""
    counts = table.offsets[records + 1] - table.offsets[records]
    owners = np.repeat(np.arange(len(records)), counts)
    first = np.cumsum(counts) - counts
    return table.offsets[records][owners] + np.arange(len(owners)) - first[owners], owners


def chosen_pieces(
    table: Measured, measure: Measure, name: str, rows: NDArray[np.int64]
) -> Iterator[tuple[slice, NDArray[Any]]]:
    """Some rows of a column, piece by piece.

    Args:
        table: the table.
        measure: what the column is of.
        name: the column.
        rows: ascending numbers of rows: `[r]`.

    Yields:
        which of `rows` these are, and their values.
    """
    for start, piece in table.pieces(measure, name):
        own = slice(*np.searchsorted(rows, (start, start + len(piece))).tolist())
        if own.stop > own.start:
            yield own, piece[rows[own] - start]
