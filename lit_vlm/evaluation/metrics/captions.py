"""CIDEr-D of captions, without Java."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

MAX_N, SIGMA = 4, 6.0
_DROPPED = set("'`.?!,:;-\"“”‘–—…") | {"...", "--", "''", "``"}
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
"""Brackets become these words, which stay: the reference code drops "-LRB-", and its words are in lower case."""
_PARTS = {"cannot": "can not", "gonna": "gon na", "gotta": "got ta", "wanna": "wan na", "gimme": "gim me"}
_CLITIC = re.compile(r"^(.+)(n't|'s|'re|'ve|'ll|'d|'m)$")
_TOKEN = re.compile(
    r"""
    (?:https?://|www\.)\S+                                      # an address
    | 'n' | c\#
    | (?:mr|mrs|ms|dr|st|jr|sr|vs|etc|prof|ave|blvd)\. | no\.(?=\ \d)
    | [a-z]\.(?:[a-z]\.)*                                       # p.m., u.s., a single letter
    | \d+(?:[.,:/]\d+)*\w*(?:-\w+)*(?:'(?!n')[a-z]+)?            # 1,000, 12:30, 1/2, 5th, 3-year-old
    | [^\W_]\w*(?:[-/]\w+)*(?:'(?!n')[a-z]+)?                   # words, with what an apostrophe binds
    | -+ | \.\.\. | [^\w\s]
    """,
    re.VERBOSE,
)

Grams = Counter[tuple[str, ...]]


def tokenize_caption(text: str) -> list[str]:
    """Words of a caption in lower case without punctuation, as the official evaluation gets them from Stanford's tools.

    A period after a single letter stays; the official tokenizer, which gets all captions as one text, decides by the
    caption that follows.
    """
    words: list[str] = []
    for token in _TOKEN.findall(text.lower().replace("’", "'")):
        if token in _DROPPED or token.startswith("--"):
            continue
        if match := _CLITIC.match(token):
            words += match.groups()
        else:
            words += _PARTS.get(token, _BRACKETS.get(token, token)).split()
    return words


def count_grams(words: Sequence[str]) -> Grams:
    """Counts of all n-grams of one to four words."""
    return Counter(tuple(words[i : i + n]) for n in range(1, MAX_N + 1) for i in range(len(words) - n + 1))


class Cider(Metric):
    """CIDEr-D: tf-idf-weighted n-grams of a caption against its references (Vedantam et al. 2015, section 5).

    The weights come from the references of all pictures that are scored, so scores of subsets differ from that of the
    whole. Multiply by 100 for the figures that papers print.
    """

    higher_is_better = True
    full_state_update = False
    pictures: list[tuple[list[str], list[list[str]]]]

    def __init__(self) -> None:
        super().__init__()
        self.pictures = []

    def update(self, caption: str, references: Sequence[str]) -> None:
        """Add one picture's caption; raises ValueError if there are no references."""
        if not references:
            raise ValueError("CIDEr needs one reference or more for each picture")
        self.pictures.append((tokenize_caption(caption), [tokenize_caption(reference) for reference in references]))

    def reset(self) -> None:
        """Forget all pictures."""
        super().reset()
        self.pictures = []

    def compute(self) -> Tensor:
        """The mean over pictures, from 0 to 10."""
        return torch.tensor(self.scores(), dtype=torch.float64).mean() if self.pictures else torch.zeros(())

    def scores(self) -> list[float]:
        """The score of each picture, from 0 to 10."""
        counted = [(count_grams(words), [count_grams(ref) for ref in refs]) for words, refs in self.pictures]
        documents: Grams = Counter(gram for _, refs in counted for gram in set().union(*refs))
        log_total = math.log(float(len(counted)))
        return [_score(candidate, refs, documents, log_total) for candidate, refs in counted]


def _score(
    candidate: Grams, references: Sequence[Grams], documents: Mapping[tuple[str, ...], int], log_n: float
) -> float:
    own, norms, length = _vector(candidate, documents, log_n)
    total = 0.0
    for reference in references:
        other, other_norms, other_length = _vector(reference, documents, log_n)
        penalty = math.exp(-((length - other_length) ** 2) / (2 * SIGMA**2))
        for n in range(MAX_N):
            # Clipped, so that a caption gains nothing by repeating a word (CIDEr-D).
            value = sum(
                min(weight, other[n].get(gram, 0.0)) * other[n].get(gram, 0.0) for gram, weight in own[n].items()
            )
            if norms[n] and other_norms[n]:
                value /= norms[n] * other_norms[n]
            total += value * penalty
    return 10.0 * total / MAX_N / len(references)


def _vector(
    grams: Grams, documents: Mapping[tuple[str, ...], int], log_n: float
) -> tuple[list[dict[tuple[str, ...], float]], list[float], int]:
    """Tf-idf weights of the n-grams for each n, their norms, and the number of bigrams, CIDEr-D's length."""
    vectors: list[dict[tuple[str, ...], float]] = [{} for _ in range(MAX_N)]
    length = 0
    for gram, count in grams.items():
        vectors[len(gram) - 1][gram] = count * (log_n - math.log(max(1.0, documents.get(gram, 0))))
        length += count if len(gram) == 2 else 0
    return vectors, [math.sqrt(sum(weight**2 for weight in vector.values())) for vector in vectors], length
