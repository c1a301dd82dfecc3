"""The step that looks at texts: their length, their language, blocked patterns, repetition."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from lit_vlm.data.curation.step import Measure, Measured, Sample, Step, Verdict
from lit_vlm.data.curation.verdicts import Words, first_of, refuse_empty
from lit_vlm.data.records import Record
from lit_vlm.data.records import Text as TextPart

GRAM = 4
"""Words of a sequence whose repetition is counted: seq-rep-4 (arXiv 1908.04319, section 4.1)."""


def learned_text(record: Record) -> str:
    """What is trained on: the texts of assistants and documents, and those that the record itself supervises."""
    return " ".join(
        part.text
        for message in record.messages
        for part in message.content
        if isinstance(part, TextPart)
        and (part.loss if part.loss is not None else message.role in ("assistant", "document"))
    )


class TextLength(Measure):
    """Words (between white space) and characters of what is trained on, and the share of it that repeats.

    The share is seq-rep-4: 1 − different sequences of four words / all such sequences; 0 for shorter texts.
    """

    level: ClassVar[Literal["record", "picture"]] = "record"

    @property
    def columns(self) -> Mapping[str, np.dtype[Any]]:
        """`words`, `characters` and `repetition`."""
        whole = np.dtype(np.int32)
        return {"words": whole, "characters": whole, "repetition": np.dtype(np.float64)}

    def __call__(self, samples: Sequence[Sample]) -> Mapping[str, NDArray[Any]]:
        """Lengths of all records: `[n]` each."""
        texts = [learned_text(sample.record).strip() for sample in samples]
        words = [text.split() for text in texts]
        return {
            "words": np.array([len(one) for one in words]),
            "characters": np.array([len(text) for text in texts]),
            "repetition": np.array([repetition(one) for one in words]),
        }


def repetition(words: Sequence[str]) -> float:
    """Share of sequences of four words that occurred before, 0 to 1 (seq-rep-4)."""
    grams = [tuple(words[i : i + GRAM]) for i in range(len(words) - GRAM + 1)]
    return (len(grams) - len(set(grams))) / len(grams) if grams else 0.0


class TextLanguage(Measure):
    """The most likely language of what is trained on (ISO 639), and its probability, by py3langid.

    Texts without a letter have the language "" and the probability 0.
    """

    level: ClassVar[Literal["record", "picture"]] = "record"

    @property
    def columns(self) -> Mapping[str, np.dtype[Any]]:
        """`language` and `probability`."""
        return {"language": np.dtype("U8"), "probability": np.dtype(np.float32)}

    def __call__(self, samples: Sequence[Sample]) -> Mapping[str, NDArray[Any]]:
        """Languages of all records: `[n]` each."""
        detector = language_detector()
        texts = [learned_text(sample.record) for sample in samples]
        found = [detector.classify(t) if any(map(str.isalpha, t)) else ("", 0.0) for t in texts]
        return {
            "language": np.array([language for language, _ in found], "U8"),
            "probability": np.array([probability for _, probability in found]),
        }


@cache
def language_detector() -> Any:
    """The detector of py3langid, with probabilities; it is loaded once in a process.

    Raises:
        ValueError: when py3langid is not installed.
    """
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ModuleNotFoundError as error:
        raise ValueError(
            "languages are told apart by py3langid, which is not installed: pip install 'lit-vlm[curation]'"
        ) from error
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


class TextPatterns(Measure):
    """Number of the first of several patterns that is found in any text of a record, from 0; -1 where none is.

    Args:
        patterns: regular expressions, as of Python's `re`.
    """

    level: ClassVar[Literal["record", "picture"]] = "record"

    def __init__(self, patterns: Sequence[str]) -> None:
        self.patterns = list(patterns)

    @property
    def columns(self) -> Mapping[str, np.dtype[Any]]:
        """`pattern`."""
        return {"pattern": np.dtype(np.int32)}

    def __call__(self, samples: Sequence[Sample]) -> Mapping[str, NDArray[Any]]:
        """First patterns of all records: `[n]`."""
        compiled = [re.compile(pattern) for pattern in self.patterns]
        texts = ["\n".join(message.text for message in sample.record.messages) for sample in samples]
        found = [next((i for i, p in enumerate(compiled) if p.search(text)), -1) for text in texts]
        return {"pattern": np.array(found)}


class Text(Step):
    """Drops records by the text that is trained on; blocked patterns are looked for in questions, too.

    Args:
        min_words: least number of words, which are what stands between white space. Chinese or Japanese has none: take
            characters there.
        max_words: largest number of words.
        min_characters: least number of characters.
        max_characters: largest number of characters.
        languages: codes of ISO 639 that stay, such as `[en]`; the most likely language of the text must be one of them.
        min_probability: least probability of that language. Short captions seldom reach 0.5.
        blocked: regular expressions of Python; a record with a text in which one is found is dropped. `(?i)` in front
            ignores case.
        max_repetition: largest share of sequences of four words that occurred before in the text, 0 to 1
            (seq-rep-4, arXiv 1908.04319).

    Raises:
        ValueError: without any limit, for a language that is not known, or a pattern that is no regular expression.
    """

    def __init__(
        self,
        min_words: int | None = None,
        max_words: int | None = None,
        min_characters: int | None = None,
        max_characters: int | None = None,
        languages: Sequence[str] | None = None,
        min_probability: float = 0.0,
        blocked: Sequence[str] | None = None,
        max_repetition: float | None = None,
    ) -> None:
        self.min_words, self.max_words = min_words, max_words
        self.min_characters, self.max_characters = min_characters, max_characters
        self.languages = list(languages) if languages else None
        self.min_probability = min_probability
        self.blocked = list(blocked) if blocked else None
        self.max_repetition = max_repetition
        refuse_empty(self, "min_probability")
        if min_probability and not self.languages:
            raise ValueError("min_probability is that of one of the languages: set languages, too")
        self._check_patterns()
        if self.languages and (unknown := sorted(set(self.languages) - set(language_detector().labels))):
            raise ValueError(f"languages names {unknown}; known are {', '.join(language_detector().labels)}")

    def _check_patterns(self) -> None:
        for pattern in self.blocked or ():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"blocked: {pattern!r} is no regular expression: {error}") from error

    def measures(self) -> Sequence[Measure]:
        """Lengths, and languages and patterns where these are asked for."""
        language = (TextLanguage(),) if self.languages else ()
        return (TextLength(), *language, *((TextPatterns(self.blocked),) if self.blocked else ()))

    def decide(
        self,
        table: Measured,
        candidates: NDArray[np.int64],
        rng: np.random.Generator,
        against: Measured | None,
    ) -> Verdict:
        """Drop by length, `blocked`, `languages`, `min_probability` and `max_repetition`, in this order."""

        def column(measure: Measure, name: str) -> NDArray[np.float64]:
            return table.column(measure, name)[candidates].astype(np.float64)

        words, characters = column(TextLength(), "words"), column(TextLength(), "characters")
        repeated = column(TextLength(), "repetition")
        limits = {
            "min_words": (words, None if self.min_words is None else words < self.min_words),
            "max_words": (words, None if self.max_words is None else words > self.max_words),
            "min_characters": (characters, None if self.min_characters is None else characters < self.min_characters),
            "max_characters": (characters, None if self.max_characters is None else characters > self.max_characters),
        }
        noted: dict[str, tuple[NDArray[np.int64], Sequence[str]]] = {}
        if self.blocked:
            pattern = column(TextPatterns(self.blocked), "pattern").astype(np.int64)
            noted["blocked"] = (pattern, self.blocked)
            limits["blocked"] = (pattern.astype(np.float64), pattern >= 0)
        if self.languages:
            language, words_of = _languages(table, candidates)
            noted["languages"] = noted["min_probability"] = (language, words_of)
            probability = column(TextLanguage(), "probability")
            wanted = [number for number, word in enumerate(words_of) if word in self.languages]
            limits["languages"] = (probability, ~np.isin(language, wanted))
            limits["min_probability"] = (probability, probability < self.min_probability)
        limits["max_repetition"] = (repeated, None if self.max_repetition is None else repeated > self.max_repetition)
        verdict = first_of(limits, "words", words)
        return replace(verdict, details=_details(verdict, candidates, noted))


def _languages(table: Measured, candidates: NDArray[np.int64]) -> tuple[NDArray[np.int64], Sequence[str]]:
    """Number of each candidate's language, and the languages; as words they would take 32 bytes each."""
    words = sorted(["", *language_detector().labels])
    known = np.array(words)
    numbers = [np.searchsorted(known, piece).astype(np.int16) for _, piece in table.pieces(TextLanguage(), "language")]
    return np.concatenate(numbers)[candidates].astype(np.int64), words


def _details(
    verdict: Verdict, candidates: NDArray[np.int64], noted: Mapping[str, tuple[NDArray[np.int64], Sequence[str]]]
) -> Words:
    """The pattern or the language that each record is dropped for."""
    number, words = np.full(len(candidates), -1), list[str]()
    for reason, (found, of_reason) in noted.items():
        mine = verdict.codes == verdict.reasons.index(reason) + 1
        number[mine] = found[mine] + len(words)
        words += of_reason
    told = number >= 0
    return Words(candidates[told], number[told], words)
