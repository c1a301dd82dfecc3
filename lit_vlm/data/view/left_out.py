"""What was left out of a set or a run: `bad_samples.jsonl` of conversions and runs, `dropped.parquet` of curations."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lit_vlm.data.sources.base import FileLines

BAD = "bad_samples.jsonl"
DROPPED = "dropped.parquet"


class LeftOut(NamedTuple):
    """A record that was left out, or cut.

    Attributes:
        id: its id, or its index where it could not be read.
        source: name of its source.
        reason: the short code that it is counted by.
        detail: what was found.
    """

    id: str
    source: str
    reason: str
    detail: str


class LeftOuts:
    """All that files list, in order.

    Args:
        files: .jsonl files of `BadSample`, and parquet files with the columns source, id, step, reason, value, detail.

    Raises:
        ValueError: for a file that is neither; names it, and the line.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._entries: list[LeftOut] = []
        for file in files:
            if not file.is_file():
                raise ValueError(f"there is no {file}")
            self._entries += _of_parquet(file) if file.suffix == ".parquet" else _of_lines(file)
        self.reasons = Counter(entry.reason for entry in self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, reason: str, text: str, start: int, limit: int) -> tuple[list[LeftOut], int | None]:
        """Entries of a reason ("" for any) with a text, from a place on; and the next place, None at the end.

        Args:
            reason: the reason; "" for any.
            text: part of id or detail, in any case; "" for any.
            start: number of the first entry that is looked at.
            limit: most entries.
        """
        found: list[LeftOut] = []
        wanted = text.casefold()
        for number in range(start, len(self)):
            entry = self._entries[number]
            if reason in ("", entry.reason) and wanted in f"{entry.id}\n{entry.detail}".casefold():
                if len(found) == limit:
                    return found, number
                found.append(entry)
        return found, None


def beside(path: str) -> list[Path]:
    """The files in the folder of a set that say what was left out of it."""
    return [file for file in (Path(path) / BAD, Path(path) / DROPPED) if file.is_file()]


def _of_lines(file: Path) -> list[LeftOut]:
    entries = []
    lines = FileLines([file])
    for number in range(len(lines)):
        try:
            row = json.loads(lines[number])
            entries.append(LeftOut(*(str(row[key]) for key in LeftOut._fields)))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{file}, entry {number + 1}: expected an object with {', '.join(LeftOut._fields)}"
            ) from error
    return entries


def _of_parquet(file: Path) -> list[LeftOut]:
    import pyarrow.parquet as pq

    columns = ("id", "source", "step", "reason", "detail", "value")
    try:
        rows = pq.read_table(file, columns=list(columns)).to_pylist()
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} does not say what was dropped: {error}") from error
    return [LeftOut(row["id"], row["source"], f"{row['step']}: {row['reason']}", _detail(row)) for row in rows]


def _detail(row: dict[str, object]) -> str:
    value = row["value"]
    number = f"{value:.4g}" if isinstance(value, float) and value == value else ""
    return " · ".join(part for part in (number, str(row["detail"] or "")) if part)
