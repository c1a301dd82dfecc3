"""What the statistics promise, by simulation with few draws; `simulations` prints the full tables."""

from __future__ import annotations

import numpy as np
import pytest

from tests.experiments.statistics import simulations
from tests.experiments.statistics.simulations import SHARES, Looks

COUNT = 1500


def _slack(share: float, count: int) -> float:
    """Three standard errors of a share."""
    return 3 * float(np.sqrt(share * (1 - share) / count))


@pytest.mark.parametrize("name", sorted(SHARES))
@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
def test_coverage(seeds: int, name: str) -> None:
    found = simulations.coverage(COUNT, seeds, 60, SHARES[name])
    assert found > 0.95 - 0.01 - _slack(0.95, COUNT)
    # With two or three seeds it may be more than was asked for.
    most = {2: 0.99, 3: 0.98}.get(seeds, 0.97)
    assert found < most + _slack(most, COUNT)


@pytest.mark.parametrize("sds", [(0.0, 0.0, 0.05), (0.0, 0.5, 0.5), (0.2, 0.3, 0.5)])
@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_coverage_where_answers_are_right_or_wrong(seeds: int, sds: tuple[float, float, float]) -> None:
    found, differ = simulations.coverage_of_answers(COUNT, seeds, 100, sds)
    assert 0.01 < differ < 0.4
    assert found > 0.95 - 0.01 - _slack(0.95, COUNT)


def test_a_percentile_bootstrap_would_not_do() -> None:
    found = simulations.other_methods(150, 3, 100, SHARES["seeds only"], draws=199)
    assert found["percentile bootstrap"] < 0.85
    assert found["expanded percentile"] < 0.85


@pytest.mark.parametrize("seeds", [3, 5])
def test_a_family_without_differences_has_few_wrong_verdicts(seeds: int) -> None:
    wrong, _ = simulations.family(COUNT, seeds, 60, (0.0,) * 4, SHARES["mostly seeds"])
    assert wrong < 0.05 + _slack(0.05, COUNT)


def test_true_differences_in_a_family_are_found_and_the_others_not() -> None:
    wrong, found = simulations.family(COUNT, 5, 60, (0.0, 0.0, 8.0, 8.0), SHARES["equal"])
    assert wrong < 0.05 + _slack(0.05, COUNT)
    assert found > 0.8


@pytest.mark.parametrize("spending", ["pocock", "obrien-fleming"])
@pytest.mark.parametrize("plan", [(2, 3, 5, 10), (3, 4, 5, 6, 8, 10)])
def test_levels_of_looks_are_exact_for_t_over_seeds(plan: tuple[int, ...], spending: simulations.Spending) -> None:
    count = 60_000
    assert abs(simulations.t_only(count, Looks(plan, spending)) - 0.05) < _slack(0.05, count)


@pytest.mark.parametrize("name", ["mostly seeds", "equal"])
def test_looks_at_claims_without_differences_have_few_wrong_verdicts(name: str) -> None:
    wrong, _, seeds = simulations.sequential(COUNT, Looks((3, 5, 8)), 60, (0.0, 0.0), SHARES[name])
    assert wrong < 0.05 + _slack(0.05, COUNT)
    assert seeds > 7.5


def test_a_large_difference_needs_fewer_seeds() -> None:
    _, found, seeds = simulations.sequential(COUNT, Looks((3, 5, 8)), 60, (8.0,), SHARES["mostly seeds"])
    assert found > 0.95
    assert seeds < 5.5


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("name", ["mostly questions", "mostly seeds"])
def test_the_smallest_detectable_difference_is_seen_with_power_80_percent(seeds: int, name: str) -> None:
    _, seen = simulations.power_at(COUNT, seeds, 100, SHARES[name])
    assert 0.75 < seen < 0.87


def test_the_seeds_that_were_named_decide() -> None:
    needed, seen = simulations.power_with_more_seeds(COUNT, 3, 100, SHARES["mostly seeds"])
    assert needed is not None
    assert 3 < needed < 15
    assert 0.75 < seen < 0.87
