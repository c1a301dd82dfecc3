"""What a design can see: power, the smallest difference that it would have found, seeds that would decide."""

from __future__ import annotations

import numpy as np
from scipy import optimize, stats

from lit_vlm.experiments.statistics.spread import Spread

POWER = 0.8
"""Chance of finding a difference that is there, which a design is asked for."""
MOST_SEEDS = 100


def power(spread: Spread, difference: float, level: float) -> float:
    """Chance that an interval of a level leaves out zero, on the right side, if this were the true difference.

    By a noncentral t distribution with the standard error and the degrees of freedom of the table; its critical value
    is that of the interval. 0 where nothing is known of the spread.
    """
    error = float(spread.error())
    if not error > 0:
        return 0.0
    critical = spread.half_width(level) / error
    return float(stats.nct.sf(critical, float(spread.freedom()), abs(difference) / error))


def smallest_detectable(spread: Spread, level: float, wanted: float = POWER) -> float:
    """Smallest true difference that the interval of a level leaves out zero for, with the wanted power.

    Infinite where nothing is known of the spread.
    """
    error = float(spread.error())
    if not error > 0:
        return float("inf")
    critical, freedom = spread.half_width(level) / error, float(spread.freedom())
    high = critical + 4
    while stats.nct.sf(critical, freedom, high) < wanted:
        high *= 2
    return float(optimize.brentq(lambda shift: stats.nct.sf(critical, freedom, shift) - wanted, 0, high)) * error


def with_seeds(spread: Spread, seeds: int) -> Spread:
    """The mean squares that are to be expected with another number of seeds and the same questions."""
    if spread.questions == 1:
        return Spread(seeds, 1, spread.between_seeds, spread.between_questions, spread.residual)
    of_questions = np.maximum(spread.between_questions - spread.residual, 0) / spread.seeds
    return Spread(
        seeds=seeds,
        questions=spread.questions,
        between_seeds=np.maximum(spread.between_seeds, spread.residual),
        between_questions=spread.residual + seeds * of_questions,
        residual=spread.residual,
    )


def seeds_that_decide(spread: Spread, difference: float, level: float) -> int | None:
    """Fewest seeds with which the observed difference, if it were the true one, would be found with power 80 %.

    Returns:
        A number above that of the table's seeds; None if 100 do not suffice, if the difference is zero, or if one seed
        cannot tell how much seeds differ.
    """
    if spread.seeds < 2 or difference == 0 or not float(spread.error()) > 0:
        return None
    few, many = spread.seeds, MOST_SEEDS
    if few >= many or power(with_seeds(spread, many), difference, level) < POWER:
        return None
    while many - few > 1:
        half = (few + many) // 2
        if power(with_seeds(spread, half), difference, level) < POWER:
            few = half
        else:
            many = half
    return many
