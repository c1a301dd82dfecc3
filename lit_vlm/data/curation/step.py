"""What a step of a curation is: it asks for measures of every record, and then decides who stays."""

from __future__ import annotations

import hashlib
import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage

from lit_vlm.data.records import Record
from lit_vlm.data.sources.base import Source, describe


@dataclass(frozen=True)
class Sample:
    """A record as measures see it.

    Attributes:
        record: its texts and where its pictures are.
        contents: the encoded bytes of its pictures, in order.
        pictures: the same pictures decoded: RGB, upright, at full size.
    """

    record: Record
    contents: tuple[bytes, ...]
    pictures: tuple[PILImage.Image, ...]


def identity(thing: Any) -> str:
    """Class and settings of a step, measure or source as text: the same for the same settings, on every machine.

    Attributes that begin with an underscore are left out: what was loaded or derived.
    """
    return json.dumps(_settings(thing), sort_keys=True)


def _settings(thing: Any) -> Any:
    if isinstance(thing, str | int | float | bool | type(None)):
        return thing
    if isinstance(thing, Path):
        return str(thing)
    if isinstance(thing, Mapping):
        return {str(key): _settings(value) for key, value in thing.items()}
    if isinstance(thing, list | tuple):
        return [_settings(value) for value in thing]
    if isinstance(thing, Source):
        return {"source": describe(thing), "fingerprint": thing.fingerprint()}
    if inspect.isclass(thing) or inspect.isroutine(thing):
        return f"{thing.__module__}.{thing.__qualname__}"
    if not hasattr(thing, "__dict__") or hasattr(thing, "__array__"):
        raise ValueError(
            f"a {type(thing).__name__} is no setting that can be written down: begin the attribute's name with _"
        )
    # A cached property stands among the attributes once it was asked for, and is no setting.
    public = [key for key in vars(thing) if key[0] != "_" and not isinstance(_of_class(thing, key), cached_property)]
    settings = {key: _settings(getattr(thing, key)) for key in public}
    return {"class": f"{type(thing).__module__}.{type(thing).__qualname__}", **settings}


def _of_class(thing: Any, name: str) -> object:
    return inspect.getattr_static(type(thing), name, None)


class _Keyed:
    """Something that is known by its class and its settings."""

    @property
    def key(self) -> str:
        """16 hex digits that name the class and its settings."""
        return hashlib.sha256(identity(self).encode()).hexdigest()[:16]


class Measure(_Keyed, ABC):
    """Numbers, words or vectors of each record, or of each of its pictures, that need no other record.

    Measures of one class and the same public attributes are computed once for all steps. A measure pickles; what it
    loads belongs into attributes that begin with an underscore, and is loaded when it is first called.

    Attributes:
        level: whether there is one row per record or one per picture.
    """

    level: ClassVar[Literal["record", "picture"]]

    @property
    @abstractmethod
    def columns(self) -> Mapping[str, np.dtype[Any]]:
        """Name → type of each column: booleans, numbers, `U16` for words, `np.dtype((np.float16, 512))` for vectors."""

    @abstractmethod
    def __call__(self, samples: Sequence[Sample]) -> Mapping[str, NDArray[Any]]:
        """Measure a batch.

        Args:
            samples: records of one source; those that follow each other there.

        Returns:
            name → `[n, ...]`, with a row for each record, or for each picture of all records, in order.

        Raises:
            ValueError: for what would fail every batch, such as a model that is not there.
        """


class Measured(Protocol):
    """Columns of all records of all sources, one source after the other.

    Records that cannot be read have rows, too (zeros, and no pictures), but are never candidates.

    Attributes:
        names: of the sources.
        source: number of each record's source: `[n]`.
        offsets: rows `offsets[i]` to `offsets[i + 1]` (exclusive) of picture columns belong to record `i`: `[n + 1]`.
    """

    names: Sequence[str]
    source: NDArray[np.int64]
    offsets: NDArray[np.int64]

    def column(self, measure: Measure, name: str) -> NDArray[Any]:
        """A whole column: `[n, ...]` for measures of records, `[p, ...]` for those of pictures."""
        ...

    def pieces(self, measure: Measure, name: str) -> Iterator[tuple[int, NDArray[Any]]]:
        """(number of its first row, rows) of a column in order, for columns that memory does not hold."""
        ...

    def ids(self, indices: NDArray[np.int64]) -> list[str]:
        """Ids of records."""
        ...


@dataclass(frozen=True)
class Verdict:
    """What a step says of its candidates: arrays with one entry for each, in their order.

    Attributes:
        codes: 0 where the record stays; else 1 + the number of its reason: `[c]`.
        reasons: why records are dropped: short codes that they are counted by, such as `too_small`.
        values: what was decided on, to be shown and written down; NaN where there is no number: `[c]`.
        label: what the values are, with their unit.
        details: number of a record that is dropped → what else is to be said of it, such as the record that it repeats.
        lists: name → rows of a list that is written beside the report, such as the questions of benchmarks that were
            found.
    """

    codes: NDArray[np.int8]
    reasons: tuple[str, ...]
    values: NDArray[np.float64]
    label: str
    details: Mapping[int, str] = field(default_factory=dict)
    lists: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)


class Step(_Keyed, ABC):
    """Decides which of the records that the steps before it kept stay. Its public attributes are its settings."""

    def measures(self) -> Sequence[Measure]:
        """What it must know of each record."""
        return ()

    def against(self) -> Sequence[Source]:
        """Sources that are measured in the same way and never kept, such as benchmarks."""
        return ()

    @abstractmethod
    def decide(
        self,
        table: Measured,
        candidates: NDArray[np.int64],
        rng: np.random.Generator,
        against: Measured | None,
    ) -> Verdict:
        """Decide, in one process, on all candidates at once.

        Args:
            table: the measures of all records of the curation.
            candidates: ascending numbers of the records that earlier steps kept: `[c]`.
            rng: seeded by the file's `seed` and the step's settings.
            against: the measures of the sources that `against` names; None where it names none.

        Returns:
            one entry for each candidate.
        """
