"""Indices of faiss over codes and over vectors, which find what lies within a distance."""

from __future__ import annotations

from math import comb
from types import ModuleType
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from lit_vlm.data.curation.hashes import Codes

Rows = NDArray[np.int64]
Vectors = NDArray[np.float32]
Thing = TypeVar("Thing", Codes, Vectors, contravariant=True)
LOOK = 8
"""Comparisons of codes that one look into a bucket of a hash table costs, about."""
MOST_FLIPS = 3
"""Most bits that may differ within a band: the buckets to look into grow with that power."""


def faiss_module() -> ModuleType:
    """The package faiss.

    Raises:
        ValueError: when it is not installed.
    """
    try:
        import faiss
    except ModuleNotFoundError as error:
        raise ValueError("clusters and near duplicates need faiss: pip install 'lit-vlm[curation]'") from error
    module: ModuleType = faiss
    return module


class Index(Protocol[Thing]):
    """Rows that were added, in order, and may be asked for those near to others."""

    def add(self, rows: Thing) -> None:
        """Add rows; the first of all has number 0."""

    def nearest(self, rows: Thing) -> Rows:
        """Number of the nearest row that was added; -1 where none is near: `[n]`."""

    def within(self, rows: Thing) -> tuple[Rows, Rows]:
        """All pairs of one of these rows and a near one that was added: their numbers `[m]`, `[m]`, in order."""

    def near(self, rows: Thing) -> NDArray[np.bool_]:
        """Which of these rows are near to each other: `[n, n]`."""


class HammingIndex:
    """Binary codes that differ in at most `radius` bits: exact, by multi-index hashing (Norouzi et al., 2012).

    Codes are cut into bands, each with a hash table. Of codes that differ in r bits, one of b bands differs in r / b at
    most, so that looking into all buckets that near finds them all.

    Args:
        bits: of a code.
        radius: most bits that differ.
        expected: number of codes that will be added, about; it decides on the bands and on nothing else.
    """

    def __init__(self, bits: int, radius: int, expected: int) -> None:
        faiss = faiss_module()
        self.radius = radius
        bands = best_bands(bits, radius, expected)
        if bands:
            self._index = faiss.IndexBinaryMultiHash(bits, bands, min(bits // bands, 62))
            self._index.nflip = radius // bands
        else:
            self._index = faiss.IndexBinaryFlat(bits)

    def add(self, rows: Codes) -> None:
        """Add codes `[n, bits / 8]`."""
        self._index.add(np.ascontiguousarray(rows))

    def nearest(self, rows: Codes) -> Rows:
        """Number of the nearest code that was added; -1 where none is within the radius: `[n]`."""
        if not self._index.ntotal or not len(rows):
            return np.full(len(rows), -1, np.int64)
        distances, numbers = self._index.search(np.ascontiguousarray(rows), 1)
        found = (numbers[:, 0] >= 0) & (distances[:, 0] <= self.radius)
        return np.where(found, numbers[:, 0], -1)

    def within(self, rows: Codes) -> tuple[Rows, Rows]:
        """All pairs within the radius, of one of these codes and one that was added: `[m]`, `[m]`, in order."""
        # faiss gives what is nearer than its radius, and not what is as far.
        return _pairs(self._index.range_search(np.ascontiguousarray(rows), self.radius + 1))

    def near(self, rows: Codes) -> NDArray[np.bool_]:
        """Which of these codes are within the radius of each other: `[n, n]`."""
        return hamming(rows, rows) <= self.radius


def best_bands(bits: int, radius: int, expected: int) -> int:
    """Number of bands with which a search among codes takes the fewest comparisons; 0 to compare with every one."""
    best, least = 0, float(expected)
    for bands in range(1, bits // 8 + 1):
        width, flips = min(bits // bands, 62), radius // bands
        if flips > MOST_FLIPS:
            continue
        buckets = bands * sum(comb(width, flipped) for flipped in range(flips + 1))
        comparisons = buckets * (LOOK + expected / 2.0**width)
        if comparisons < least:
            best, least = bands, comparisons
    return best


def hamming(left: Codes, right: Codes) -> NDArray[np.int64]:
    """Number of bits in which codes differ: `[n, bytes]`, `[m, bytes]` → `[n, m]`."""
    one, other = _words(left), _words(right)
    found = np.zeros((len(one), len(other)), np.int64)
    for word in range(one.shape[1]):
        found += np.bitwise_count(one[:, None, word] ^ other[None, :, word])
    return found


def _words(codes: Codes) -> NDArray[np.uint64]:
    """The same codes in words of 64 bits, filled up with zeros, as these are compared eight times as fast."""
    padded = np.zeros((len(codes), -(-codes.shape[1] // 8) * 8), np.uint8)
    padded[:, : codes.shape[1]] = codes
    return padded.view(np.uint64)


class CosineIndex:
    """Unit vectors whose cosine is at least `threshold`.

    Args:
        width: of a vector.
        threshold: smallest cosine of vectors that are near.
        sample: vectors `[n, width]` that are like those that will be added. With `cells`, the space is divided by
            k-means over them.
        cells: number of cells; 0 compares with every vector, which is exact.
        probes: cells that are searched, those whose centres are nearest. A neighbour in another cell is not found.
    """

    def __init__(
        self, width: int, threshold: float, sample: Vectors | None = None, cells: int = 0, probes: int = 8
    ) -> None:
        faiss = faiss_module()
        self.threshold = threshold
        flat = faiss.IndexFlatIP(width)
        if cells and sample is not None:
            self._index = faiss.IndexIVFFlat(flat, width, cells, faiss.METRIC_INNER_PRODUCT)
            self._index.train(np.ascontiguousarray(sample))
            self._index.nprobe = probes
            self._quantizer = flat  # which the index refers to and does not own
        else:
            self._index = flat

    def add(self, rows: Vectors) -> None:
        """Add unit vectors `[n, width]`."""
        self._index.add(np.ascontiguousarray(rows))

    def nearest(self, rows: Vectors) -> Rows:
        """Number of the nearest vector that was added; -1 where none has the cosine: `[n]`."""
        if not self._index.ntotal or not len(rows):
            return np.full(len(rows), -1, np.int64)
        cosines, numbers = self._index.search(np.ascontiguousarray(rows), 1)
        return np.where((numbers[:, 0] >= 0) & (cosines[:, 0] >= self.threshold), numbers[:, 0], -1)

    def within(self, rows: Vectors) -> tuple[Rows, Rows]:
        """All pairs that have the cosine, of one of these vectors and one that was added: `[m]`, `[m]`, in order."""
        below = float(np.nextafter(np.float32(self.threshold), np.float32(-2)))
        return _pairs(self._index.range_search(np.ascontiguousarray(rows), below))

    def near(self, rows: Vectors) -> NDArray[np.bool_]:
        """Which of these vectors have the cosine with each other: `[n, n]`."""
        found: NDArray[np.bool_] = rows @ rows.T >= self.threshold
        return found


def _pairs(found: Any) -> tuple[Rows, Rows]:
    limits, _, numbers = found
    queries = np.repeat(np.arange(len(limits) - 1), np.diff(limits.astype(np.int64)))
    order = np.lexsort((numbers, queries))
    return queries[order], numbers[order].astype(np.int64)
