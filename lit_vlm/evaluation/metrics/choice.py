"""Scores of yes-or-no questions and of multiple choice."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_LETTER = re.compile(r"^\s*(?:\(?([A-Za-z])\)|([A-Z])[.:,])")
"""A letter at the beginning, in brackets or with a mark behind it: "A man" does not name option A."""
_SAYS_LETTER = re.compile(r"(?i:answer|option|choice)(?i: is)?:?\s*\(?([A-Z])\)?(?:[\s.,)]|$)")


def chosen_letter(answer: str, options: Sequence[str]) -> str:
    """The letter of the option that an answer names; "" if it names none.

    An answer may be the letter alone, the option's text, both, "the answer is B", or the letter with a mark behind it.

    Args:
        answer: generated text.
        options: texts of the options, in the order of their letters.
    """
    letters = LETTERS[: len(options)]
    text = answer.strip().rstrip(".").lower()
    if (bare := text.strip("()").upper()) and bare in letters and len(bare) == 1:
        return bare
    for letter, option in zip(letters, options, strict=False):
        wanted = option.strip().rstrip(".").lower()
        if text in (wanted, f"{letter.lower()} {wanted}"):
            return letter
    if (match := _SAYS_LETTER.search(answer)) and match[1] in letters:
        return match[1]
    if (match := _LETTER.match(answer)) and (letter := (match[1] or match[2]).upper()) in letters:
        return letter
    return ""


def yes_or_no(answer: str) -> str:
    """`yes` or `no`, as POPE reads an answer: `no` if its first sentence has the word "no" or "not"."""
    words = answer.split(".", 1)[0].replace(",", "").lower().split()
    return "no" if "no" in words or "not" in words else "yes"


def first_word_yes_or_no(answer: str) -> str:
    """`yes`, `no` or `other`, as MME reads an answer, by its first four letters; `other` is always wrong."""
    begin = answer.strip().lower()[:4]
    return "yes" if "yes" in begin else "no" if "no" in begin else "other"


class YesNoF1(Metric):
    """POPE: F1 of "yes", accuracy, precision, recall and the share of "yes" (Li et al. 2023, section 5)."""

    counts: Tensor
    higher_is_better = True
    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        # rows: the answer is no, yes; columns: the reference is no, yes
        self.add_state("counts", torch.zeros(2, 2, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, answer: str, reference: str) -> None:
        """Add one answer; the reference is `yes` or `no`."""
        self.counts[int(yes_or_no(answer) == "yes"), int(reference == "yes")] += 1

    def compute(self) -> dict[str, Tensor]:
        """`f1`, `accuracy`, `precision`, `recall` and `yes`, from 0 to 1."""
        (true_no, missed), (false_yes, hit) = self.counts
        total = self.counts.sum().clamp(min=1)
        precision, recall = hit / (hit + false_yes).clamp(min=1), hit / (hit + missed).clamp(min=1)
        f1 = 2 * hit / (2 * hit + false_yes + missed).clamp(min=1)
        return {
            "f1": f1,
            "accuracy": (hit + true_no) / total,
            "precision": precision,
            "recall": recall,
            "yes": (hit + false_yes) / total,
        }
