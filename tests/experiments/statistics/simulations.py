"""Simulations of the statistics: `python -m tests.experiments.statistics.simulations` prints every table (minutes).

Tests call the same functions with fewer draws. Every one is deterministic.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np
from scipy import special, stats

from lit_vlm.experiments.statistics.power import power, seeds_that_decide, smallest_detectable, with_seeds
from lit_vlm.experiments.statistics.sequential import Looks, Spending
from lit_vlm.experiments.statistics.spread import Array, Spread, spread

ALPHA = 0.05
CELLS = 4_000_000
"""Most cells in memory at once."""
SHARES = {
    "rest only": (0.0, 0.0, 1.0),
    "questions only": (0.0, 1.0, 0.0),
    "seeds only": (1.0, 0.0, 0.0),
    "no seeds": (0.0, 0.5, 0.5),
    "no questions": (0.5, 0.0, 0.5),
    "no rest": (0.5, 0.5, 0.0),
    "mostly questions": (0.1, 0.8, 0.1),
    "mostly seeds": (0.8, 0.1, 0.1),
    "equal": (1 / 3, 1 / 3, 1 / 3),
}
"""Shares of the mean's variance that seeds, questions and the rest have."""
Shares = tuple[float, float, float]


def tables(rng: np.random.Generator, count: int, seeds: int, questions: int, shares: Shares) -> Array:
    """Normal differences [count, seeds, questions] without a true difference; their mean has variance 1."""
    of_seeds, of_questions, of_rest = shares
    return (
        np.sqrt(seeds * of_seeds) * rng.standard_normal((count, seeds, 1))
        + np.sqrt(questions * of_questions) * rng.standard_normal((count, 1, questions))
        + (np.sqrt(seeds * questions * of_rest) * rng.standard_normal((count, seeds, questions)) if of_rest else 0)
    )


def answers(
    rng: np.random.Generator, count: int, seeds: int, questions: int, seed_sd: float, question_sd: float, rest_sd: float
) -> Array:
    """Differences of answers that are right or wrong, at an accuracy of 69 %, without a true difference.

    Both variants find the same questions hard. A variant has effects of its own of seeds, questions and cells, with
    these standard deviations where hardness has 1.
    """
    hard = rng.standard_normal((count, 1, questions))
    own = 1 + seed_sd**2 + question_sd**2 + rest_sd**2
    right = [
        hard
        + seed_sd * rng.standard_normal((count, seeds, 1))
        + question_sd * rng.standard_normal((count, 1, questions))
        + rest_sd * rng.standard_normal((count, seeds, questions))
        + 0.5 * np.sqrt(own)
        > 0
        for _ in range(2)
    ]
    return right[0].astype(float) - right[1]


