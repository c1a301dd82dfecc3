"""Numbers, intervals and verdicts as text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev

from lit_vlm.experiments.report.study import Finding, Gap
from lit_vlm.experiments.statistics.paired import Difference
from lit_vlm.experiments.statistics.power import MOST_SEEDS
from lit_vlm.experiments.statistics.verdict import Judged

COMPARED = {"shown": "better", "contradicted": "worse"}
"""Words for verdicts where nobody claims anything."""
UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def number(value: float, share: bool, signed: bool = False) -> str:
    """A score: shares in percent, others with as many digits as tell something."""
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    size = abs(value)
    digits = 1 if share else 0 if size >= 1000 else 1 if size >= 20 else 3
    text = f"{100 * value if share else value:{'+' if signed else ''},.{digits}f}"
    return text.replace("-", "−")


def unit(share: bool) -> str:
    """What differences of a score are counted in."""
    return " points" if share else ""


def mean_of(values: Sequence[float], share: bool) -> str:
    """Mean, and standard deviation where there are several; how many are not finite, where one is."""
    if not values:
        return "–"
    if odd := sum(not math.isfinite(value) for value in values):
        return f"– ({odd} of {len(values)} not finite)"
    text = number(fmean(values), share)
    return text if len(values) == 1 else f"{text} ± {number(stdev(values), share)}"


def interval(found: Difference, share: bool) -> str:
    """The interval of a difference."""
    if math.isinf(found.low):
        return "none"
    return f"{number(found.low, share, signed=True)} to {number(found.high, share, signed=True)}"


def gained(found: Difference, share: bool) -> str:
    """A difference with its interval, for a cell of a table."""
    value = number(found.mean, share, signed=True)
    return value if math.isinf(found.low) else f"{value} [{interval(found, share)}]"


def p_value(judged: Judged) -> str:
    """The corrected p value; nothing with one seed, where none is about seeds."""
    if judged.verdict == "one seed":
        return "–"
    return "< 0.001" if judged.p_value < 0.001 else f"{judged.p_value:.3f}"


def effect(value: float | None) -> str:
    """An effect size."""
    return "–" if value is None else f"{value:+.1f}".replace("-", "−")


def left_out(found: Difference) -> str:
    """What only some of the runs have, and so does not count; nothing where all have all."""
    parts = []
    if seeds := found.seeds_left_out:
        parts.append(f"seed{'s' if seeds[1:] else ''} {', '.join(map(str, seeds))} left out, as only one side has it")
    if found.questions_left_out:
        parts.append(f"{found.questions_left_out:,} questions left out, as not all runs have answered them")
    return "; ".join(parts)


def signs(found: Difference) -> str:
    """At how many seeds the first is better."""
    return f"{found.positive} of {found.seeds}"


def headline(finding: Finding, share: bool) -> str:
    """What was found of a claim, in one sentence without figures of certainty."""
    claim, judged = finding.claim, finding.judged
    if judged is None:
        return "There is nothing to judge it by"
    if judged.verdict == "undecided":
        return f"{claim.better} and {claim.worse} are not told apart on {claim.score}"
    mean = judged.difference.mean
    if not mean:
        text = f"{claim.better} and {claim.worse} are equal on {claim.score}"
    else:
        better, worse = (claim.better, claim.worse) if mean > 0 else (claim.worse, claim.better)
        is_better = "came out" if judged.verdict == "one seed" else "is"
        size_of = f"{number(abs(mean), share)}{unit(share)}"
        text = f"{better} {is_better} {size_of} better than {worse} on {claim.score}"
    return f"With one seed, {text}" if judged.verdict == "one seed" else text


def details(finding: Finding, share: bool) -> str:
    """How certain that is, and what would help."""
    claim, judged = finding.claim, finding.judged
    if judged is None:
        return f"{finding.missing[:1].upper()}{finding.missing[1:].removesuffix('.')}."
    found = judged.difference
    if judged.verdict == "one seed":
        about = f"{found.questions:,} questions: {gained(found, share)}. " if found.questions else ""
        return f"{about}Nothing is said about other seeds."
    text = f"{claim.better} − {claim.worse}: {number(found.mean, share, signed=True)}{unit(share)}"
    if found.mean and not math.isinf(found.low):
        text += f" ({found.level:.0%} interval {interval(found, share)})"
    text += f", better at {signs(found)} seeds, p {_equals(p_value(judged))}"
    if lacking := left_out(found):
        text += f" ({lacking})"
    if judged.verdict != "undecided":
        return f"{text}."
    if math.isinf(found.low):
        return f"{text}. All differences are equal, so nothing says how uncertain they are."
    if judged.seeds_needed:
        more = f"about {judged.seeds_needed} seeds would decide, if the difference is as observed"
    else:
        more = f"{MOST_SEEDS} seeds would not decide, if the difference is as observed"
        more += ", but more questions may" if found.questions else ""
    if math.isinf(judged.smallest_detectable):
        return f"{text}; {more}."
    seen = f"{number(judged.smallest_detectable, share)}{unit(share)}"
    return f"{text}; {more}. A true difference of {seen} would have been found four times in five."


def summary(compared: Sequence[Gap], base: str) -> str:
    """What all differences to the base come to, in one or two sentences; nothing without any."""
    if not compared:
        return ""
    if all(gap.judged.verdict == "one seed" for gap in compared):
        return "One seed: nothing is said about other seeds."
    named = {word: [gap for gap in compared if gap.judged.verdict == state] for state, word in COMPARED.items()}
    told = [
        f"{word.capitalize()} than {base}: {', '.join(f'{gap.variant} on {gap.score}' for gap in found)}."
        for word, found in named.items()
        if found
    ]
    left = len(compared) - sum(map(len, named.values()))
    return " ".join([*told, *([f"Undecided: {left} of {len(compared)} differences."] if left else [])])


def _equals(p: str) -> str:
    return p if p.startswith("<") else f"= {p}"


def hours(seconds: float) -> str:
    """A length of time."""
    if math.isnan(seconds):
        return "–"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def size(number_of_bytes: float | None) -> str:
    """An amount of memory."""
    if number_of_bytes is None:
        return "–"
    scale, name = next((one for one in UNITS if number_of_bytes >= one[0]), (1, "B"))
    return f"{number_of_bytes / scale:.1f} {name}"


def count(value: float) -> str:
    """A number of parameters."""
    if not value:
        return "–"
    for scale, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{value / scale:.3g} {name}"
    return f"{value:.0f}"
