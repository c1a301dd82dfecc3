"""Looking at claims while seeds are added, with levels that allow for looking.

Alpha is spent by a function of the share of seeds that have run (Lan and DeMets 1983). What each look may use follows
from the joint distribution of the t statistics of nested samples (Jennison and Turnbull 1991), as normal boundaries let
too much pass when the first look has two or three seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from scipy import optimize, special, stats

from lit_vlm.experiments.statistics.paired import LEVEL
from lit_vlm.experiments.statistics.spread import Array
from lit_vlm.experiments.statistics.verdict import Judged, Tested, holm, pronounce

Spending = Literal["pocock", "obrien-fleming"]

CELLS = 400
"""Cells that a t statistic falls into, equally wide in normal scores of its own distribution."""
WIDEST = 6.5
"""Normal score beyond which there are no cells."""
SMALLEST = 1e-8
"""P values are not told apart below this."""


def _pocock(alpha: float, share: float) -> float:
    return alpha * float(np.log1p((np.e - 1) * share))


def _obrien_fleming(alpha: float, share: float) -> float:
    return float(4 * stats.norm.sf(stats.norm.isf(alpha / 4) / np.sqrt(share)))


SPENDING: dict[Spending, Callable[[float, float], float]] = {"pocock": _pocock, "obrien-fleming": _obrien_fleming}
"""Error that may have been spent when a share of the seeds has run; all of it at the end."""


@dataclass(frozen=True)
class Looks:
    """The looks of an ablation that adds seeds, planned before the first.

    Attributes:
        seeds: number of seeds at each look, rising, from 2 on.
        spending: how the error is dealt out. `pocock` gives early looks more, `obrien-fleming` keeps nearly all for the
            last. With a first look at two or three seeds the latter can hardly ever stop there.

    Raises:
        ValueError: numbers that do not rise, or a first look at fewer than two seeds.
    """

    seeds: tuple[int, ...]
    spending: Spending = "pocock"

    def __post_init__(self) -> None:
        if not self.seeds or self.seeds[0] < 2 or any(b <= a for a, b in zip(self.seeds, self.seeds[1:], strict=False)):
            raise ValueError(f"looks: {list(self.seeds)}; expected rising numbers of seeds from 2 on, such as 3, 5, 8.")

    def alpha(self, look: int, alpha: float = 1 - LEVEL) -> float:
        """P value below which a look decides, so that all looks together err with chance alpha.

        Args:
            look: number of the look, from 1.
            alpha: chance of a wrong decision over all looks, where there is no difference.
        """
        return _boundaries(self.seeds[: self._known(look)], self.seeds[-1], self.spending, alpha)[-1]

    def level(self, look: int, level: float = LEVEL) -> float:
        """Level of the interval of a look: with it, intervals of all looks cover at once (repeated intervals)."""
        return 1 - self.alpha(look, 1 - level)

    def p_value(self, look: int, p: float) -> float:
        """P value that allows for looking: the chance of error over all looks at which this look would just decide."""
        if self.alpha(look, 1 - SMALLEST) <= p:
            return 1.0
        if self.alpha(look, SMALLEST) >= p:
            return SMALLEST

        def over(log: float) -> float:
            return float(np.log(max(self.alpha(look, np.exp(log)), 1e-300)) - np.log(p))

        return float(np.exp(optimize.brentq(over, np.log(SMALLEST), np.log(1 - SMALLEST), xtol=1e-4)))

    def _known(self, look: int) -> int:
        if not 1 <= look <= len(self.seeds):
            raise ValueError(f"look: {look} is not among the {len(self.seeds)} that were planned.")
        return look


def planned_looks(seeds: Sequence[int]) -> Looks:
    """A look behind each seed, from the third on, or where there are fewer than five from the second.

    Args:
        seeds: all that may be used.
    """
    return Looks(tuple(range(3 if len(seeds) >= 5 else 2, len(seeds) + 1)))


def judge_looks(looks: Looks, rounds: Sequence[Sequence[Tested]], level: float = LEVEL) -> list[Judged]:
    """Judge a family of claims at the latest of several looks.

    A claim that an earlier look has decided stays decided, with the difference that it had then. Over all looks and
    claims the chance of any wrong `shown` or `contradicted` is at most 1 − level: Holm's correction of p values that
    allow for looking (Maurer and Bretz 2013).

    Args:
        looks: what was planned.
        rounds: for each look that has been, the claims with what was found with the seeds of that look.
        level: 1 − the chance of any wrong verdict.

    Raises:
        ValueError: a look that was not planned, other seeds than it was to have, or other claims than before.
    """
    if not rounds:
        raise ValueError("rounds: there has been no look yet.")
    best: dict[int, tuple[float, int]] = {}
    for number, claims in enumerate(rounds, start=1):
        planned = looks.seeds[looks._known(number) - 1]
        if [claim.text for claim in claims] != [claim.text for claim in rounds[0]]:
            raise ValueError(f"look {number}: its claims are not those of the first look.")
        for place, claim in enumerate(claims):
            if claim.difference.seeds != planned:
                raise ValueError(
                    f"look {number}: '{claim.text}' has {claim.difference.seeds} seeds, planned were {planned}."
                )
            p = looks.p_value(number, claim.difference.p_value)
            best[place] = min(best.get(place, (p, number)), (p, number))
    corrected = holm(rounds[-1], [best[place][0] for place in range(len(rounds[-1]))])
    # What is not decided is shown as it is now.
    shown = [best[place][1] if p < 1 - level else len(rounds) for place, p in enumerate(corrected)]
    claims = [rounds[look - 1][place] for place, look in enumerate(shown)]
    return pronounce(claims, corrected, level, [looks.level(look, level) for look in shown])


@lru_cache(maxsize=4096)
def _boundaries(done: tuple[int, ...], planned: int, spending: Spending, alpha: float) -> tuple[float, ...]:
    """P values below which each look decides.

    Mass that has not been decided moves from look to look along cells of the t statistic.
    """
    found: list[float] = []
    spent, mass = 0.0, np.zeros(0)
    for look, seeds in enumerate(done):
        share = SPENDING[spending](alpha, seeds / planned)
        if look == 0:
            edges, mass = _cells()
        else:
            for step in range(done[look - 1], seeds):
                mass = mass @ _move(step)
        found.append(_limit(edges, mass, share - spent))
        mass = mass * _kept(edges, found[-1])
        spent = share
    return tuple(found)


def _limit(edges: Array, mass: Array, wanted: float) -> float:
    """Two-sided p value whose tails hold the wanted mass; cells are taken to be as the normal scores say inside."""
    lowest, highest = SMALLEST**2, 1.0

    def over(log: float) -> float:
        return float((mass * (1 - _kept(edges, np.exp(log)))).sum()) - wanted

    if over(np.log(lowest)) >= 0:
        return lowest
    return float(np.exp(optimize.brentq(over, np.log(lowest), np.log(highest), xtol=1e-10)))


def _kept(edges: Array, p: float) -> Array:
    """Share of each cell that lies within the two-sided limits of a p value, at its own rate of normal scores."""
    limit = float(stats.norm.isf(p / 2))
    inner = special.ndtr(np.clip(edges, -limit, limit))
    outer = special.ndtr(edges)
    return np.diff(inner) / np.diff(outer)


@lru_cache(maxsize=1)
def _cells() -> tuple[Array, Array]:
    """Edges of cells in normal scores, and their mass before anything was decided."""
    edges = np.linspace(-WIDEST, WIDEST, CELLS + 1)
    mass = np.diff(special.ndtr(edges))
    return edges, mass / mass.sum()


@lru_cache(maxsize=128)
def _move(seeds: int) -> Array:
    """Chance that a t statistic of so many seeds, in a cell, falls into each cell when one more seed is added.

    With r = sum / root of the sum of squares, a new value y in units of that root gives (r + y) / √(1 + y²); y is
    independent of r and √seeds · y has a t distribution. With y = tan φ this is √(1 + r²) · sin(φ + atan r).
    """
    edges, _ = _cells()
    middle = _ratio(special.ndtri(0.5 * (special.ndtr(edges[:-1]) + special.ndtr(edges[1:]))), seeds)[:, None]
    border = _ratio(edges, seeds + 1)[None, :]
    angle = np.arctan(middle)
    turned = np.arcsin(np.clip(border / np.sqrt(1 + middle**2), -1, 1))

    def below(phi: Array) -> Array:
        inside = np.clip(phi, -np.pi / 2, np.pi / 2)
        return np.where(np.abs(phi) < np.pi / 2, special.stdtr(seeds, np.sqrt(seeds) * np.tan(inside)), phi > 0)

    chance = below(turned - angle) + 1 - below(np.pi - turned - angle) - below(-np.pi - turned - angle)
    chance[:, 0], chance[:, -1] = 0.0, 1.0
    return np.maximum(np.diff(chance, axis=1), 0)


def _ratio(scores: Array, seeds: int) -> Array:
    """Sum over the root of the sum of squares, where a t statistic has these normal scores."""
    # The lower tail keeps its digits.
    t = -np.sign(scores) * special.stdtrit(seeds - 1, special.ndtr(-np.abs(scores)))
    return np.sqrt(seeds) * t / np.sqrt(t**2 + seeds - 1)
