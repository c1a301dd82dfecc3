"""How well pictures and their texts fit each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from lit_vlm.data.curation.dual_encoder import DualEncoder, encoder_of
from lit_vlm.data.curation.embeddings import VECTOR, PictureEmbeddings, TextEmbeddings, unit
from lit_vlm.data.curation.rows import chosen_pieces, picture_rows
from lit_vlm.data.curation.step import Measure, Measured, Step, Verdict

Floats = NDArray[np.float64]


class Similarity(Step):
    """Keeps records whose pictures and texts fit each other: by the cosine of their vectors (Radford et al., 2021).

    The similarity of a record with several pictures is the mean over those that have a text
    (`lit_vlm.data.curation.embeddings.texts_of`). Records without pictures stay and are not counted.

    Args:
        encoder: gives the vectors: a `DualEncoder`, or the name of one.
        threshold: smallest similarity that stays.
        top: instead of a threshold, how many records of each source stay: those of the highest similarity, exactly; of
            equal ones those whose ids come first. As VILA's 25 million of MMC4 and of COYO (Lin et al., 2024).

    Raises:
        ValueError: unless one of `threshold` and `top` is given, or for a number out of range.
    """

    def __init__(self, encoder: str | DualEncoder, threshold: float | None = None, top: int | None = None) -> None:
        if (threshold is None) == (top is None):
            raise ValueError("Similarity: give either threshold or top, not both and not neither")
        if top is not None and top < 1:
            raise ValueError(f"Similarity: top is {top}; it must be at least 1")
        if threshold is not None and not -1 <= threshold <= 1:
            raise ValueError(f"Similarity: threshold is {threshold}; a cosine is from -1 to 1")
        self.encoder, self.threshold, self.top = encoder_of(encoder), threshold, top
        self._pictures, self._texts = PictureEmbeddings(self.encoder), TextEmbeddings(self.encoder)

    def measures(self) -> Sequence[Measure]:
        """The vectors of pictures and of their texts."""
        return (self._pictures, self._texts)

    def decide(
        self, table: Measured, candidates: NDArray[np.int64], rng: np.random.Generator, against: Measured | None
    ) -> Verdict:
        """Drop records with pictures and no text, and those whose similarity is too low."""
        values = self._similarities(table, candidates)
        shown = table.offsets[candidates + 1] > table.offsets[candidates]
        codes = np.where(shown & np.isnan(values), 2, 0).astype(np.int8)
        if self.threshold is not None:
            codes[values < self.threshold] = 1
        else:
            for source in np.unique(table.source[candidates]):
                own = np.flatnonzero((table.source[candidates] == source) & ~np.isnan(values))
                stays = top_of(values[own], self.top or 0, partial(_ids, table, candidates[own]))
                codes[np.delete(own, stays)] = 1
        return Verdict(codes, ("low_similarity", "no_text"), values, "cosine of picture and text")

    def _similarities(self, table: Measured, candidates: NDArray[np.int64]) -> Floats:
        """The mean over each candidate's pictures; NaN where none has a text: `[c]`."""
        rows, owners = picture_rows(table, candidates)
        cosines = np.full(len(rows), np.nan)
        pairs = zip(
            chosen_pieces(table, self._pictures, VECTOR, rows),
            chosen_pieces(table, self._texts, VECTOR, rows),
            strict=True,
        )
        for (own, pictures), (_, texts) in pairs:
            found = (unit(pictures) * unit(texts)).sum(1)
            cosines[own] = np.where(texts.any(1), found, np.nan)
        held = ~np.isnan(cosines)
        counts = np.bincount(owners[held], minlength=len(candidates))
        sums = np.bincount(owners[held], cosines[held], len(candidates))
        return np.divide(sums, counts, out=np.full(len(candidates), np.nan), where=counts > 0)


def _ids(table: Measured, records: NDArray[np.int64], places: NDArray[np.int64]) -> Sequence[str]:
    return table.ids(records[places])


def top_of(values: Floats, count: int, names: Callable[[NDArray[np.int64]], Sequence[str]]) -> NDArray[np.int64]:
    """Places of the highest values, without sorting all: ascending, `[count]`, or all where there are fewer.

    Args:
        values: `[n]`, none NaN.
        count: how many are wanted, at least 1.
        names: places → names, asked for where several values equal the least that stays: the first names stay.
    """
    if count >= len(values):
        return np.arange(len(values))
    least = np.partition(values, len(values) - count)[len(values) - count]
    above, tied = np.flatnonzero(values > least), np.flatnonzero(values == least)
    wanted = count - len(above)
    if len(tied) > wanted:
        order = sorted(zip(names(tied), tied.tolist(), strict=True))
        tied = np.array([place for _, place in order[:wanted]], np.int64)
    return np.sort(np.concatenate([above, tied]))
