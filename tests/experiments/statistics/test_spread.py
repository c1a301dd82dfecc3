"""Mean squares, p values and intervals, against libraries."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from scipy import stats
from statsmodels.formula.api import ols

from lit_vlm.experiments.statistics.spread import Spread, spread
from tests.experiments.statistics import simulations


def _table(seeds: int, questions: int) -> np.ndarray:
    shares = simulations.SHARES["equal"]
    return simulations.tables(np.random.default_rng(7), 1, seeds, questions, shares)[0] + 0.5


def test_mean_squares_are_those_of_a_two_way_analysis_of_variance() -> None:
    table = _table(4, 30)
    seed, question = np.indices(table.shape)
    frame = pd.DataFrame({"y": table.ravel(), "seed": seed.ravel(), "question": question.ravel()})
    expected = sm.stats.anova_lm(ols("y ~ C(seed) + C(question)", frame).fit())
    squares = expected["sum_sq"] / expected["df"]
    found = spread(table)
    assert found.between_seeds == pytest.approx(squares["C(seed)"])
    assert found.between_questions == pytest.approx(squares["C(question)"])
    assert found.residual == pytest.approx(squares["Residual"])


@pytest.mark.parametrize(("seeds", "questions"), [(2, 1), (5, 1), (1, 40)])
def test_one_way_p_values_and_intervals_are_those_of_a_paired_t_test(seeds: int, questions: int) -> None:
    table = np.random.default_rng(3).standard_normal((seeds, questions)) + 0.4
    found, expected = spread(table), stats.ttest_1samp(table.ravel(), 0)
    assert found.p_value(table.mean()) == pytest.approx(expected.pvalue)
    half = found.half_width(0.9)
    assert (table.mean() - half, table.mean() + half) == pytest.approx(expected.confidence_interval(0.9))


@pytest.mark.parametrize("seeds", [2, 3, 5, 10, 60])
@pytest.mark.parametrize("level", [0.95, 0.999])
def test_where_seeds_alone_vary_the_interval_is_that_of_t_over_their_means(seeds: int, level: float) -> None:
    table = np.random.default_rng(4).standard_normal((seeds, 1)) + np.zeros((1, 80))
    expected = stats.ttest_1samp(table[:, 0], 0).confidence_interval(level)
    found = spread(table).half_width(level)
    assert found == pytest.approx((expected.high - expected.low) / 2, rel=1e-4)


def test_where_questions_alone_vary_the_interval_is_that_of_t_over_their_means() -> None:
    table = np.zeros((4, 1)) + np.random.default_rng(4).standard_normal((1, 80))
    expected = stats.ttest_1samp(table[0], 0).confidence_interval(0.95)
    assert spread(table).half_width(0.95) == pytest.approx((expected.high - expected.low) / 2, rel=1e-3)


def test_with_many_seeds_and_questions_it_is_the_bootstrap_over_both() -> None:
    # Effects of questions alone, so that resampling them is all there is to it.
    table = np.zeros((40, 1)) + np.random.default_rng(5).standard_normal((1, 400))
    drawn = stats.bootstrap((table[0],), np.mean, n_resamples=4000, rng=np.random.default_rng(6))
    assert spread(table).error() == pytest.approx(drawn.standard_error, rel=0.05)
    assert spread(table).half_width(0.95) == pytest.approx(np.ptp(drawn.confidence_interval) / 2, rel=0.05)


@pytest.mark.parametrize("seeds", [2, 5])
@pytest.mark.parametrize("name", sorted(simulations.SHARES))
def test_the_interval_leaves_out_zero_exactly_where_p_is_below_the_level(seeds: int, name: str) -> None:
    table = simulations.tables(np.random.default_rng(8), 1, seeds, 60, simulations.SHARES[name])[0]
    found = spread(table)
    half = found.half_width(0.95)
    assert found.p_value(half) == pytest.approx(0.05, rel=1e-3)
    assert found.p_value(half * 1.01) < 0.05 < found.p_value(half * 0.99)


def test_freedom_is_satterthwaite_s() -> None:
    found = Spread(4, 31, np.array(6.0), np.array(5.0), np.array(2.0))
    assert found.error() ** 2 == pytest.approx((6 + 5 - 2) / (4 * 31))
    assert found.freedom() == pytest.approx((6 + 5 - 2) ** 2 / (6**2 / 3 + 5**2 / 30 + 2**2 / 90))
    # Where only seeds show, it is theirs.
    assert Spread(4, 31, np.array(6.0), np.array(1.0), np.array(2.0)).freedom() == pytest.approx(3)


def test_many_tables_at_once_are_each_as_alone() -> None:
    drawn = simulations.tables(np.random.default_rng(9), 3, 3, 50, simulations.SHARES["equal"])
    together = spread(drawn).p_value(drawn.mean(axis=(1, 2)))
    assert together == pytest.approx([float(spread(one).p_value(one.mean())) for one in drawn])


@pytest.mark.parametrize("table", [np.zeros((3, 40)), np.ones((1, 1)), np.ones((3, 1))])
def test_without_spread_nothing_is_known(table: np.ndarray) -> None:
    found = spread(table)
    assert found.p_value(table.mean()) == 1
    assert found.half_width(0.95) == float("inf")
