"""Verdicts on families of claims."""

from __future__ import annotations

import numpy as np
import pytest
from statsmodels.stats.multitest import multipletests

from lit_vlm.experiments.results import Score
from lit_vlm.experiments.statistics import Tested, difference, judge
from lit_vlm.experiments.statistics.power import power, smallest_detectable


def claim(text: str, *values: float) -> Tested:
    """A claim whose variants differ by these values, seed by seed."""
    return Tested(
        text, difference({seed: Score(one) for seed, one in enumerate(values)}, {s: Score(0.0) for s in range(9)})
    )


CLEAR = (0.20, 0.21, 0.22, 0.21, 0.20)
FAINT = (0.20, -0.05, 0.22, 0.05, 0.01)


def test_each_verdict() -> None:
    judged = judge(
        [
            claim("clear", *CLEAR),
            claim("the other way", *(-one for one in CLEAR)),
            claim("faint", *FAINT),
            claim("single", 0.3),
            claim("nothing", 0.1, -0.1, 0.1, -0.1),
        ]
    )
    assert [one.verdict for one in judged] == ["shown", "contradicted", "undecided", "one seed", "undecided"]
    assert [one.text for one in judged] == ["clear", "the other way", "faint", "single", "nothing"]
    faint = judged[2].seeds_needed
    assert faint is not None
    assert 5 < faint <= 100
    assert [one.seeds_needed for one in judged if one.text != "faint"] == [None] * 4


def test_what_could_have_been_seen_is_corrected_for_the_family() -> None:
    faint = claim("faint", *FAINT)
    alone, family = judge([faint])[0], judge([faint, *(claim(str(one), *FAINT) for one in range(9))])[0]
    level = 1 - 0.05 / 10
    assert alone.smallest_detectable == smallest_detectable(faint.difference.spread, 0.95)
    assert family.smallest_detectable == pytest.approx(smallest_detectable(faint.difference.spread, level))
    assert power(faint.difference.spread, family.smallest_detectable, level) == pytest.approx(0.8)


def test_p_values_are_corrected_by_holm_and_single_seeds_do_not_count() -> None:
    claims = [claim("a", *CLEAR), claim("one", 0.3), claim("b", 0.1, 0.12, 0.05), claim("c", *FAINT)]
    plain = [claims[place].difference.p_value for place in (0, 2, 3)]
    judged = judge(claims)
    assert [judged[place].p_value for place in (0, 2, 3)] == pytest.approx(multipletests(plain, method="holm")[1])
    assert judged[1].p_value == 1
    # What is significant alone need not be so in company.
    assert judge([claims[2]])[0].verdict == "shown"
    assert judged[2].verdict == "undecided"


def test_intervals_hold_for_the_whole_family() -> None:
    claims = [claim("a", *CLEAR), claim("b", *FAINT)]
    for one, own in zip(judge(claims), claims, strict=True):
        assert (one.low, one.high) == pytest.approx(own.difference.interval(1 - 0.05 / 2))
        assert one.low < own.difference.low


def test_a_stricter_level_decides_less() -> None:
    mild = claim("mild", 0.1, 0.12, 0.05, 0.07)
    assert judge([mild])[0].verdict == "shown"
    assert judge([mild], level=0.999)[0].verdict == "undecided"


def test_a_single_seed_with_many_questions_is_no_verdict() -> None:
    answers = {f"q{place}": 1.0 for place in range(500)}
    wrong = dict.fromkeys(answers, 0.0)
    found = difference({0: Score(1.0, answers=answers)}, {0: Score(0.0, answers=wrong)})
    assert found.p_value < 1e-6
    assert judge([Tested("all of them", found)])[0].verdict == "one seed"


def test_no_claims_no_verdicts() -> None:
    assert judge([]) == []


def test_equal_differences_are_undecided() -> None:
    judged = judge([claim("same", 0.5, 0.5, 0.5)])[0]
    assert (judged.verdict, judged.seeds_needed, judged.low) == ("undecided", None, -np.inf)
