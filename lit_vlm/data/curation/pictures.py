"""Steps that look at pictures one by one: their size, their encoding, and the score of a classifier.

A record is dropped if any of its pictures fails; records without pictures stay.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage

from lit_vlm.data.curation.step import Measure, Measured, Sample, Step, Verdict
from lit_vlm.data.curation.table import of_records
from lit_vlm.data.curation.verdicts import first_of, refuse_empty


class PictureSize(Measure):
    """Width and height of each upright picture in pixels."""

    level: ClassVar[Literal["record", "picture"]] = "picture"

    @property
    def columns(self) -> Mapping[str, np.dtype[Any]]:
        """`width` and `height`."""
        return {"width": np.dtype(np.int32), "height": np.dtype(np.int32)}

    def __call__(self, samples: Sequence[Sample]) -> Mapping[str, NDArray[Any]]:
        """Sizes of all pictures: `[p]` each."""
        sizes = np.array([picture.size for sample in samples for picture in sample.pictures], np.int32)
        return {"width": sizes[:, 0], "height": sizes[:, 1]}


class PictureFile(Measure):
    """Encoding of each picture as Pillow names it, size of its file in bytes, and whether it is an animation."""

    level: ClassVar[Literal["record", "picture"]] = "picture"

    @property
    def columns(self) -> Mapping[str, np.dtype[Any]]:
        """`format`, `bytes` and `animated`."""
        return {"format": np.dtype("U12"), "bytes": np.dtype(np.int64), "animated": np.dtype(np.bool_)}

    def __call__(self, samples: Sequence[Sample]) -> Mapping[str, NDArray[Any]]:
        """Facts of all pictures: `[p]` each."""
        formats, sizes, animated = [], [], []
        for content in (content for sample in samples for content in sample.contents):
            with PILImage.open(io.BytesIO(content)) as opened:
                formats.append(opened.format or "")
                animated.append(bool(getattr(opened, "is_animated", False)))
            sizes.append(len(content))
        return {"format": np.array(formats, "U12"), "bytes": np.array(sizes), "animated": np.array(animated)}


class Size(Step):
    """Drops records with a picture that is too small, or too long for its width.

    EVE keeps pictures of at least 448 × 448 (arXiv 2406.11832): `min_side: 448`.

    Args:
        min_side: least length of the shorter side, in pixels.
        min_area: least number of pixels.
        max_aspect: largest ratio of the longer side to the shorter one.

    Raises:
        ValueError: without any limit, or for one that cannot be met.
    """

    def __init__(
        self, min_side: int | None = None, min_area: int | None = None, max_aspect: float | None = None
    ) -> None:
        self.min_side, self.min_area, self.max_aspect = min_side, min_area, max_aspect
        refuse_empty(self)
        if max_aspect is not None and max_aspect < 1:
            raise ValueError(f"max_aspect is {max_aspect}; a ratio of the longer to the shorter side is at least 1")

    def measures(self) -> Sequence[Measure]:
        """Sizes of pictures."""
        return (PictureSize(),)

    def decide(
        self,
        table: Measured,
        candidates: NDArray[np.int64],
        rng: np.random.Generator,
        against: Measured | None,
    ) -> Verdict:
        """Drop by `min_side`, `min_area` and `max_aspect`, in this order; the value is that of the worst picture."""
        width, height = (table.column(PictureSize(), name).astype(np.int64) for name in ("width", "height"))
        short, long = np.minimum(width, height), np.maximum(width, height)
        side = of_records(table, short, candidates, np.minimum, np.nan)
        area = of_records(table, width * height, candidates, np.minimum, np.nan)
        aspect = of_records(table, long / np.maximum(short, 1), candidates, np.maximum, np.nan)
        return first_of(
            {
                "min_side": (side, None if self.min_side is None else side < self.min_side),
                "min_area": (area, None if self.min_area is None else area < self.min_area),
                "max_aspect": (aspect, None if self.max_aspect is None else aspect > self.max_aspect),
            },
            "shorter side (px)",
            side,
        )


class Format(Step):
    """Drops records with a picture in an unwanted encoding.

    Args:
        formats: encodings that stay, as Pillow names them: `[JPEG, PNG, WEBP]`. A frame of a video counts as JPEG.
        min_bytes: least size of an encoded picture: tiny files are mostly placeholders.
        animated: whether animations stay, of which only the first frame is ever read.

    Raises:
        ValueError: when nothing would be dropped, or for a format that Pillow does not know.
    """

    def __init__(
        self, formats: Sequence[str] | None = None, min_bytes: int | None = None, animated: bool = True
    ) -> None:
        self.formats, self.min_bytes, self.animated = list(formats) if formats else None, min_bytes, animated
        if animated:
            refuse_empty(self, "animated")
        known = set(PILImage.registered_extensions().values())
        if unknown := sorted(set(self.formats or ()) - known):
            raise ValueError(f"formats names {unknown}, which Pillow does not read; it reads {sorted(known)}")

    def measures(self) -> Sequence[Measure]:
        """Facts of the encoded pictures."""
        return (PictureFile(),)

    def decide(
        self,
        table: Measured,
        candidates: NDArray[np.int64],
        rng: np.random.Generator,
        against: Measured | None,
    ) -> Verdict:
        """Drop by `formats`, `min_bytes` and `animated`, in this order; the value is the size of the smallest file."""
        size = of_records(table, table.column(PictureFile(), "bytes"), candidates, np.minimum, np.nan)
        animated = of_records(table, table.column(PictureFile(), "animated"), candidates, np.maximum, 0) > 0
        # Piece by piece: as words, the formats of all pictures take fifty bytes each.
        wrong = [~np.isin(piece, self.formats or ()) for _, piece in table.pieces(PictureFile(), "format")]
        other = of_records(table, np.concatenate([np.zeros(0, np.bool_), *wrong]), candidates, np.maximum, 0) > 0
        return first_of(
            {
                "formats": (size, None if self.formats is None else other),
                "min_bytes": (size, None if self.min_bytes is None else size < self.min_bytes),
                "animated": (size, None if self.animated else animated),
            },
            "file (bytes)",
            size,
        )


Classifier = Callable[[list[PILImage.Image]], Sequence[float]]
"""Scores RGB pictures, one finite number for each: for watermarks, looks, safety. An object of a class from outside.

