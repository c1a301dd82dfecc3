"""Clusters of pictures: the ones nearest to each centre, or as many of each as of the others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lit_vlm.data.curation.dual_encoder import DualEncoder, encoder_of
from lit_vlm.data.curation.embeddings import VECTOR, PictureEmbeddings, unit
from lit_vlm.data.curation.neighbours import Vectors, faiss_module
from lit_vlm.data.curation.rows import chosen_pieces
from lit_vlm.data.curation.step import Measure, Measured, Step, Verdict

PER_CENTRE = 256
"""Vectors for each centre from which the centres are found: faiss takes as many at most."""
CHUNK = 1 << 16
"""Vectors that are assigned at a time."""


class Clusters(Step):
    """Keeps some records of each cluster of pictures, found by spherical k-means over their vectors.

    A record belongs to the cluster of its first picture; one without pictures stays.

    Args:
        encoder: gives the vectors: a `DualEncoder`, or the name of one.
        clusters: number of clusters. EVE takes 50,000 of LAION (Diao et al., 2024, section 3.3).
        nearest: how many of each cluster stay, those nearest to its centre: 300 for EVE. It is the centre of the
            cluster that they belong to, so that none counts twice.
        quota: instead, how many of each cluster stay at most, drawn at random.
        iterations: of k-means.

    Raises:
        ValueError: unless one of `nearest` and `quota` is given, or for a number out of range.
    """

    def __init__(
        self,
        encoder: str | DualEncoder,
        clusters: int,
        nearest: int | None = None,
        quota: int | None = None,
        iterations: int = 20,
    ) -> None:
        if (nearest is None) == (quota is None):
            raise ValueError("Clusters: give either nearest or quota, not both and not neither")
        for name, value in (("clusters", clusters), ("nearest", nearest), ("quota", quota), ("iterations", iterations)):
            if value is not None and value < 1:
                raise ValueError(f"Clusters: {name} is {value}; it must be at least 1")
        self.encoder, self.clusters, self.iterations = encoder_of(encoder), clusters, iterations
        self.nearest, self.quota = nearest, quota
        self._pictures = PictureEmbeddings(self.encoder)

    def measures(self) -> Sequence[Measure]:
        """The vectors of pictures."""
        return (self._pictures,)

    def decide(
        self, table: Measured, candidates: NDArray[np.int64], rng: np.random.Generator, against: Measured | None
    ) -> Verdict:
        """Find the clusters, and drop what is too many.

        Raises:
            ValueError: when there are fewer pictures than clusters.
        """
        held = np.flatnonzero(table.offsets[candidates + 1] > table.offsets[candidates])
        rows = table.offsets[candidates[held]]
        if len(rows) < self.clusters:
            raise ValueError(
                f"Clusters: clusters is {self.clusters}, and the steps before left {len(rows)} records with pictures; "
                "ask for fewer"
            )
        sample = np.sort(rng.choice(rows, min(len(rows), PER_CENTRE * self.clusters), replace=False))
        seed = int(rng.integers(1 << 31))
        centres = find_centres(self._gathered(table, sample), self.clusters, self.iterations, seed)
        which, cosines = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.float32)
        for own, vectors in chosen_pieces(table, self._pictures, VECTOR, rows):
            which[own], cosines[own] = assign(unit(vectors), centres)
        first = -cosines if self.nearest is not None else rng.random(len(rows))
        codes, values = np.zeros(len(candidates), np.int8), np.full(len(candidates), np.nan)
        codes[held] = ~first_of_each(which, first, self.nearest or self.quota or 0)
        values[held] = cosines
        reason = "far_from_centre" if self.nearest is not None else "over_quota"
        return Verdict(codes, (reason,), values, "cosine with the centre")

    def _gathered(self, table: Measured, rows: NDArray[np.int64]) -> Vectors:
        return np.concatenate([unit(one) for _, one in chosen_pieces(table, self._pictures, VECTOR, rows)])


def find_centres(vectors: Vectors, clusters: int, iterations: int, seed: int) -> Vectors:
    """Centres of spherical k-means: unit vectors `[clusters, width]`, the same for the same seed.

    Args:
        vectors: unit vectors `[n, width]`, at least as many as clusters.
        clusters: number of centres.
        iterations: of k-means.
        seed: decides on the first centres.
    """
    kmeans = faiss_module().Kmeans(
        vectors.shape[1],
        clusters,
        niter=iterations,
        seed=seed,
        spherical=True,
        min_points_per_centroid=1,
        max_points_per_centroid=PER_CENTRE,
    )
    kmeans.train(np.ascontiguousarray(vectors))
    return np.asarray(kmeans.centroids)


def assign(vectors: Vectors, centres: Vectors) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Number of the centre nearest to each vector, and the cosine with it: `[n]`, `[n]`.

    Args:
        vectors: unit vectors `[n, width]`.
        centres: unit vectors `[k, width]`.
    """
    index = faiss_module().IndexFlatIP(centres.shape[1])
    index.add(centres)
    which, cosines = np.zeros(len(vectors), np.int64), np.zeros(len(vectors), np.float32)
    for start in range(0, len(vectors), CHUNK):
        own = slice(start, start + CHUNK)
        found, numbers = index.search(np.ascontiguousarray(vectors[own]), 1)
        which[own], cosines[own] = numbers[:, 0], found[:, 0]
    return which, cosines


def first_of_each(which: NDArray[np.int64], order: NDArray[np.floating], count: int) -> NDArray[np.bool_]:
    """Which rows are among the first `count` of their cluster; of equal ones, the earlier: `[n]`.

    Args:
        which: cluster of each row: `[n]`.
        order: rows of a cluster are taken by this, ascending: `[n]`.
        count: how many of each.
    """
    by_cluster = np.lexsort((order, which))
    grouped = which[by_cluster]
    places = np.arange(len(which)) - np.searchsorted(grouped, grouped)
    chosen = np.zeros(len(which), np.bool_)
    chosen[by_cluster[places < count]] = True
    return chosen
