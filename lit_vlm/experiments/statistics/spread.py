"""How uncertain a mean over seeds and questions is: mean squares, p values, intervals.

Differences of seeds × questions have effects of seeds, of questions, and a rest in each cell. The mean squares of their
two-way table say how large these are, and generalised pivots carry over how well few seeds know that: each mean square
is divided by chi-square variates over their degrees of freedom, and what comes out is the distribution of variances
that the table admits (Weerahandi 1993; Hannig, Iyer and Patterson 2006). It is integrated on a grid, so nothing is
drawn at random.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special, stats

Array = NDArray[np.float64]

FEW = 30
"""Degrees of freedom from which a mean square is so well known that a short grid will do."""


@dataclass(frozen=True)
class Spread:
    """Mean squares of paired differences in a table of seeds × questions.

    Attributes:
        seeds: rows of the table.
        questions: its columns; 1 where there is a value per seed and no question.
        between_seeds: of the means of seeds, times questions; has seeds − 1 degrees of freedom.
        between_questions: of the means of questions, times seeds; has questions − 1.
        residual: of what both leave over, the interaction; has the product of both.

    The three may be arrays of one shape, for many tables of one size at once.
    """

    seeds: int
    questions: int
    between_seeds: Array
    between_questions: Array
    residual: Array

    @property
    def crossed(self) -> bool:
        """Whether the table has both, seeds and questions."""
        return self.seeds > 1 and self.questions > 1

    def error(self) -> Array:
        """Standard error of the mean, estimates of single variances cut off at zero. NaN for a table of one cell."""
        if not self.crossed:
            one_way = self.between_seeds if self.seeds > 1 else self.between_questions
            return np.sqrt(one_way / (self.seeds * self.questions))
        return np.sqrt(_sum(self.between_seeds, self.between_questions, self.residual) / (self.seeds * self.questions))

    def freedom(self) -> Array:
        """Degrees of freedom of that standard error, by Satterthwaite (1946)."""
        if not self.crossed:
            return np.full_like(self.between_seeds, self.seeds * self.questions - 1)
        rows, columns = self.seeds - 1, self.questions - 1
        seeds, questions, rest = self.between_seeds, self.between_questions, self.residual
        total = _sum(seeds, questions, rest)
        parts = (
            np.where(seeds > rest, seeds**2 / rows, 0)
            + np.where(questions > rest, questions**2 / columns, 0)
            + np.where((seeds > rest) == (questions > rest), rest**2 / (rows * columns), 0)
        )
        return np.where(parts > 0, total**2 / np.where(parts > 0, parts, 1), rows)

    def p_value(self, mean: Array | float) -> Array:
        """Two-sided p value of no difference. 1 where nothing is known of the spread.

        Args:
            mean: mean difference, of the shape of the mean squares.
        """
        error = self.error()
        known = error > 0
        scaled = np.abs(mean) / np.where(known, error, 1)
        if not self.crossed:
            p = 2 * special.stdtr(np.maximum(self.freedom(), 1), -scaled)
            return np.where(known, p, 1.0)
        # In units of the standard error, and all tables side by side: [tables, nodes of the grid].
        unit = np.where(known, error**2, 1)[..., None] * self.seeds * self.questions
        by_seeds, by_questions, by_rest, weights = _grid(self.seeds - 1, self.questions - 1)
        variance = np.maximum(
            self.between_seeds[..., None] / unit / by_seeds
            + self.between_questions[..., None] / unit / by_questions
            - self.residual[..., None] / unit / by_rest,
            0,
        )
        with np.errstate(divide="ignore", invalid="ignore"):
            beyond = special.erfc(scaled[..., None] / np.sqrt(2 * variance))
        beyond = np.where(variance > 0, beyond, scaled[..., None] == 0)
        return np.where(known, beyond @ weights, 1.0)

    def half_width(self, level: float) -> float:
        """Half the interval of a level, for one table: means farther from zero have a p value below 1 − level.

        Infinite where nothing is known of the spread.
        """
        error, alpha = float(self.error()), 1 - level
        if not error > 0:
            return float("inf")
        if not self.crossed:
            return float(stats.t.isf(alpha / 2, self.freedom()) * error)
        high = 4.0
        while self.p_value(high * error) > alpha:
            high *= 2
        found = optimize.brentq(lambda wide: float(self.p_value(wide * error)) - alpha, 0, high, xtol=1e-6, rtol=1e-9)
        return float(found) * error


def spread(table: Array, added: float = 0.0) -> Spread:
    """Mean squares of tables of differences.

    Args:
        table: [..., seeds, questions].
        added: variance of a cell that is added, for tables that may be too small to show any.
    """
    seeds, questions = table.shape[-2:]
    rows, columns = table.mean(axis=-1), table.mean(axis=-2)
    mean = rows.mean(axis=-1)
    by_rows = questions * ((rows - mean[..., None]) ** 2).sum(axis=-1)
    by_columns = seeds * ((columns - mean[..., None]) ** 2).sum(axis=-1)
    rest = ((table - rows[..., None] - columns[..., None, :] + mean[..., None, None]) ** 2).sum(axis=(-2, -1))
    one = np.zeros_like(mean)
    return Spread(
        seeds=seeds,
        questions=questions,
        between_seeds=by_rows / (seeds - 1) + added if seeds > 1 else one,
        between_questions=by_columns / (questions - 1) + added if questions > 1 else one,
        residual=rest / ((seeds - 1) * (questions - 1)) + added if seeds > 1 and questions > 1 else one,
    )


def _sum(seeds: Array, questions: Array, rest: Array) -> Array:
    """Variance of the mean × cells: of seeds, of questions and of the rest, none below zero."""
    return np.maximum(seeds - rest, 0) + np.maximum(questions - rest, 0) + rest


@lru_cache(maxsize=128)
def _grid(rows: int, columns: int) -> tuple[Array, Array, Array, Array]:
    """Nodes of chi-square variates over their degrees of freedom: of seeds, questions and rest, and joint weights."""
    axes = [_nodes(freedom) for freedom in (rows, columns, rows * columns)]
    values = np.meshgrid(*(axis[0] for axis in axes), indexing="ij")
    weights = np.einsum("i,j,k->ijk", *(axis[1] for axis in axes))
    by_seeds, by_questions, by_rest = (value.ravel() for value in values)
    return by_seeds, by_questions, by_rest, weights.ravel()


def _nodes(freedom: int) -> tuple[Array, Array]:
    """Nodes and weights of one variate: the trapezoid rule in its logarithm, whose density is smooth and falls fast."""
    count, tail = (64, 1e-10) if freedom < FEW else (8, 1e-6)
    law = stats.chi2(freedom)
    logs = np.linspace(np.log(law.ppf(tail)), np.log(law.isf(tail)), count)
    weights = np.exp(law.logpdf(np.exp(logs)) + logs)
    return np.exp(logs) / freedom, weights / weights.sum()
