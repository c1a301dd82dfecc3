"""The second pass: the steps decide, one after the other, on the columns that were measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from lit_vlm.data.curation.step import Step, Verdict
from lit_vlm.data.curation.table import Table

READ = "read"
"""Name under which records are listed that cannot be read."""
DROPPED_SCHEMA = pa.schema(
    [
        ("source", pa.string()),
        ("id", pa.string()),
        ("step", pa.string()),
        ("reason", pa.string()),
        ("value", pa.float64()),
        ("detail", pa.string()),
    ]
)


def title(number: int, step: Step) -> str:
    """Name of a step in tables and files: `2 Text`.

    Args:
        number: from 1.
        step: the step.
    """
    return f"{number} {type(step).__name__}"


@dataclass(frozen=True)
class Decided:
    """What one step did.

    Attributes:
        name: of the step.
        candidates: numbers of the records that came to it: `[c]`.
        verdict: what it said of them.
    """

    name: str
    candidates: NDArray[np.int64]
    verdict: Verdict

    @property
    def kept(self) -> NDArray[np.int64]:
        """Numbers of the records that stay."""
        return self.candidates[self.verdict.codes == 0]

    def counts(self, among: NDArray[np.bool_] | None = None) -> dict[str, Any]:
        """Records that came, were dropped by reason, and stayed.

        Args:
            among: which candidates are counted: `[c]`; None counts all.
        """
        codes = self.verdict.codes if among is None else self.verdict.codes[among]
        found = np.bincount(codes, minlength=1 + len(self.verdict.reasons)).tolist()
        dropped = {reason: count for reason, count in zip(self.verdict.reasons, found[1:], strict=True) if count}
        return {"in": len(codes), "dropped": dropped, "kept": found[0]}


def decide(steps: Sequence[Step], table: Table, against: Sequence[Table | None], seed: int) -> Iterator[Decided]:
    """Yield what each step decides on what the steps before it kept.

    Args:
        steps: the steps.
        table: measures of all records.
        against: for each step, the measures of what it compares with.
        seed: of the curation.

    Raises:
        ValueError: for a step that drops everything, or whose verdict does not fit its candidates.
    """
    candidates = table.readable
    for number, (step, other) in enumerate(zip(steps, against, strict=True), start=1):
        rng = np.random.default_rng([seed, int(step.key, 16)])
        decided = Decided(title(number, step), candidates, step.decide(table, candidates, rng, other))
        _check(decided)
        yield decided
        candidates = decided.kept


def _check(decided: Decided) -> None:
    verdict, count = decided.verdict, len(decided.candidates)
    fits = verdict.codes.shape == verdict.values.shape == (count,) and verdict.codes.min(initial=0) >= 0
    if not fits or verdict.codes.max(initial=0) > len(verdict.reasons):
        raise ValueError(
            f"step {decided.name}: its verdict does not fit {count} candidates and the reasons {verdict.reasons}"
        )
    if len(decided.kept):
        return
    dropped = ", ".join(f"{reason} {number:,}" for reason, number in decided.counts()["dropped"].items())
    raise ValueError(
        f"step {decided.name} drops all {count:,} records that came to it ({dropped}); {told_values(verdict)}: "
        "change its settings; nothing was written"
    )


def spread(verdict: Verdict) -> dict[str, float]:
    """Minimum, median and maximum of the values that are there; empty where there is none."""
    values = verdict.values[~np.isnan(verdict.values)]
    if not len(values):
        return {}
    low, median, high = np.percentile(values, [0, 50, 100]).tolist()
    return {"min": low, "median": median, "max": high}


def told_values(verdict: Verdict) -> str:
    """What the values were like, in words."""
    found = spread(verdict)
    if not found:
        return f"it has no {verdict.label}"
    return f"{verdict.label}: {found['min']:.4g} to {found['max']:.4g}, median {found['median']:.4g}"


class Dropped:
    """Why each record was dropped, collected from the steps and written to a file in the order of records.

    Args:
        table: the measured records.
    """

    def __init__(self, table: Table) -> None:
        self.table = table
        self._step = np.zeros(len(table), np.int16)  # 0: no step dropped it
        self._code = np.zeros(len(table), np.int8)
        self._value = np.full(len(table), np.nan)
        self._steps: list[tuple[str, Verdict]] = []

    def add(self, decided: Decided) -> None:
        """Note what a step dropped."""
        verdict = decided.verdict
        self._steps.append((decided.name, verdict))
        gone = verdict.codes != 0
        where = decided.candidates[gone]
        self._step[where] = len(self._steps)
        self._code[where] = verdict.codes[gone] - 1
        self._value[where] = verdict.values[gone]

    def write(self, file: Path) -> None:
        """Write one row for each record that was dropped or cannot be read."""
        with pq.ParquetWriter(file, DROPPED_SCHEMA) as writer:
            for start, rows in self.table.rows():
                writer.write_table(self._rows(start, rows))

    def _rows(self, start: int, rows: pa.Table) -> pa.Table:
        unread = np.asarray(rows["reason"]) != ""
        gone = np.flatnonzero(unread | (self._step[start : start + len(rows)] > 0))
        found = []
        for index, row in zip((start + gone).tolist(), rows.take(pa.array(gone)).to_pylist(), strict=True):
            entry = {"source": self.table.names[row["source"]], "id": row["id"]}
            if row["reason"]:
                found.append({**entry, "step": READ, "reason": row["reason"], "value": None, "detail": row["detail"]})
            else:
                name, verdict = self._steps[self._step[index] - 1]
                value = float(self._value[index])
                entry |= {"step": name, "reason": verdict.reasons[self._code[index]]}
                shown = None if np.isnan(value) else value
                found.append({**entry, "value": shown, "detail": verdict.details.get(index, "")})
        return pa.Table.from_pylist(found, DROPPED_SCHEMA)
