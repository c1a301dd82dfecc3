"""Looks: levels against published boundaries and simulation, and verdicts that stay."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from lit_vlm.experiments.statistics import Looks, judge, judge_looks
from lit_vlm.experiments.statistics.sequential import Spending
from tests.experiments.statistics.test_verdict import CLEAR, FAINT, claim

WAYS: tuple[Spending, ...] = ("pocock", "obrien-fleming")


@pytest.mark.parametrize(
    ("spending", "published"),
    [
        # Two-sided boundaries of 0.05 at five equal steps, for normal observations (Lan and DeMets 1983).
        ("pocock", (2.438, 2.427, 2.410, 2.397, 2.386)),
        ("obrien-fleming", (4.877, 3.357, 2.680, 2.290, 2.031)),
    ],
)
def test_with_many_seeds_boundaries_are_nearly_those_for_normal_observations(
    spending: Spending, published: tuple[float, ...]
) -> None:
    looks = Looks((8, 16, 24, 32, 40), spending)
    found = [stats.norm.isf(looks.alpha(look) / 2) for look in range(1, 6)]
    assert found[0] == pytest.approx(published[0], abs=1e-3)
    # t statistics of looks are less alike than normal ones, so that a little less is left for each.
    assert found == pytest.approx(published, abs=0.03)
    assert all(ours > other for ours, other in zip(found[1:], published[1:], strict=True))


@pytest.mark.parametrize("spending", WAYS)
def test_one_look_is_an_ordinary_test(spending: Spending) -> None:
    looks = Looks((4,), spending)
    assert looks.alpha(1) == pytest.approx(0.05, rel=1e-4)
    assert looks.level(1, 0.9) == pytest.approx(0.9, rel=1e-4)
    assert looks.p_value(1, 0.03) == pytest.approx(0.03, rel=1e-3)


@pytest.mark.parametrize("spending", WAYS)
def test_looks_cost_something_and_never_more_than_bonferroni(spending: Spending) -> None:
    looks = Looks((3, 5, 8), spending)
    levels = [looks.alpha(look) for look in (1, 2, 3)]
    assert all(level < 0.05 for level in levels)
    assert sum(levels) > 0.05


def test_obrien_fleming_keeps_more_for_the_end() -> None:
    assert Looks((3, 5, 8), "obrien-fleming").alpha(1) < Looks((3, 5, 8), "pocock").alpha(1)
    assert Looks((3, 5, 8), "obrien-fleming").alpha(3) > Looks((3, 5, 8), "pocock").alpha(3)


@pytest.mark.parametrize("spending", WAYS)
@pytest.mark.parametrize("look", [1, 2, 3])
def test_p_values_of_looks_are_below_alpha_exactly_where_the_look_decides(spending: Spending, look: int) -> None:
    looks = Looks((3, 5, 8), spending)
    for alpha in (0.05, 0.01):
        assert looks.p_value(look, looks.alpha(look, alpha)) == pytest.approx(alpha, rel=1e-2)
    rising = [looks.p_value(look, p) for p in (1e-12, 1e-4, 0.01, 0.1, 0.5, 1.0)]
    assert rising == sorted(rising)
    assert rising[-1] == 1


def test_a_claim_that_was_decided_stays_so_and_others_go_on() -> None:
    looks = Looks((3, 5))
    clear, faint = np.array(CLEAR), np.array(FAINT)
    first = [claim("clear", *clear[:3]), claim("faint", *faint[:3])]
    judged = judge_looks(looks, [first])
    assert [one.verdict for one in judged] == ["shown", "undecided"]
    assert judged[0].p_value > judge(first)[0].p_value

    # Later the clear one is lost in noise, but what was said was said.
    second = [claim("clear", *clear[:3], -1.0, 1.0), claim("faint", *faint)]
    later = judge_looks(looks, [first, second])
    assert [one.verdict for one in later] == ["shown", "undecided"]
    assert later[0].difference.seeds == 3
    assert later[1].difference.seeds == 5
    # Seeds that would decide are counted at the level of the last look, also at the first.
    assert judged[1].seeds_needed == judge([claim("faint", *faint[:3])], looks.level(2))[0].seeds_needed
    assert (later[1].low, later[1].high) == pytest.approx(second[1].difference.interval(1 - looks.alpha(2) / 2))


def test_what_is_not_decided_by_the_levels_of_looks() -> None:
    # Significant in a single test, but not where that was the first of many looks.
    mild = (0.10, 0.12, 0.06)
    assert judge([claim("mild", *mild)])[0].verdict == "shown"
    assert judge_looks(Looks((3, 4, 5, 6, 7, 8)), [[claim("mild", *mild)]])[0].verdict == "undecided"


@pytest.mark.parametrize("seeds", [(), (1, 3), (3, 3), (5, 3)])
def test_looks_that_do_not_rise(seeds: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"looks: .* expected rising numbers of seeds from 2 on"):
        Looks(seeds)


def test_looks_that_were_not_planned() -> None:
    looks = Looks((3, 5))
    with pytest.raises(ValueError, match="look: 3 is not among the 2 that were planned"):
        looks.alpha(3)
    with pytest.raises(ValueError, match="look 1: 'clear' has 5 seeds, planned were 3"):
        judge_looks(looks, [[claim("clear", *CLEAR)]])
    with pytest.raises(ValueError, match="look 2: its claims are not those of the first look"):
        judge_looks(looks, [[claim("a", *CLEAR[:3])], [claim("b", *CLEAR)]])
    with pytest.raises(ValueError, match="there has been no look yet"):
        judge_looks(looks, [])
