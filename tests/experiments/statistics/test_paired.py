"""Differences of two variants: pairing, signs, what is left out, single seeds, values without questions."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from lit_vlm.experiments.results import Better, Score
from lit_vlm.experiments.statistics import difference
from lit_vlm.experiments.statistics.paired import BY_QUESTION, BY_SEED, CROSSED, NO_SPREAD, ONE_VALUE


def _answered(right: np.ndarray, better: Better = "higher", first: int = 0) -> dict[int, Score]:
    """Scores by seed of a table [seeds, questions]."""
    return {
        first + seed: Score(float(row.mean()), better, {f"q{place}": float(one) for place, one in enumerate(row)})
        for seed, row in enumerate(right)
    }


def _valued(*values: float, better: Better = "higher") -> dict[int, Score]:
    return {seed: Score(value, better) for seed, value in enumerate(values)}


@pytest.fixture
def pair() -> tuple[np.ndarray, np.ndarray]:
    """Answers of two variants at four seeds, the first right somewhat more often."""
    rng = np.random.default_rng(0)
    hard = rng.random(300)
    return tuple((rng.random((4, 300)) * 0.2 + hard < edge).astype(float) for edge in (0.75, 0.65))


def test_a_difference_is_a_mean_over_seeds_and_questions(pair: tuple[np.ndarray, np.ndarray]) -> None:
    found = difference(_answered(pair[0]), _answered(pair[1]))
    by_seed = (pair[0] - pair[1]).mean(axis=1)
    assert found.mean == pytest.approx(by_seed.mean())
    assert list(found.by_seed.values()) == pytest.approx(by_seed)
    assert (found.seeds, found.questions, found.positive, found.negative) == (4, 300, 4, 0)
    assert found.effect_size == pytest.approx(by_seed.mean() / by_seed.std(ddof=1))
    assert found.relative == pytest.approx(by_seed.mean() / pair[1].mean())
    assert found.low < found.mean < found.high
    assert (found.low > 0) == (found.p_value < 0.05)
    assert found.method == CROSSED
    assert found.interval(0.95) == pytest.approx((found.low, found.high))


def test_the_other_way_round_it_has_the_other_sign(pair: tuple[np.ndarray, np.ndarray]) -> None:
    one, other = (difference(_answered(a), _answered(b)) for a, b in (pair, pair[::-1]))
    assert (one.mean, one.low, one.high) == pytest.approx((-other.mean, -other.high, -other.low))
    assert one.p_value == pytest.approx(other.p_value)


@pytest.mark.parametrize("asked", [True, False])
def test_where_lower_is_better_the_lower_is_the_better(asked: bool) -> None:
    rng = np.random.default_rng(1)
    low, high = rng.random((3, 50)), rng.random((3, 50)) + 1
    sides = [
        _answered(table, "lower") if asked else _valued(*table.mean(axis=1), better="lower") for table in (low, high)
    ]
    found = difference(*sides)
    assert found.mean > 0
    assert found.low > 0
    assert found.relative == pytest.approx(found.mean / high.mean())


def test_only_what_both_have_is_compared(pair: tuple[np.ndarray, np.ndarray]) -> None:
    first, second = _answered(pair[0]), _answered(pair[1], first=1)
    second[2] = Score(0.5, answers={name: one for name, one in second[2].answers.items() if name not in ("q0", "q7")})
    first[1] = Score(0.5, answers={**first[1].answers, "other": 1.0})
    found = difference(first, second)
    assert found.seeds_left_out == (0, 4)
    assert list(found.by_seed) == [1, 2, 3]
    assert (found.questions, found.questions_left_out) == (298, 3)
    kept = [place for place in range(300) if place not in (0, 7)]
    assert found.by_seed[2] == pytest.approx((pair[0][2, kept] - pair[1][1, kept]).mean())


def test_values_alone_are_compared_by_a_paired_t_test() -> None:
    first, second = (2.31, 2.28, 2.35, 2.30), (2.36, 2.35, 2.34, 2.39)
    found = difference(_valued(*first, better="lower"), _valued(*second, better="lower"), level=0.9)
    expected = stats.ttest_rel(second, first)
    interval = expected.confidence_interval(0.9)
    assert (found.p_value, found.low, found.high) == pytest.approx((expected.pvalue, interval.low, interval.high))
    assert (found.questions, found.positive, found.negative, found.method) == (0, 3, 1, BY_SEED)


def test_with_answers_of_some_seeds_alone_values_are_compared(pair: tuple[np.ndarray, np.ndarray]) -> None:
    first, second = _answered(pair[0]), _answered(pair[1])
    first[1] = Score(0.7)
    found = difference(first, second)
    assert (found.questions, found.questions_left_out, found.method) == (0, 300, BY_SEED)
    assert found.by_seed[1] == pytest.approx(0.7 - second[1].value)


def test_one_seed_has_an_interval_over_questions_and_says_so() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.random((2, 1, 80))
    found = difference(_answered(a), _answered(b))
    expected = stats.ttest_rel(a[0], b[0])
    assert (found.p_value, found.low) == pytest.approx((expected.pvalue, expected.confidence_interval().low))
    assert (found.seeds, found.effect_size, found.method) == (1, None, BY_QUESTION)


def test_one_value_each_has_no_interval() -> None:
    found = difference(_valued(0.7), _valued(0.5))
    assert (found.mean, found.low, found.high, found.p_value) == (pytest.approx(0.2), -np.inf, np.inf, 1)
    assert found.method == ONE_VALUE


def test_scores_that_measure_different_things_are_refused() -> None:
    one = Score(0.5, answers={"a": 1.0, "b": 0.0}, asked={"choosing": "letter", "shots": 0})
    for other, message in (
        (replace(one, answers={"c": 1.0}), "There is no question that all runs have answered"),
        (replace(one, share=False), "Some runs have a share of 0 to 1 and others another number"),
        (replace(one, asked={"choosing": "generate", "shots": 0}), "different ways .choosing: letter and generate."),
    ):
        with pytest.raises(ValueError, match=message):
            difference({0: one}, {0: other})
    assert difference({0: one}, {0: replace(one, answers={}, asked={}, value=0.2)}).mean == pytest.approx(0.3)


def test_equal_differences_at_all_seeds_are_no_proof() -> None:
    # 0.1 + 0.2 is not 0.3: what is mere rounding is no spread.
    found = difference(_valued(0.3, 0.1 + 0.2, 0.4), _valued(0.1, 0.1, 0.2))
    assert (found.p_value, found.low, found.method, found.effect_size) == (1, -np.inf, NO_SPREAD, None)


def test_answers_that_never_differ_leave_room_for_a_few_that_would() -> None:
    right = np.ones((3, 100))
    found = difference(_answered(right), _answered(right))
    assert found.mean == 0
    assert found.p_value == 1
    # The rule of three would say 3 / 300.
    assert 3 / 300 < found.high < 5 * 3 / 300


def test_two_seeds_that_answer_alike_count_questions_alone() -> None:
    row = np.random.default_rng(3).random((1, 200))
    a, b = np.repeat(row, 3, axis=0), np.zeros((3, 200)) + 0.45
    expected = stats.ttest_1samp(row[0] - 0.45, 0).confidence_interval()
    found = difference(_answered(a), _answered(b))
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-2)


def test_it_is_deterministic_and_fast() -> None:
    rng = np.random.default_rng(4)
    sides = [_answered((rng.random((5, 5000)) < edge).astype(float)) for edge in (0.6, 0.58)]
    start = time.process_time()
    found = difference(*sides)
    assert time.process_time() - start < 0.5
    assert found == difference(*sides)


def test_no_seed_in_common() -> None:
    with pytest.raises(ValueError, match=r"no seed in common: \[0\] and \[3\]"):
        difference(_valued(0.5), {3: Score(0.5)})


def test_scores_of_opposite_direction() -> None:
    with pytest.raises(
        ValueError, match="The better score is the higher and the lower one, by run: these are different scores"
    ):
        difference(_valued(0.5), _valued(0.5, better="lower"))


def test_a_score_that_is_not_finite() -> None:
    with pytest.raises(ValueError, match="seed 1: a score is not a finite number"):
        difference(_valued(0.5, float("nan")), _valued(0.5, 0.4))


@pytest.mark.parametrize("level", [0.0, 1.0, 95.0])
def test_a_level_that_is_none(level: float) -> None:
    with pytest.raises(ValueError, match=f"level: {level} is no confidence level"):
        difference(_valued(0.5), _valued(0.4), level=level)
