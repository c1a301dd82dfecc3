"""Short answers, choices, and yes or no: by hand."""

from __future__ import annotations

import pytest

from lit_vlm.evaluation.metrics import (
    ANLS,
    Accuracy,
    RelaxedAccuracy,
    VQAAccuracy,
    YesNoF1,
    anls,
    chosen_letter,
    normalise_vqa,
    relaxed_match,
    vqa_accuracy,
    yes_or_no,
)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The Cat.", "cat"),
        ("two", "2"),
        ("none", "0"),
        ("dont", "don't"),
        ("couldntve", "couldntve"),  # both apostrophes missing: not in the official table
        ("couldnt've", "couldn't've"),
        ("1,000", "1000"),
        ("red, blue", "red blue"),
        ("yes/no", "yes no"),
        ("yes / no", "yes no"),
        ("3.5", "3.5"),
        ("5.", "5"),
        ("a.b.", "ab"),
        ("t-shirt", "t shirt"),
        (" an apple\nand a pear\t", "apple and pear"),
    ],
)
def test_answers_are_normalised_as_officially(answer: str, expected: str) -> None:
    assert normalise_vqa(answer) == expected


def test_vqa_accuracy_leaves_each_reference_out() -> None:
    references = ["cat"] * 3 + ["dog"] * 7
    # Leaving out one of three cats: 2 / 3 three times; leaving out a dog: all three, 1.
    assert vqa_accuracy("Cat.", references) == pytest.approx((3 * 2 / 3 + 7 * 1) / 10)
    assert vqa_accuracy("a dog", references) == 1
    assert vqa_accuracy("bird", references) == 0
    # The official script would compare these as they are, as all references are the same.
    assert vqa_accuracy("the cat", ["the cat"] * 10) == 1
    assert vqa_accuracy("Cat.", ["the cat"] * 10) == 1
    assert vqa_accuracy("Unanswerable", ["unanswerable"] * 10) == 1


def test_relaxed_match_takes_five_percent() -> None:
    assert relaxed_match("104.9", "100") == 1
    assert relaxed_match("105.1", "100") == 0
    assert relaxed_match("0.5", "50%") == 1
    assert relaxed_match("Blue ", "blue") == 1
    assert relaxed_match("0", "0") == 1
    assert relaxed_match("12 cats", "12") == 0


def test_anls_is_one_less_the_distance_of_the_closest_reference() -> None:
    assert anls("hello", ["hello"]) == 1
    assert anls("helo", ["hello", "goodbye"]) == pytest.approx(0.8)
    assert anls("he", ["hello"]) == 0  # 0.4 is below the threshold
    assert anls("  Hello  World ", ["hello world"]) == 1


@pytest.mark.parametrize(
    ("metric", "pairs", "expected"),
    [
        (VQAAccuracy, [("cat", ["cat"] * 10), ("dog", ["cat"] * 10)], 0.5),
        (RelaxedAccuracy, [("99", ["100"]), ("90", ["100"])], 0.5),
        (ANLS, [("hello", ["hello"]), ("helo", ["hello"])], 0.9),
        (Accuracy, [("Left.", ["left"]), ("right", ["left"]), ("b", ["a", "B"])], 2 / 3),
    ],
)
def test_metrics_are_means_over_questions(metric, pairs, expected) -> None:
    found = metric()
    for answer, references in pairs:
        found.update(answer, references)
    assert float(found.compute()) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("B", "B"),
        ("(b)", "B"),
        (" B. a dog", "B"),
        ("B: dog", "B"),
        ("a dog", "B"),
        ("A dog", "B"),
        ("A Dog.", "B"),
        ("The answer is C.", "C"),
        ("E", ""),
        ("bird or bat", ""),
        ("B a dog", "B"),
        ("b) a dog", "B"),
        ("Answer: C", "C"),
        ("A man on a horse", ""),  # the article
        ("a dog runs", ""),
        ("", ""),
    ],
)
def test_the_letter_of_an_answer(answer: str, expected: str) -> None:
    assert chosen_letter(answer, ["cat", "a dog", "bird", "bat"]) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("Yes, there is.", "yes"), ("no", "no"), ("It is not.", "no"), ("Yes. No cat.", "yes"), ("nothing", "yes")],
)
def test_yes_or_no(answer: str, expected: str) -> None:
    assert yes_or_no(answer) == expected


def test_yes_no_scores() -> None:
    metric = YesNoF1()
    for answer, truth in [("yes", "yes"), ("yes", "yes"), ("yes", "no"), ("no", "yes"), ("no", "no")]:
        metric.update(answer, truth)
    found = {key: float(value) for key, value in metric.compute().items()}
    assert found == pytest.approx({"f1": 2 / 3, "accuracy": 0.6, "precision": 2 / 3, "recall": 2 / 3, "yes": 0.6})
