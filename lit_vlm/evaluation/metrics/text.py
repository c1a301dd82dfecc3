"""Agreement of a short answer with the expected one (SQuAD: Rajpurkar et al. 2016, section 6.1)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

from lit_vlm.evaluation.metrics.mean import MeanScore

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise_answer(text: str) -> str:
    """Lower case, without punctuation, articles and extra spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, expected: str) -> float:
    """1 if both texts are the same after normalisation, else 0."""
    return float(normalise_answer(answer) == normalise_answer(expected))


def token_f1(answer: str, expected: str) -> float:
    """Harmonic mean of precision and recall over words, after normalisation."""
    given, wanted = normalise_answer(answer).split(), normalise_answer(expected).split()
    if not given or not wanted:
        return float(given == wanted)
    common = sum((Counter(given) & Counter(wanted)).values())
    return 2 * common / (len(given) + len(wanted))


class ExactMatch(MeanScore):
    """Share of answers that are one of the references; see `exact_match`."""

    @staticmethod
    def of(answer: str, references: Sequence[str]) -> float:
        """The best reference counts."""
        return max(exact_match(answer, reference) for reference in references)


class TokenF1(MeanScore):
    """Mean F1 of words; see `token_f1`."""

    @staticmethod
    def of(answer: str, references: Sequence[str]) -> float:
        """The best reference counts."""
        return max(token_f1(answer, reference) for reference in references)