Public attributes of the object are its settings, and are written down. What it loads belongs into attributes that
begin with an underscore, and is loaded at the first call: the object is sent to worker processes, and its scores are
kept by class and settings, so that new weights need a setting that names them.
"""


class PictureScore(Measure):
    """The score of each picture.

    Args:
        classifier: gives the scores.
    """

    level: ClassVar[Literal["record", "picture"]] = "picture"

    def __init__(self, classifier: Classifier) -> None:
        self.classifier = classifier

    @property
    def columns(self) -> Mapping[str, np.dtype[Any]]:
        """`score`."""
        return {"score": np.dtype(np.float64)}

    def __call__(self, samples: Sequence[Sample]) -> Mapping[str, NDArray[Any]]:
        """Scores of all pictures: `[p]`.

        Raises:
            ValueError: for scores that are not one finite number per picture.
        """
        pictures = [picture for sample in samples for picture in sample.pictures]
        scores = np.asarray(self.classifier(pictures), np.float64)
        if scores.shape != (len(pictures),) or not np.isfinite(scores).all():
            raise ValueError(
                f"{type(self.classifier).__name__} gives scores {list(scores.shape)} for {len(pictures)} pictures; "
                "expected one finite number for each"
            )
        return {"score": scores}


class Score(Step):
    """Drops records with a picture whose score is out of bounds, such as one that shows a watermark.

    The kit ships no weights for this: any class is a classifier whose objects take a list of pictures.

    Args:
        classifier: gives one number per picture.
        min_score: least score that stays.
        max_score: largest score that stays.

    Raises:
        ValueError: without a bound.
    """

    def __init__(self, classifier: Classifier, min_score: float | None = None, max_score: float | None = None) -> None:
        self.classifier, self.min_score, self.max_score = classifier, min_score, max_score
        refuse_empty(self, "classifier")

    def measures(self) -> Sequence[Measure]:
        """Scores of pictures."""
        return (PictureScore(self.classifier),)

    def decide(
        self,
        table: Measured,
        candidates: NDArray[np.int64],
        rng: np.random.Generator,
        against: Measured | None,
    ) -> Verdict:
        """Drop by `min_score` and `max_score`; the value is the lowest or the highest score of the record."""
        scores = table.column(PictureScore(self.classifier), "score")
        low = of_records(table, scores, candidates, np.minimum, np.nan)
        high = of_records(table, scores, candidates, np.maximum, np.nan)
        return first_of(
            {
                "min_score": (low, None if self.min_score is None else low < self.min_score),
                "max_score": (high, None if self.max_score is None else high > self.max_score),
            },
            f"score of {type(self.classifier).__name__}",
            low if self.max_score is None else high,
        )
