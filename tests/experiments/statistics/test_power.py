"""Power and smallest detectable differences, against statsmodels."""

from __future__ import annotations

import numpy as np
import pytest
from statsmodels.stats.power import TTestPower

from lit_vlm.experiments.statistics.power import (
    POWER,
    power,
    seeds_that_decide,
    smallest_detectable,
    with_seeds,
)
from lit_vlm.experiments.statistics.spread import Spread


def _values(seeds: int, deviation: float) -> Spread:
    """A value per seed."""
    return Spread(seeds, 1, np.array(deviation**2), np.array(0.0), np.array(0.0))


def _crossed(seeds: int, of_seeds: float, of_questions: float, rest: float = 1.0) -> Spread:
    """Expected mean squares at 100 questions."""
    of = np.array(rest + 100 * of_seeds), np.array(rest + seeds * of_questions), np.array(rest)
    return Spread(seeds, 100, *of)


@pytest.mark.parametrize("seeds", [2, 3, 5, 10, 40])
@pytest.mark.parametrize("level", [0.95, 0.99])
def test_for_values_it_is_the_power_of_a_t_test(seeds: int, level: float) -> None:
    size = smallest_detectable(_values(seeds, 0.02), level) / 0.02
    assert TTestPower().power(size, seeds, (1 - level) / 2, alternative="larger") == pytest.approx(POWER, abs=1e-3)
    expected = TTestPower().power(0.6 * size, seeds, (1 - level) / 2, alternative="larger")
    assert power(_values(seeds, 0.02), -0.6 * size * 0.02, level) == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("size", [0.6, 1.0, 2.0])
def test_seeds_for_values_are_those_of_a_t_test(size: float) -> None:
    seeds = TTestPower().solve_power(effect_size=size, alpha=0.05, power=POWER)
    assert seeds_that_decide(_values(2, 0.1), 0.1 * size, 0.95) == int(np.ceil(seeds))


def test_more_seeds_see_less_and_questions_set_a_limit() -> None:
    design = _crossed(3, of_seeds=0.02, of_questions=0.3)
    seen = [smallest_detectable(with_seeds(design, seeds), 0.95) for seeds in (3, 5, 10, 1000)]
    assert seen == sorted(seen, reverse=True)
    assert seen[-1] == pytest.approx(2.8 * np.sqrt(0.3 / 100), rel=0.05)


def test_with_its_own_seeds_a_design_is_itself() -> None:
    design = _crossed(3, of_seeds=0.02, of_questions=0.3)
    again = with_seeds(design, 3)
    assert (again.between_seeds, again.between_questions) == (
        pytest.approx(design.between_seeds),
        pytest.approx(design.between_questions),
    )


@pytest.mark.parametrize(
    ("design", "difference"),
    [
        (_crossed(3, of_seeds=0.02, of_questions=0.3), 0.0),
        (_crossed(3, of_seeds=0.02, of_questions=0.3), 0.05),  # questions differ too much
        (_values(3, 1.0), 0.01),
        (_values(3, 0.0), 0.5),
        (Spread(1, 100, np.array(0.0), np.array(1.0), np.array(0.0)), 0.5),
        (_values(100, 1.0), 0.01),
    ],
)
def test_where_no_number_of_seeds_would_decide(design: Spread, difference: float) -> None:
    assert seeds_that_decide(design, difference, 0.95) is None


def test_the_number_is_the_first_that_has_the_power() -> None:
    design = _crossed(3, of_seeds=0.02, of_questions=0.3)
    needed = seeds_that_decide(design, 0.25, 0.95)
    assert needed is not None
    assert power(with_seeds(design, needed), 0.25, 0.95) >= POWER > power(with_seeds(design, needed - 1), 0.25, 0.95)


def test_without_spread_there_is_no_power() -> None:
    assert power(_values(3, 0.0), 1.0, 0.95) == 0
    assert smallest_detectable(_values(3, 0.0), 0.95) == float("inf")
