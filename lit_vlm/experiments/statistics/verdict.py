"""Verdicts on a family of claims, corrected for there being several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from statsmodels.stats.multitest import multipletests

from lit_vlm.experiments.statistics.paired import LEVEL, Difference
from lit_vlm.experiments.statistics.power import seeds_that_decide, smallest_detectable

Verdict = Literal["shown", "contradicted", "undecided", "one seed"]


@dataclass(frozen=True)
class Tested:
    """A claim that one variant is better than another, with what was found.

    Attributes:
        text: the claim, in its author's words.
        difference: of the variant that is claimed to be better, against the other.
    """

    text: str
    difference: Difference


@dataclass(frozen=True)
class Judged:
    """A claim with its verdict.

    Attributes:
        text: the claim.
        difference: what was found.
        verdict: `shown` or `contradicted` where the difference is significant in the claimed or in the other direction,
            corrected for the family; `undecided` where it is not; `one seed` where nothing is known about seeds.
        p_value: corrected for the family by Holm (1979), and for looks where there were several; 1 with one seed.
        low: lower end of the interval that holds for all claims of the family at once, by Bonferroni. It is a little
            wider than Holm's test asks, so a claim can be decided and its interval touch zero.
        high: its upper end.
        seeds_needed: seeds with which an undecided claim would be decided with power 80 %, if the difference were as it
            was observed; None if 100 do not suffice, or for any other verdict.
        smallest_detectable: the true difference that these seeds would have decided with power 80 %, corrected as the
            p value is; infinite where nothing is known of the spread.
    """

    text: str
    difference: Difference
    verdict: Verdict
    p_value: float
    low: float
    high: float
    seeds_needed: int | None
    smallest_detectable: float


def judge(claims: Sequence[Tested], level: float = LEVEL) -> list[Judged]:
    """Judge claims as one family: the chance of any wrong `shown` or `contradicted` is at most 1 − level.

    Claims with one seed are not tested and do not count in the family.
    """
    corrected = holm(claims, [claim.difference.p_value for claim in claims])
    return pronounce(claims, corrected, level, [level] * len(claims), level)


def holm(claims: Sequence[Tested], p_values: Sequence[float]) -> list[float]:
    """Correct p values for the family; that of a claim with one seed is 1."""
    tested = [place for place, claim in enumerate(claims) if claim.difference.seeds > 1]
    corrected = np.ones(len(claims))
    if tested:
        corrected[tested] = multipletests([p_values[place] for place in tested], method="holm")[1]
    return corrected.tolist()


def pronounce(
    claims: Sequence[Tested],
    corrected: Sequence[float],
    level: float,
    interval_levels: Sequence[float],
    final_level: float,
) -> list[Judged]:
    """Say what corrected p values mean.

    Args:
        claims: the family.
        corrected: p values after correction, one for each claim.
        level: 1 − the chance of any wrong verdict.
        interval_levels: level of each claim's interval, before it is widened for the family.
        final_level: level at which more seeds would decide.
    """
    family = max(1, sum(claim.difference.seeds > 1 for claim in claims))
    # Holm's next step would have to get below the error over the claims that are left.
    left = max(1, family - sum(p < 1 - level for p in corrected))
    judged = []
    for claim, p, interval_level in zip(claims, corrected, interval_levels, strict=True):
        found = claim.difference
        low, high = found.interval(1 - (1 - interval_level) / family)
        verdict: Verdict = "one seed" if found.seeds < 2 else "undecided"
        needed = None
        deciding = 1 - (1 - final_level) / left if verdict == "undecided" else level  # one seed is not of the family
        if p < 1 - level:
            verdict = "shown" if found.mean > 0 else "contradicted"
        elif verdict == "undecided":
            needed = seeds_that_decide(found.spread, found.mean, deciding)
        visible = smallest_detectable(found.spread, deciding)
        judged.append(Judged(claim.text, found, verdict, p, low, high, needed, visible))
    return judged
