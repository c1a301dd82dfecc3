"""Answer metrics on small cases worked out by hand."""

from __future__ import annotations

import pytest

from lit_vlm.evaluation.metrics import exact_match, normalise_answer, token_f1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Cat!", "cat"),
        ("  a   red\ncat. ", "red cat"),
        ("an answer", "answer"),
        ("theatre and another", "theatre and another"),
        ("it's", "its"),
        ("3.5", "35"),
        ("the", ""),
        ("", ""),
        ("Ünï 日本", "ünï 日本"),
    ],
)
def test_normalise_answer(text: str, expected: str) -> None:
    assert normalise_answer(text) == expected


@pytest.mark.parametrize(
    ("answer", "expected", "score"),
    [("The cat.", "cat", 1.0), ("cats", "cat", 0.0), ("", "the", 1.0), ("", "cat", 0.0), ("red cat", "cat red", 0.0)],
)
def test_exact_match(answer: str, expected: str, score: float) -> None:
    assert exact_match(answer, expected) == score


@pytest.mark.parametrize(
    ("answer", "expected", "score"),
    [
        ("the red cat", "A red cat!", 1.0),
        ("cat red", "red cat", 1.0),
        ("red cat", "red dog", 0.5),
        ("cat", "red cat", 2 / 3),  # precision 1, recall 1/2
        ("cat cat", "cat", 2 / 3),  # a word counts as often as both have it
        ("cat cat dog", "cat dog dog", 2 / 3),
        ("dog", "cat", 0.0),
        ("", "", 1.0),
        ("the", "", 1.0),
        ("", "cat", 0.0),
        ("cat", "", 0.0),
    ],
)
def test_token_f1(answer: str, expected: str, score: float) -> None:
    assert token_f1(answer, expected) == pytest.approx(score)
    assert token_f1(expected, answer) == pytest.approx(score)
