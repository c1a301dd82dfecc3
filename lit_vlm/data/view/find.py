"""Searches over records: a scan from a place on, that stops after some matches, or after some time."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lit_vlm.data.records import Record
from lit_vlm.data.view.records import Records

WINDOW = 1 << 16
"""Records whose counts are compared at a time."""
SNIPPET = 160
"""Letters of a match that are shown."""


@dataclass(frozen=True)
class Query:
    """What is looked for; all of it has to hold.

    Attributes:
        text: part of a record's text or id, in any case.
        source: name of its source.
        reason: why it cannot be used; `*` for any reason, `-` for none.
        between: what is counted or measured → the least and the largest value; None for no limit.
    """

    text: str = ""
    source: str = ""
    reason: str = ""
    between: Mapping[str, tuple[float | None, float | None]] = field(default_factory=dict)

    def possible(self, records: Records, indices: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether records may match, by what is known of them: `[n]`, True where nothing is."""
        fits = np.ones(len(indices), bool)
        for name, (least, most) in self.between.items():
            values = records.values(name, indices)
            fits &= ~np.isnan(values)
            fits &= (values >= (-np.inf if least is None else least)) & (values <= (np.inf if most is None else most))
        if self.reason:
            fits &= self._of_reason(records, records.reason[indices])
        return fits | ~records.known[indices]

    def _of_reason(self, records: Records, numbers: NDArray[np.int16]) -> NDArray[np.bool_]:
        if self.reason in ("*", "-"):
            return (numbers > 0) == (self.reason == "*")
        wanted = records.reasons.index(self.reason) if self.reason in records.reasons else -1
        return numbers == wanted


@dataclass(frozen=True)
class Match:
    """A record that was found.

    Attributes:
        index: its index among all.
        id: its id; its index as text where it cannot be read.
        source: name of its source.
        snippet: the beginning of its text, or what stands around the text that was looked for.
        reason: why it cannot be used; "" where it can.
        facts: what is counted and measured of it.
    """

    index: int
    id: str
    source: str
    snippet: str
    reason: str
    facts: Mapping[str, float]


class Found(NamedTuple):
    """What a search found.

    Attributes:
        matches: in the order of the scan.
        next: where the scan goes on; None where it is over.
    """

    matches: list[Match]
    next: int | None


def find(
    records: Records, query: Query, start: int, limit: int, backwards: bool = False, seconds: float = 1.0
) -> Found:
    """Scan from a place on.

    Args:
        records: what is scanned.
        query: what is looked for.
        start: the first index that is looked at.
        limit: most matches.
        backwards: scan towards the first record.
        seconds: time after which the scan stops; one record at least is looked at.

    Raises:
        ValueError: for an unknown source or measure.
    """
    low, high = records.span(query.source) if query.source else (0, len(records))
    start = min(start, high - 1) if backwards else max(start, low)
    matches: list[Match] = []
    ends = time.monotonic() + seconds
    looked = False
    for index in _candidates(records, query, start, low, high, backwards):
        if len(matches) == limit or (looked and time.monotonic() > ends):
            return Found(matches, index)
        looked = True
        if (match := _match(records, query, index)) is not None:
            matches.append(match)
    return Found(matches, None)


def draw(records: Records, query: Query, seconds: float = 1.0) -> Found:
    """One record that matches, at random: drawn until one fits; after half the time, the next from a random place on.

    Raises:
        ValueError: as `find`.
    """
    low, high = records.span(query.source) if query.source else (0, len(records))
    if low == high:
        return Found([], None)
    ends = time.monotonic() + seconds / 2
    while True:
        index = random.randrange(low, high)
        if query.possible(records, np.array([index]))[0] and (match := _match(records, query, index)) is not None:
            return Found([match], None)
        if time.monotonic() > ends:
            return find(records, query, index, 1, seconds=seconds / 2)


def _candidates(records: Records, query: Query, start: int, low: int, high: int, backwards: bool) -> Iterator[int]:
    """Indices that may match, in the order of the scan; what is known is compared a window at a time."""
    step = -WINDOW if backwards else WINDOW
    while low <= start < high:
        end = max(low - 1, start + step) if backwards else min(high, start + step)
        indices = np.arange(start, end, -1 if backwards else 1)
        yield from indices[query.possible(records, indices)].tolist()
        start = end


def _match(records: Records, query: Query, index: int) -> Match | None:
    """The record as a match, or None."""
    record, error = records.look(index)
    if not query.possible(records, np.array([index]))[0]:
        return None
    identity = str(records.place(index)[1]) if record is None else record.id
    text = str(error) if record is None else text_of(record)
    at = 0
    if query.text:
        wanted = query.text.casefold()
        at = text.casefold().find(wanted)
        if at < 0 and wanted not in identity.casefold():
            return None
    start = max(0, at - SNIPPET // 4)
    snippet = ("…" if start else "") + " ".join(text[start : start + SNIPPET].split())
    reason = "" if error is None else error.reason
    return Match(index, identity, records.place(index)[0].name, snippet, reason, records.facts(index))


def text_of(record: Record) -> str:
    """All text of a record, as it is searched."""
    return "\n".join([*(message.text for message in record.messages), *record.urls])


def parse_query(given: Mapping[str, str], records: Records) -> Query:
    """The query of an address: `text`, `source`, `reason`, and `min.NAME` and `max.NAME`.

    Raises:
        ValueError: for a limit that is no number, or an unknown source or measure.
    """
    between: dict[str, Any] = {}
    for key, value in given.items():
        side, dot, name = key.partition(".")
        if dot and side in ("min", "max") and value:
            try:
                number = float(value)
            except ValueError as error:
                raise ValueError(f"{key} is a number, not {value!r}") from error
            pair = between.get(name, (None, None))
            between[name] = (number, pair[1]) if side == "min" else (pair[0], number)
    query = Query(given.get("text", ""), given.get("source", ""), given.get("reason", ""), between)
    query.possible(records, np.zeros(0, np.int64))
    if query.source:
        records.span(query.source)
    return query