def p_values(table: Array, true: float = 0.0, right_or_wrong: bool = False) -> Array:
    """p values of tables against a true difference, as `difference` has them."""
    found = spread(table, 2 / (table.shape[-2] * table.shape[-1]) if right_or_wrong else 0.0)
    return np.concatenate(
        [
            part(found, chosen).p_value(table[chosen].mean(axis=(-2, -1)) - true)
            for chosen in np.array_split(np.arange(len(table)), max(1, len(table) // 500))
        ]
    )


def part(found: Spread, chosen: Array) -> Spread:
    """Some of many tables' mean squares."""
    return Spread(
        found.seeds,
        found.questions,
        found.between_seeds[chosen],
        found.between_questions[chosen],
        found.residual[chosen],
    )


def batches(count: int, seeds: int, questions: int) -> Iterator[int]:
    size = max(1, min(count, CELLS // (seeds * questions)))
    yield from [size] * (count // size)
    if count % size:
        yield count % size


def coverage(count: int, seeds: int, questions: int, shares: Shares) -> float:
    """Share of intervals with the true difference in them."""
    rng = np.random.default_rng(0)
    found = [p_values(tables(rng, size, seeds, questions, shares)) for size in batches(count, seeds, questions)]
    return float((np.concatenate(found) > ALPHA).mean())


def coverage_of_answers(count: int, seeds: int, questions: int, sds: Shares) -> tuple[float, float]:
    """Coverage where answers are right or wrong, and the share of answers that differ."""
    rng = np.random.default_rng(0)
    found, differ = [], []
    for size in batches(count, seeds, questions):
        table = answers(rng, size, seeds, questions, *sds)
        differ.append(np.abs(table).mean())
        found.append(p_values(table, right_or_wrong=True))
    return float((np.concatenate(found) > ALPHA).mean()), float(np.mean(differ))


def other_methods(count: int, seeds: int, questions: int, shares: Shares, draws: int = 999) -> dict[str, float]:
    """Coverage of intervals that were not taken: three bootstraps over seeds and questions, and Satterthwaite's t."""
    rng = np.random.default_rng(0)
    covered = np.zeros(4)
    wide = stats.norm.cdf(np.sqrt(seeds / (seeds - 1)) * stats.t.ppf(ALPHA / 2, seeds - 1))
    for _ in range(count):
        table = tables(rng, 1, seeds, questions, shares)[0]
        by_seed = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=draws).astype(float)
        by_question = rng.multinomial(questions, np.full(questions, 1 / questions), size=draws).astype(float)
        columns = by_seed @ table / seeds
        rows = by_question @ table.T / questions
        means = (columns * by_question).sum(axis=1) / questions
        squares = ((by_seed @ table**2) * by_question).sum(axis=1) - seeds * questions * means**2
        of_seeds = questions * (by_seed * (rows - means[:, None]) ** 2).sum(axis=1)
        of_questions = seeds * (by_question * (columns - means[:, None]) ** 2).sum(axis=1)
        rest = np.maximum(squares - of_seeds - of_questions, 0) / ((seeds - 1) * (questions - 1))
        drawn = Spread(seeds, questions, of_seeds / (seeds - 1), of_questions / (questions - 1), rest)
        found, mean = spread(table), table.mean()
        error = float(found.error())
        with np.errstate(divide="ignore", invalid="ignore"):
            t = np.nan_to_num((means - mean) / drawn.error(), nan=0.0)
        bounds = [
            np.quantile(means, [ALPHA / 2, 1 - ALPHA / 2]),
            np.quantile(means, [wide, 1 - wide]),
            mean - error * np.quantile(t, [1 - ALPHA / 2, ALPHA / 2], method="nearest"),
            mean + error * stats.t.ppf([ALPHA / 2, 1 - ALPHA / 2], float(found.freedom())),
        ]
        covered += [low <= 0 <= high for low, high in bounds]
    names = ("percentile bootstrap", "expanded percentile", "bootstrap-t", "Satterthwaite's t")
    return dict(zip(names, (covered / count).tolist(), strict=True))


def decided(p: Array, looks: Looks | None) -> Array:
    """Look at which each claim is decided, from 0; the number of looks where none does. [draws, claims].

    Args:
        p: [draws, looks, claims].
        looks: what is planned; None for one look, with Holm's correction alone.
    """
    draws, number, claims = p.shape
    steps = [ALPHA / (claims - place) for place in range(claims)]
    limits = np.array([[looks.alpha(k + 1, a) if looks else a for k in range(number)] for a in steps])
    below = p[:, None] < limits[None, :, :, None]  # [draws, steps, looks, claims]
    at = np.full((draws, claims), number)
    for look in range(number):
        so_far = below[:, :, : look + 1].any(axis=2)
        done = (at < number).sum(axis=1)
        for _ in range(claims):
            step = np.minimum(done, claims - 1)
            rejected = so_far[np.arange(draws), step] | (at < number)
            at[rejected & (at == number)] = look
            done = (at < number).sum(axis=1)
    return at


def family(count: int, seeds: int, questions: int, true: tuple[float, ...], shares: Shares) -> tuple[float, float]:
    """Chance of any wrong verdict, and share of true differences found, of variants that share a base.

    Args:
        count: families drawn.
        seeds: of each variant.
        questions: of each run.
        true: true difference of each claim, in standard errors.
        shares: see `SHARES`.
    """
    rng = np.random.default_rng(1)
    at = decided(_shared_base(rng, count, seeds, questions, true, shares, [seeds]), None) < 1
    return _wrong_and_found(at, true)


def sequential(
    count: int, looks: Looks, questions: int, true: tuple[float, ...], shares: Shares
) -> tuple[float, float, float]:
    """Chance of any wrong verdict over all looks, share of true differences found, mean seeds used.

    True differences are in standard errors at the last look. Seeds are added until all claims are decided.
    """
    rng = np.random.default_rng(2)
    p = _shared_base(rng, count, looks.seeds[-1], questions, true, shares, looks.seeds)
    at = decided(p, looks)
    last = np.minimum(at.max(axis=1), len(looks.seeds) - 1)
    wrong, found = _wrong_and_found(at < len(looks.seeds), true)
    return wrong, found, float(np.array(looks.seeds)[last].mean())


def _shared_base(
    rng: np.random.Generator,
    count: int,
    seeds: int,
    questions: int,
    true: tuple[float, ...],
    shares: Shares,
    sizes: list[int] | tuple[int, ...],
) -> Array:
    """p values [draws, looks, claims] of variants against one base, with the first seeds of each."""
    p = np.empty((count, len(sizes), len(true)))
    done = 0
    for size in batches(count, seeds, questions * 2):
        base = tables(rng, size, seeds, questions, shares)
        for place, shift in enumerate(true):
            table = (base + tables(rng, size, seeds, questions, shares)) / np.sqrt(2) + shift
            for look, some in enumerate(sizes):
                p[done : done + size, look, place] = p_values(table[:, :some])
        done += size
    return p


def _wrong_and_found(at: Array, true: tuple[float, ...]) -> tuple[float, float]:
    null = np.array(true) == 0
    wrong = float(at[:, null].any(axis=1).mean()) if null.any() else float("nan")
    return wrong, float(at[:, ~null].mean()) if (~null).any() else float("nan")


def expected(seeds: int, questions: int, shares: Shares) -> Spread:
    """Mean squares that tables of these shares have on average."""
    of_seeds, of_questions, of_rest = shares
    cells = seeds * questions
    of = [np.array(cells * (share + of_rest)) for share in (of_seeds, of_questions)]
    return Spread(seeds, questions, of[0], of[1], np.array(cells * of_rest))


def power_at(count: int, seeds: int, questions: int, shares: Shares) -> tuple[float, float]:
    """The smallest difference a design can see, in standard errors, and how often it is seen."""
    shift = smallest_detectable(expected(seeds, questions, shares), 1 - ALPHA)
    rng = np.random.default_rng(3)
    p = np.concatenate(
        [p_values(tables(rng, size, seeds, questions, shares) + shift) for size in batches(count, seeds, questions)]
    )
    return shift, float((p < ALPHA).mean())


def power_with_more_seeds(count: int, seeds: int, questions: int, shares: Shares) -> tuple[int | None, float]:
    """Seeds that decide a difference of two standard errors, and how often that many do."""
    design = expected(seeds, questions, shares)
    needed = seeds_that_decide(design, 2.0, 1 - ALPHA)
    if needed is None:
        return None, power(with_seeds(design, 100), 2.0, 1 - ALPHA)
    scale = tuple(share * few for share, few in zip(shares, (seeds / needed, 1.0, seeds / needed), strict=True))
    rng = np.random.default_rng(4)
    p = np.concatenate(
        [p_values(tables(rng, size, needed, questions, scale) + 2.0) for size in batches(count, needed, questions)]
    )
    return needed, float((p < ALPHA).mean())


def t_only(count: int, looks: Looks) -> float:
    """Chance of a wrong verdict over all looks with a value per seed alone, which the levels are exact for."""
    rng = np.random.default_rng(5)
    values = rng.standard_normal((count, looks.seeds[-1]))
    hit = np.zeros(count, dtype=bool)
    for look, seeds in enumerate(looks.seeds, start=1):
        some = values[:, :seeds]
        t = some.mean(axis=1) / some.std(axis=1, ddof=1) * np.sqrt(seeds)
        hit |= 2 * special.stdtr(seeds - 1, -np.abs(t)) < looks.alpha(look)
    return float(hit.mean())


def _row(*cells: object) -> None:
    sys.stdout.write("| " + " | ".join(str(cell) for cell in cells) + " |\n")
    sys.stdout.flush()


def _head(title: str, *cells: str) -> None:
    sys.stdout.write(f"\n{title}\n\n")
    _row(*cells)
    _row(*("---" for _ in cells))


def _percent(share: float) -> str:
    return "–" if np.isnan(share) else f"{100 * share:.1f}"


def _print_coverage(count: int) -> None:
    sizes = [(seeds, questions) for seeds in (2, 3, 5, 10) for questions in (50, 1000)]
    _head("Coverage, %", "variance of the mean from", *(f"{s} × {q}" for s, q in sizes))
    for name, shares in SHARES.items():
        _row(name, *(_percent(coverage(count, s, q, shares)) for s, q in sizes))


def _print_answers(count: int) -> None:
    sizes = [(seeds, questions) for seeds in (2, 3, 5, 10) for questions in (50, 1000)]
    _head(
        "Coverage, %, right or wrong answers",
        "sd of seeds, questions, rest",
        "differ, %",
        *(f"{s} × {q}" for s, q in sizes),
    )
    for sds in ((0.0, 0.0, 0.05), (0.0, 0.0, 0.3), (0.0, 0.5, 0.5), (0.05, 0.3, 0.5), (0.2, 0.3, 0.5), (0.2, 0.0, 0.2)):
        found = [coverage_of_answers(count, s, q, sds) for s, q in sizes]
        _row(", ".join(map(str, sds)), f"{100 * found[-1][1]:.0f}", *(_percent(one) for one, _ in found))


def _print_others(count: int) -> None:
    names = ("no seeds", "no questions", "mostly seeds", "equal")
    _head(
        "Coverage of other methods, %, 500 questions", "method", *(f"{s} seeds, {n}" for s in (2, 3, 5) for n in names)
    )
    found = [other_methods(count, s, 500, SHARES[n]) for s in (2, 3, 5) for n in names]
    for method in found[0]:
        _row(method, *(_percent(one[method]) for one in found))


def _print_family(count: int) -> None:
    _head("Families, 200 questions, equal shares", "seeds", "true differences", "any wrong verdict, %", "found, %")
    for seeds in (3, 5, 10):
        for true in ((0.0,) * 5, (0.0, 0.0, 0.0, 5.0, 5.0), (0.0, 8.0, 8.0, 8.0, 8.0)):
            wrong, found = family(count, seeds, 200, true, SHARES["equal"])
            _row(seeds, ", ".join(f"{one:g}" for one in true), _percent(wrong), _percent(found))


def _print_sequential(count: int) -> None:
    plans: list[tuple[tuple[int, ...], Spending]] = [
        (plan, way)
        for plan in ((2, 3, 5, 10), (3, 4, 5), (3, 5, 8), (3, 4, 5, 6, 8, 10))
        for way in ("pocock", "obrien-fleming")
    ]
    _head("Sequential, a value per seed", "looks", "spending", "wrong over all looks, %")
    for plan, way in plans:
        _row(", ".join(map(str, plan)), way, _percent(t_only(20 * count, Looks(plan, way))))
    _head(
        "Sequential, 100 questions",
        "looks", "spending", "shares", "true differences", "any wrong verdict, %", "found, %", "mean seeds",
    )  # fmt: skip
    for plan, way in plans:
        for name in ("mostly seeds", "equal"):
            for true in ((0.0,), (0.0, 0.0, 0.0), (4.0,), (8.0,), (0.0, 6.0, 6.0)):
                wrong, found, seeds = sequential(count, Looks(plan, way), 100, true, SHARES[name])
                shown = ", ".join(f"{one:g}" for one in true)
                _row(", ".join(map(str, plan)), way, name, shown, _percent(wrong), _percent(found), f"{seeds:.1f}")


def _print_power(count: int) -> None:
    _head(
        "Power at the smallest detectable difference (wanted: 80 %)",
        "seeds × questions",
        "shares",
        "standard errors",
        "seen, %",
    )
    for seeds, questions in ((2, 200), (3, 200), (5, 200), (10, 200)):
        for name in ("no seeds", "mostly questions", "equal", "mostly seeds"):
            shift, seen = power_at(count, seeds, questions, SHARES[name])
            _row(f"{seeds} × {questions}", name, f"{shift:.1f}", _percent(seen))
    _head(
        "Seeds that would decide two standard errors, 200 questions",
        "seeds now",
        "shares",
        "seeds needed",
        "decided with them, %",
    )
    for seeds in (2, 3, 5):
        for name in ("mostly questions", "equal", "mostly seeds", "seeds only"):
            needed, seen = power_with_more_seeds(count, seeds, 200, SHARES[name])
            _row(seeds, name, needed or "none up to 100", _percent(seen))


PRINTED = {
    "coverage": _print_coverage,
    "answers": _print_answers,
    "others": _print_others,
    "family": _print_family,
    "sequential": _print_sequential,
    "power": _print_power,
}

if __name__ == "__main__":
    for title in sys.argv[1:] or PRINTED:
        PRINTED[title](1000 if title == "others" else 4000)
