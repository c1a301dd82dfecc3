"""The ways in which pictures are found to be the same: exactly, by perceptual hashes, and by their vectors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lit_vlm.data.curation.dual_encoder import DualEncoder, encoder_of
from lit_vlm.data.curation.duplicates import CODE, Duplicates, PictureHash
from lit_vlm.data.curation.embeddings import VECTOR, PictureEmbeddings, unit
from lit_vlm.data.curation.groups import equal_groups, near_groups
from lit_vlm.data.curation.hashes import Codes
from lit_vlm.data.curation.neighbours import CosineIndex, HammingIndex, Rows
from lit_vlm.data.curation.rows import chosen_pieces
from lit_vlm.data.curation.step import Measured
from lit_vlm.data.sources import Source

PER_CELL = 64
"""Vectors for each cell from which the cells are found."""


class ExactDuplicates(Duplicates):
    """Drops records whose pictures are the same byte for byte, or pixel for pixel.

    Args:
        by: `content`: the encoded bytes are the same. `pixels`: they decode to the same pixels.
        against: benchmarks: paths of files, folders or converted sets, or sources.
        same_text: whether records are duplicates only if their texts are equal, too.
    """

    def __init__(
        self,
        by: Literal["content", "pixels"] = "content",
        against: Sequence[str | Source] = (),
        same_text: bool = False,
    ) -> None:
        if by not in ("content", "pixels"):
            raise ValueError(f"ExactDuplicates: by is {by!r}; it must be content or pixels")
        super().__init__(PictureHash(by), against, same_text)
        self.by = by

    def groups(self, table: Measured, rows: Rows) -> Rows:
        """Groups of equal pictures."""
        return equal_groups(table.column(self._compared, CODE)[rows])

    def matches(self, table: Measured, rows: Rows, against: Measured) -> tuple[Rows, Rows]:
        """Pairs of equal pictures."""
        return _hamming_matches(table.column(self._compared, CODE)[rows], against.column(self._compared, CODE), 0)


class PerceptualDuplicates(Duplicates):
    """Drops records whose pictures look alike: by perceptual hashes that differ in few bits.

    It finds pictures that were encoded anew, scaled or brightened, and not those that were cropped or turned.

    Args:
        radius: most bits that differ.
        bits: of a hash, the square of a multiple of 4: 64, 144 or 256. More tell pictures apart that share their
            composition.
        against: benchmarks: paths of files, folders or converted sets, or sources.
        same_text: whether records are duplicates only if their texts are equal, too.
    """

    def __init__(
        self,
        radius: int = 16,
        bits: int = 256,
        against: Sequence[str | Source] = (),
        same_text: bool = False,
    ) -> None:
        if bits < 64 or round(bits**0.5) ** 2 != bits or bits % 16:
            raise ValueError(f"PerceptualDuplicates: bits is {bits}; it must be 64, 144, 256 or a larger such square")
        if not 0 <= radius < bits // 2:
            raise ValueError(f"PerceptualDuplicates: radius is {radius}; of {bits} bits, less than half may differ")
        super().__init__(PictureHash("looks", bits), against, same_text)
        self.radius, self.bits = radius, bits

    def groups(self, table: Measured, rows: Rows) -> Rows:
        """Groups of pictures within the radius of their first one."""
        codes = table.column(self._compared, CODE)[rows]
        return near_codes(codes, self.radius)

    def matches(self, table: Measured, rows: Rows, against: Measured) -> tuple[Rows, Rows]:
        """Pairs within the radius."""
        return _hamming_matches(
            table.column(self._compared, CODE)[rows], against.column(self._compared, CODE), self.radius
        )


def near_codes(codes: Codes, radius: int) -> Rows:
    """`near_groups` of codes, of which each is looked up once, however often it is there."""
    first = equal_groups(codes)
    different, which = np.unique(first, return_inverse=True)
    index = HammingIndex(8 * codes.shape[1], radius, len(different))
    return different[near_groups([codes[different]], index)][which]


def _hamming_matches(codes: Codes, against: Codes, radius: int) -> tuple[Rows, Rows]:
    index = HammingIndex(8 * codes.shape[1], radius, len(against))
    index.add(against)
    return index.within(codes)


class EmbeddingDuplicates(Duplicates):
    """Drops records whose pictures are close neighbours: by the cosine of their vectors (SemDeDup: Abbas et al., 2023).

    Args:
        encoder: gives the vectors: a `DualEncoder`, or the name of one.
        threshold: smallest cosine of pictures that count as the same.
        cells: number of cells into which the space is divided by k-means, of which `probes` are searched for each
            picture; 0 compares with all that stay, which is exact and takes a time that grows with the square.
        probes: cells that are searched.
        against: benchmarks: paths of files, folders or converted sets, or sources.
        same_text: whether records are duplicates only if their texts are equal, too.
    """

    def __init__(
        self,
        encoder: str | DualEncoder,
        threshold: float,
        cells: int = 0,
        probes: int = 8,
        against: Sequence[str | Source] = (),
        same_text: bool = False,
    ) -> None:
        if not 0 < threshold <= 1:
            raise ValueError(f"EmbeddingDuplicates: threshold is {threshold}; it must be above 0 and at most 1")
        if cells < 0 or probes < 1:
            raise ValueError(f"EmbeddingDuplicates: cells is {cells} and probes {probes}; at least 0 and 1")
        self.encoder = encoder_of(encoder)
        super().__init__(PictureEmbeddings(self.encoder), against, same_text)
        self.threshold, self.cells, self.probes = threshold, cells, probes

    def groups(self, table: Measured, rows: Rows) -> Rows:
        """Groups of pictures that have the cosine with their first one."""
        sample = None
        if self.cells:
            if len(rows) < self.cells:
                raise ValueError(f"EmbeddingDuplicates: cells is {self.cells}, and there are {len(rows)} pictures")
            spread = np.unique(np.linspace(0, len(rows) - 1, PER_CELL * self.cells, dtype=np.int64))
            sample = np.concatenate(list(self._vectors(table, rows[spread])))
        vectors = self._vectors(table, rows)
        first = next(vectors, None)
        if first is None:
            return np.zeros(0, np.int64)
        index = CosineIndex(first.shape[1], self.threshold, sample, self.cells, self.probes)
        return near_groups(chain([first], vectors), index)

    def matches(self, table: Measured, rows: Rows, against: Measured) -> tuple[Rows, Rows]:
        """Pairs that have the cosine."""
        known = unit(against.column(self._compared, VECTOR))
        index = CosineIndex(known.shape[1], self.threshold)
        index.add(known)
        places, pictures, start = [], [], 0
        for vectors in self._vectors(table, rows):
            found, of = index.within(vectors)
            places.append(found + start)
            pictures.append(of)
            start += len(vectors)
        nothing = np.zeros(0, np.int64)
        return np.concatenate([nothing, *places]), np.concatenate([nothing, *pictures])

    def _vectors(self, table: Measured, rows: Rows) -> Iterator[NDArray[np.float32]]:
        return (unit(piece) for _, piece in chosen_pieces(table, self._compared, VECTOR, rows))
