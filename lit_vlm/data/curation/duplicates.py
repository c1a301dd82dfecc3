"""Records that show what earlier ones show, or what benchmarks ask about."""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from lit_vlm.data.curation.groups import equal_groups, repeated
from lit_vlm.data.curation.hashes import content_hash, perceptual_hash, pixel_hash
from lit_vlm.data.curation.neighbours import Rows
from lit_vlm.data.curation.rows import picture_rows
from lit_vlm.data.curation.step import Measure, Measured, Sample, Step, Verdict
from lit_vlm.data.given import open_path
from lit_vlm.data.sources import Source

CODE = "code"
REASONS = ("in_benchmark", "duplicate")
ADVICE = "give a source as class_path and init_args"


class PictureHash(Measure):
    """A hash of each picture, exact or perceptual.

    Args:
        of: `content`, its encoded bytes; `pixels`, what they decode to; or `looks`, about what it shows.
        bits: of a hash of looks.
    """

    level: ClassVar[Literal["record", "picture"]] = "picture"

    def __init__(self, of: Literal["content", "pixels", "looks"], bits: int = 128) -> None:
        self.of, self.bits = of, bits

    @property
    def columns(self) -> Mapping[str, np.dtype[Any]]:
        """One column of codes."""
        return {CODE: np.dtype((np.uint8, (self.bits // 8,)))}

    def __call__(self, samples: Sequence[Sample]) -> Mapping[str, NDArray[Any]]:
        """The codes of all pictures: `[p, bits / 8]`."""
        if self.of == "content":
            found = [content_hash(content) for sample in samples for content in sample.contents]
        else:
            pictures = [picture for sample in samples for picture in sample.pictures]
            exact = self.of == "pixels"
            found = [pixel_hash(picture) if exact else perceptual_hash(picture, self.bits) for picture in pictures]
        return {CODE: np.stack(found)}


class TextHash(Measure):
    """A hash of all texts of each record, 128 bits."""

    level: ClassVar[Literal["record", "picture"]] = "record"

    @property
    def columns(self) -> Mapping[str, np.dtype[Any]]:
        """One column of codes."""
        return {CODE: np.dtype((np.uint8, (16,)))}

    def __call__(self, samples: Sequence[Sample]) -> Mapping[str, NDArray[Any]]:
        """The codes of all records: `[n, 16]`."""
        texts = ["\0".join(message.text.strip() for message in sample.record.messages) for sample in samples]
        return {CODE: np.stack([content_hash(text.encode()) for text in texts])}


class Duplicates(Step):
    """Drops records whose pictures earlier records show, and those that show a picture of a benchmark.

    Records are taken in order, source by source as the file lists them, so that of equal ones the first stays. A record
    with several pictures goes if each of them is shown by a record that stays; one without pictures stays. A single
    picture of a benchmark is enough for a record to go: it is listed with the questions about that picture.

    Args:
        compared: the measure of pictures that is compared; its only column is codes or vectors.
        against: benchmarks: paths of files, folders or converted sets, or sources.
        same_text: whether records are duplicates only if their texts are equal, too: different questions about one
            picture then stay. Pictures of benchmarks are found whatever the text.

    Raises:
        ValueError: for a benchmark that does not exist or is not recognised.
    """

    def __init__(self, compared: Measure, against: Sequence[str | Source] = (), same_text: bool = False) -> None:
        self._compared = compared
        self.benchmarks = [one if isinstance(one, Source) else open_path(one, ADVICE) for one in against]
        _refuse_equal(self.benchmarks)
        self.same_text = same_text

    @abstractmethod
    def groups(self, table: Measured, rows: Rows) -> Rows:
        """For each of some rows of the measure the place of its group's first one: `[r]`."""

    @abstractmethod
    def matches(self, table: Measured, rows: Rows, against: Measured) -> tuple[Rows, Rows]:
        """All pairs of a place in `rows` and a picture of `against` that are the same: `[m]`, `[m]`."""

    def measures(self) -> Sequence[Measure]:
        """What is compared."""
        return (self._compared, TextHash()) if self.same_text else (self._compared,)

    def against(self) -> Sequence[Source]:
        """The benchmarks."""
        return self.benchmarks

    def decide(
        self, table: Measured, candidates: NDArray[np.int64], rng: np.random.Generator, against: Measured | None
    ) -> Verdict:
        """Drop what a benchmark shows, and then what is there twice; list the questions that were found."""
        codes = np.zeros(len(candidates), np.int8)
        rows, owners = picture_rows(table, candidates)
        details: dict[int, str] = {}
        lists: dict[str, list[dict[str, str]]] = {}
        if against is not None and against.offsets[-1]:
            places, pictures = self.matches(table, rows, against)
            codes[owners[places]] = 1
            details, lists["questions"] = _questions(table, candidates[owners[places]], against, pictures)
        clean, left = np.flatnonzero(codes == 0), np.flatnonzero(codes[owners] == 0)
        groups, of_record = self.groups(table, rows[left]), np.searchsorted(clean, owners[left])
        if self.same_text:
            texts = equal_groups(table.column(TextHash(), CODE)[candidates[clean]])
            groups = np.unique(np.stack([groups, texts[of_record]]), axis=1, return_inverse=True)[1]
        of = repeated(groups, of_record, len(clean))
        again = of != np.arange(len(clean))
        codes[clean[again]] = 2
        details |= _repeats(table, candidates[clean[again]], candidates[clean[of[again]]])
        return Verdict(codes, REASONS, np.full(len(candidates), np.nan), "value", details, lists)


def _refuse_equal(benchmarks: Sequence[Source]) -> None:
    names = [source.name for source in benchmarks]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(
            f"two benchmarks have the name '{twice[0]}', by which their questions are listed: give one as class_path "
            "and init_args, with a name"
        )


def _names(table: Measured, records: Rows) -> dict[int, str]:
    """Number of each record → SOURCE:ID."""
    different = np.unique(records)
    ids = zip(different.tolist(), table.ids(different), strict=True)
    return {record: f"{table.names[table.source[record]]}:{name}" for record, name in ids}


def _repeats(table: Measured, records: Rows, of: Rows) -> dict[int, str]:
    names = _names(table, of)
    return {record: f"repeats {names[other]}" for record, other in zip(records.tolist(), of.tolist(), strict=True)}


def _questions(
    table: Measured, records: Rows, against: Measured, pictures: Rows
) -> tuple[dict[int, str], list[dict[str, str]]]:
    """Which questions of benchmarks are about pictures that records show.

    Args:
        table: of the records.
        records: numbers of records: `[m]`.
        against: of the benchmarks.
        pictures: the picture of a benchmark that each of them shows: `[m]`.

    Returns:
        number of each record → its questions; and a row for each pair of a question and a record, by question.
    """
    asked = np.searchsorted(against.offsets, pictures, side="right") - 1
    pairs = np.unique(np.stack([asked, records], 1), axis=0)
    questions, names = _names(against, pairs[:, 0]), _names(table, pairs[:, 1])
    details: dict[int, list[str]] = defaultdict(list)
    for question, record in pairs.tolist():
        details[record].append(questions[question])
    rows = [{"question": questions[question], "record": names[record]} for question, record in pairs.tolist()]
    return {record: f"pictures of {', '.join(own)}" for record, own in details.items()}, rows
