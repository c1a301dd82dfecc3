"""The step that draws records by source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from lit_vlm.data.curation.step import Measure, Measured, Step, Verdict
from lit_vlm.data.curation.step import Sample as Measurable
from lit_vlm.data.sets.scan import id_hash


class RecordHash(Measure):
    """A hash of the id of each record."""

    level: ClassVar[Literal["record", "picture"]] = "record"

    @property
    def columns(self) -> Mapping[str, np.dtype[Any]]:
        """`hash`."""
        return {"hash": np.dtype(np.int64)}

    def __call__(self, samples: Sequence[Measurable]) -> Mapping[str, NDArray[Any]]:
        """Hashes of all records: `[n]`."""
        return {"hash": np.array([id_hash(sample.record.id) for sample in samples], np.int64)}


class Sample(Step):
    """Keeps so many records of each source, drawn at random.

    Whether a record is drawn depends on its id and the seed: those with the lowest hash of both stay. So the same are
    drawn in whatever order they come, and a larger sample contains the smaller one.

    Args:
        quotas: name of a source → most records of it that stay; sources that are not named stay whole.
        total: number of records that stay in all, shared among all sources by `weights`.
        weights: name of each source → its share of `total`, as a ratio to the others; default: the number of records
            that came to this step. The counts are exact: they are rounded by the largest remainder.

    Raises:
        ValueError: for neither quotas nor total, both, negative numbers, or weights without a total. When it decides:
            for a source that is not there, one without a weight, or one with fewer records than its share.
    """

    def __init__(
        self,
        quotas: dict[str, int] | None = None,
        total: int | None = None,
        weights: dict[str, float] | None = None,
    ) -> None:
        self.quotas, self.total, self.weights = quotas, total, weights
        if (quotas is None) == (total is None):
            raise ValueError("set either quotas or total")
        if weights is not None and (total is None or sum(weights.values()) <= 0):
            raise ValueError("weights share out a total: set total, and at least one weight above 0")
        given = [*(quotas or {}).values(), *(weights or {}).values(), total or 0]
        if any(number < 0 for number in given):
            raise ValueError("quotas, weights and total are not negative")

    def measures(self) -> Sequence[Measure]:
        """Hashes of ids."""
        return (RecordHash(),)

    def decide(
        self,
        table: Measured,
        candidates: NDArray[np.int64],
        rng: np.random.Generator,
        against: Measured | None,
    ) -> Verdict:
        """Drop what is not drawn, with the reason `not_drawn`."""
        of = table.source[candidates]
        counts = self._counts(table.names, np.bincount(of, minlength=len(table.names)))
        order = mixed(table.column(RecordHash(), "hash")[candidates], int(rng.integers(1 << 63)))
        codes = np.zeros(len(candidates), np.int8)
        for number, count in enumerate(counts):
            own = np.flatnonzero(of == number)
            ranked = own[np.argsort(order[own], kind="stable")]
            codes[ranked[count:]] = 1
        return Verdict(codes, ("not_drawn",), np.full(len(candidates), np.nan), "drawn")

    def _counts(self, names: Sequence[str], there: NDArray[np.int64]) -> list[int]:
        """Number of records of each source that stay."""
        given = self.quotas if self.quotas is not None else self.weights or {}
        if unknown := sorted(set(given) - set(names)):
            raise ValueError(f"Sample names the sources {', '.join(unknown)}; there are {', '.join(names)}")
        if self.quotas is not None:
            return [min(self.quotas.get(name, int(n)), int(n)) for name, n in zip(names, there, strict=True)]
        assert self.total is not None
        if self.weights is not None and (lacking := [name for name in names if name not in self.weights]):
            raise ValueError(f"Sample has no weight for {', '.join(lacking)}; 0 leaves a source out")
        weights = [float(n) for n in there] if self.weights is None else [self.weights[name] for name in names]
        counts = shared_out(self.total, weights)
        for name, count, n in zip(names, counts, there.tolist(), strict=True):
            if count > n:
                raise ValueError(
                    f"Sample wants {count:,} records of {name}, and {n:,} came to it: lower total, or its weight"
                )
        return counts


def shared_out(total: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers in the ratio of weights that add up to a total, by the largest remainder."""
    exact = total * np.asarray(weights, np.float64) / max(sum(weights), np.finfo(np.float64).tiny)
    counts = np.floor(exact).astype(np.int64)
    rest = int(total - counts.sum())
    counts[np.argsort(-(exact - counts), kind="stable")[:rest]] += 1
    return counts.tolist()


def mixed(values: NDArray[np.int64], salt: int) -> NDArray[np.uint64]:
    """Random numbers that depend on a value and a salt: the last steps of SplitMix64."""
    z = values.astype(np.uint64) ^ np.uint64(salt)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
