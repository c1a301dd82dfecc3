"""The difference of two variants, paired by seed and by question, with its interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from lit_vlm.experiments.results import Score
from lit_vlm.experiments.statistics.spread import Array, Spread, spread

LEVEL = 0.95
CROSSED = "seeds × questions, crossed random effects, generalised pivots"
BY_SEED = "paired t over seeds"
BY_QUESTION = "paired t over questions; one seed says nothing about seeds"
ONE_VALUE = "no interval: one seed, one value"
NO_SPREAD = "no interval: all differences are equal, so nothing says how uncertain they are"
SAME = 1e-12
"""Share of the largest difference below which differences count as equal."""


@dataclass(frozen=True)
class Difference:
    """How much better a first variant is than a second; positive where the first is better.

    Attributes:
        mean: mean over seeds and questions, in units of the score. A score of which lower is better has changed sign.
        low: lower end of the interval; −∞ where nothing is known of the spread.
        high: upper end.
        level: confidence level of the interval.
        p_value: two-sided, of no difference; below 1 − level exactly where the interval leaves out zero.
        by_seed: seed → its difference.
        positive: seeds at which the first is better.
        negative: seeds at which it is worse.
        effect_size: mean over standard deviation of the differences of seeds (Cohen's d for pairs); None with one seed
            or where seeds do not differ.
        relative: mean as a share of the second's mean score; None where that is zero.
        questions: questions that all pairs of runs have answered; 0 where there is a value per seed alone.
        seeds_left_out: seeds that only one of the two has.
        questions_left_out: questions that some run has not answered.
        method: where the interval comes from, in words.
        spread: mean squares of the differences.
    """

    mean: float
    low: float
    high: float
    level: float
    p_value: float
    by_seed: Mapping[int, float]
    positive: int
    negative: int
    effect_size: float | None
    relative: float | None
    questions: int
    seeds_left_out: tuple[int, ...]
    questions_left_out: int
    method: str
    spread: Spread = field(repr=False)

    @property
    def seeds(self) -> int:
        """Number of pairs of runs; with one, interval and p value are about questions alone."""
        return len(self.by_seed)

    def interval(self, level: float) -> tuple[float, float]:
        """Lower and upper end of an interval of another level."""
        half = self.spread.half_width(level)
        return self.mean - half, self.mean + half


def difference(first: Mapping[int, Score], second: Mapping[int, Score], level: float = LEVEL) -> Difference:
    """Compare two variants at the seeds and questions that both have.

    Args:
        first: seed → score of the first variant.
        second: seed → the same score of the second.
        level: confidence level of the interval.

    Raises:
        ValueError: no seed in common, a level outside of 0 to 1, scores of opposite direction, of other units, of other
            settings or questions, or one that is not finite.
    """
    if not 0 < level < 1:
        raise ValueError(f"level: {level} is no confidence level; it is a share between 0 and 1, such as 0.95.")
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        raise ValueError(
            f"The variants have no seed in common: {sorted(first)} and {sorted(second)}. "
            "Differences are paired by seed; run both with the same seeds."
        )
    runs = [first[seed] for seed in seeds], [second[seed] for seed in seeds]
    _check_same([score for side in runs for score in side])
    asked = [set(score.answers) for side in runs for score in side]
    shared = sorted(set.intersection(*asked))
    if all(asked) and not shared:
        raise ValueError("There is no question that all runs have answered: ask all of them the same ones.")
    left, right = (_table(side, shared) for side in runs)
    for seed, *cells in zip(seeds, left, right, strict=True):
        if not np.isfinite(cells).all():
            raise ValueError(f"seed {seed}: a score is not a finite number; leave this seed out.")
    table = (left - right) * (1 if runs[0][0].better == "higher" else -1)
    found = _spread(table, _right_or_wrong(left, right) if shared else False)
    by_seed = table.mean(axis=1)
    mean, base = float(by_seed.mean()), float(right.mean())
    half = found.half_width(level)
    deviation = float(by_seed.std(ddof=1)) if len(seeds) > 1 else 0.0
    return Difference(
        mean=mean,
        low=mean - half,
        high=mean + half,
        level=level,
        p_value=float(found.p_value(mean)),
        by_seed=dict(zip(seeds, by_seed.tolist(), strict=True)),
        positive=int((by_seed > 0).sum()),
        negative=int((by_seed < 0).sum()),
        effect_size=mean / deviation if deviation > SAME * np.abs(by_seed).max() else None,
        relative=mean / abs(base) if base else None,
        questions=len(shared),
        seeds_left_out=tuple(sorted(first.keys() ^ second.keys())),
        questions_left_out=len(set.union(*asked)) - len(shared),
        method=_method(found, bool(shared)),
        spread=found,
    )


def _check_same(scores: Sequence[Score]) -> None:
    """Refuse scores that measure different things.

    Raises:
        ValueError: saying in what they differ.
    """
    if len(ways := {score.better for score in scores}) > 1:
        raise ValueError(
            f"The better score is the {' and the '.join(sorted(ways))} one, by run: these are different scores."
        )
    if len({score.share for score in scores}) > 1:
        raise ValueError("Some runs have a share of 0 to 1 and others another number: evaluate all of them anew.")
    for name in dict.fromkeys(name for score in scores for name in score.asked):
        found = dict.fromkeys(str(score.asked.get(name)) for score in scores if score.asked)
        if len(found) > 1:
            raise ValueError(
                f"Runs were evaluated in different ways ({name}: {' and '.join(found)}): evaluate all of them alike."
            )


def _table(runs: Sequence[Score], questions: Sequence[str]) -> Array:
    """Scores [seeds, questions], or [seeds, 1] where there is no question that all have."""
    if not questions:
        return np.array([[run.value] for run in runs], dtype=np.float64)
    return np.array([[run.answers[question] for question in questions] for run in runs], dtype=np.float64)


def _right_or_wrong(left: Array, right: Array) -> bool:
    return bool(np.isin(left, (0, 1)).all() and np.isin(right, (0, 1)).all())


def _spread(table: Array, right_or_wrong: bool) -> Spread:
    """Mean squares of the differences, without what is mere rounding.

    Where answers are right or wrong, they count as if two more had differed, one each way (after Bonett and Price
    2012): a hundred equal answers do not show that two variants are the same.
    """
    if np.ptp(table) <= SAME * np.abs(table).max():
        table = np.full_like(table, table.flat[0])
    return spread(table, 2 / table.size if right_or_wrong else 0.0)


def _method(found: Spread, asked: bool) -> str:
    if found.seeds * found.questions == 1:
        return ONE_VALUE
    if not float(found.error()) > 0:
        return NO_SPREAD
    if found.crossed:
        return CROSSED
    return BY_SEED if found.seeds > 1 else BY_QUESTION
