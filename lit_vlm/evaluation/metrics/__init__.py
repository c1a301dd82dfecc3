"""Metrics that torchmetrics lacks."""

from lit_vlm.evaluation.metrics.captions import Cider
from lit_vlm.evaluation.metrics.choice import YesNoF1, chosen_letter, first_word_yes_or_no, yes_or_no
from lit_vlm.evaluation.metrics.mean import MeanScore
from lit_vlm.evaluation.metrics.text import ExactMatch, TokenF1, exact_match, normalise_answer, token_f1
from lit_vlm.evaluation.metrics.vqa import (
    ANLS,
    Accuracy,
    RelaxedAccuracy,
    VQAAccuracy,
    anls,
    normalise_vqa,
    relaxed_match,
    vqa_accuracy,
)

__all__ = [
    "ANLS",
    "Accuracy",
    "Cider",
    "ExactMatch",
    "MeanScore",
    "RelaxedAccuracy",
    "TokenF1",
    "VQAAccuracy",
    "YesNoF1",
    "anls",
    "chosen_letter",
    "exact_match",
    "first_word_yes_or_no",
    "normalise_answer",
    "normalise_vqa",
    "relaxed_match",
    "token_f1",
    "vqa_accuracy",
    "yes_or_no",
]
