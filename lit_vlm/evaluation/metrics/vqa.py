"""Scores of short answers: VQA accuracy, relaxed accuracy and ANLS, with each benchmark's own normalisation."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lit_vlm.evaluation.metrics.mean import MeanScore

NUMBERS = {
    word: str(value)
    for value, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
} | {"none": "0"}
ARTICLES = {"a", "an", "the"}
PUNCTUATION = (";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`", ",", "?", "!")
FORMS = (
    "ain't", "aren't", "can't", "could've", "couldn't", "couldn't've", "didn't", "doesn't", "don't", "hadn't",
    "hadn't've", "hasn't", "haven't", "he'd", "he'd've", "he's", "how'd", "how'll", "how's", "I'd've", "I'm",
    "I've", "isn't", "it'd", "it'd've", "it'll", "let's", "ma'am", "mightn't", "mightn't've", "might've",
    "mustn't", "must've", "needn't", "not've", "o'clock", "oughtn't", "'ow's'at", "shan't", "she'd've",
    "should've", "shouldn't", "shouldn't've", "somebody'd've", "somebody'll", "somebody's", "someone'd",
    "someone'd've", "someone'll", "someone's", "something'd", "something'd've", "something'll", "that's",
    "there'd", "there'd've", "there're", "there's", "they'd", "they'd've", "they'll", "they're", "they've",
    "'twas", "wasn't", "we'd've", "we've", "weren't", "what'll", "what're", "what's", "what've", "when's",
    "where'd", "where's", "where've", "who'd", "who'd've", "who'll", "who's", "who've", "why'll", "why're",
    "why's", "won't", "would've", "wouldn't", "wouldn't've", "y'all", "y'all'll", "y'all'd've", "you'd",
    "you'd've", "you'll", "you're", "you've",
)  # fmt: skip


def _spellings(form: str) -> list[str]:
    """Spellings of a contraction that miss one apostrophe."""
    places = [index for index, letter in enumerate(form) if letter == "'"]
    return [form[:place] + form[place + 1 :] for place in places]


CONTRACTIONS = {spelling: form for form in FORMS for spelling in _spellings(form)}
_COMMA_IN_NUMBER = re.compile(r"(\d)(\,)(\d)")
_PERIOD = re.compile(r"\.(?!\d)")
"""Periods that are removed. By a slip, the official code removes those behind a digit too: "5." becomes "5"."""


def normalise_vqa(text: str) -> str:
    """An answer as VQA's official evaluation compares it: punctuation, numbers as digits, articles, contractions.

    Source: Antol et al. 2015, and the evaluation code of visualqa.org.
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    whole = text
    for mark in PUNCTUATION:
        # A mark beside a space, or in an answer with a number like 1,000, is removed; any other becomes a space.
        glued = f"{mark} " in whole or f" {mark}" in whole or _COMMA_IN_NUMBER.search(whole) is not None
        text = text.replace(mark, "" if glued else " ")
    text = _PERIOD.sub("", text)
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """Mean over references, leaving each out, of min(1, matches among the others / 3).

    Answer and references are always normalised. The official script does not where all references are the same, so
    that "Yes" is wrong there; papers normalise answers before they hand them in, as TextVQA's script does.
    """
    given, wanted = normalise_vqa(answer), [normalise_vqa(reference) for reference in references]
    if len(wanted) == 1:
        return float(given == wanted[0])
    matches = sum(given == reference for reference in wanted)
    return sum(min(1.0, (matches - (given == reference)) / 3) for reference in wanted) / len(wanted)


def relaxed_match(answer: str, reference: str, tolerance: float = 0.05) -> float:
    """1 for a number within 5 % of the reference, or equal text, else 0 (ChartQA, Masry et al. 2022, section 5.1)."""
    given, wanted = _number(answer), _number(reference)
    if given is not None and wanted:
        return float(abs(given - wanted) / abs(wanted) <= tolerance)
    return float(answer.strip().lower() == reference.strip().lower())


def _number(text: str) -> float | None:
    text = text.strip()
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def edit_distance(a: str, b: str) -> int:
    """Least number of inserted, deleted and replaced characters (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (left != right))
    return row[-1]


def anls(answer: str, references: Sequence[str], threshold: float = 0.5) -> float:
    """1 − edit distance over the longer length, towards the closest reference; 0 below the threshold.

    Source: Biten et al. 2019, equation 1; without regard to case and surrounding or double spaces.
    """
    given = " ".join(answer.lower().split())
    best = 0.0
    for reference in references:
        wanted = " ".join(reference.lower().split())
        longest = max(len(given), len(wanted))
        best = max(best, 1 - edit_distance(given, wanted) / longest if longest else 1.0)
    return best if best >= threshold else 0.0


class VQAAccuracy(MeanScore):
    """Official accuracy of VQAv2, OK-VQA, TextVQA and VizWiz; see `vqa_accuracy`."""

    @staticmethod
    def of(answer: str, references: Sequence[str]) -> float:
        """See `vqa_accuracy`."""
        return vqa_accuracy(answer, references)


class RelaxedAccuracy(MeanScore):
    """ChartQA; see `relaxed_match`."""

    @staticmethod
    def of(answer: str, references: Sequence[str]) -> float:
        """The best reference counts."""
        return max(relaxed_match(answer, reference) for reference in references)


class ANLS(MeanScore):
    """DocVQA; see `anls`."""

    @staticmethod
    def of(answer: str, references: Sequence[str]) -> float:
        """See `anls`."""
        return anls(answer, references)


class Accuracy(MeanScore):
    """Share of answers that are one of the references after lower-casing and without a final period (GQA, choices)."""

    @staticmethod
    def of(answer: str, references: Sequence[str]) -> float:
        """1 if it is one of the references, else 0."""
        given = answer.strip().rstrip(".").lower()
        return float(any(given == reference.strip().rstrip(".").lower() for reference in references))
