"""A study: runs of several variants, what is claimed of them, and what is found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from lit_vlm.experiments.results import Claim, Run, Score, by_seed
from lit_vlm.experiments.statistics.paired import Difference, difference
from lit_vlm.experiments.statistics.verdict import Judged, Tested, judge

SPENT = "device time, each stage counted once"
"""Name of what a study tells about itself: what its runs have cost, where they share stages."""
LOOKS = ", for all claims and looks at once"
"""What is said of the intervals of a study with several looks."""


@dataclass(frozen=True)
class Study:
    """Runs of several variants, and what is claimed of them.

    Attributes:
        title: what it is about, in a line.
        base: the variant that the others are compared with.
        runs: finished runs; variants are shown in the order in which they come here.
        claims: what is to be judged.
        scores: names of the scores that tables have; default: the main ones.
        command: the command that makes it again.
        about: further lines of its record, by name, such as stages that were shared and hours that this saved.
        judged: verdicts on the claims that can be judged, in their order, where there were several looks; intervals of
            claims are then those that allow for looking. Default: verdicts of one look at the end.
        open: why no claim can be judged yet, such as a first look that is not complete; "" where they can.
    """

    title: str
    base: str
    runs: Sequence[Run]
    claims: Sequence[Claim] = ()
    scores: Sequence[str] = ()
    command: str = ""
    about: Mapping[str, str] = field(default_factory=dict)
    judged: Sequence[Judged] | None = None
    open: str = ""

    def __post_init__(self) -> None:
        if self.base not in self.variants:
            raise ValueError(f"no run of the variant '{self.base}', which others are compared with, has finished")

    @property
    def variants(self) -> list[str]:
        """The variants that have runs, in order."""
        return list(dict.fromkeys(run.variant for run in self.runs))

    @property
    def shown(self) -> list[str]:
        """Names of the scores that tables have."""
        known = {name: score for run in self.runs for name, score in run.scores.items()}
        claimed = [claim.score for claim in self.claims if claim.score in known]
        return list(dict.fromkeys([*claimed, *(self.scores or [name for name, one in known.items() if one.main])]))

    def of(self, variant: str) -> list[Run]:
        """The runs of a variant, by seed."""
        return sorted((run for run in self.runs if run.variant == variant), key=lambda run: run.seed)

    def example(self, score: str) -> Score:
        """A score of this name, which tells its direction and unit."""
        return next(run.scores[score] for run in self.runs if score in run.scores)


@dataclass(frozen=True)
class Finding:
    """A claim with what was found.

    Attributes:
        claim: what is said.
        judged: difference and verdict; None where there is nothing to judge it by.
        missing: what there is not, in words; "" where it is judged.
    """

    claim: Claim
    judged: Judged | None
    missing: str = ""


@dataclass(frozen=True)
class Gap:
    """How a variant compares with the base by one score.

    Attributes:
        variant: the variant.
        score: name of the score.
        judged: difference, positive where the variant is better, and verdict on that it is better, corrected for all
            comparisons of the study.
    """

    variant: str
    score: str
    judged: Judged


def findings(study: Study) -> list[Finding]:
    """Every claim with its verdict, in order; claims are one family."""
    if study.open:
        return [Finding(claim, None, study.open) for claim in study.claims]
    compared = [_compare(study.runs, claim.better, claim.worse, claim.score) for claim in study.claims]
    tested = [
        Tested(claim.text, found)
        for claim, found in zip(study.claims, compared, strict=True)
        if isinstance(found, Difference)
    ]
    verdicts = iter(judge(tested) if study.judged is None else map(_looked, study.judged))
    return [
        Finding(claim, None, found) if isinstance(found, str) else Finding(claim, next(verdicts))
        for claim, found in zip(study.claims, compared, strict=True)
    ]


def tested(study: Study) -> list[Tested]:
    """Every claim with the difference that it is about, in order.

    Raises:
        ValueError: for a claim that there is nothing to judge by.
    """
    found = []
    for claim in study.claims:
        difference = _compare(study.runs, claim.better, claim.worse, claim.score)
        if not isinstance(difference, Difference):
            raise ValueError(f"claim {claim.text!r} cannot be judged: {difference}")
        found.append(Tested(claim.text, difference))
    return found


def gaps(study: Study) -> list[Gap]:
    """Every other variant against the base by every score that tables have, as one family."""
    places, tested = [], []
    for variant, score, found in _against_base(study):
        if isinstance(found, Difference):
            places.append((variant, score))
            tested.append(Tested(f"{variant} is better than {study.base}", found))
    return [Gap(*place, judged) for place, judged in zip(places, judge(tested), strict=True)]


def not_compared(study: Study) -> list[str]:
    """A line for each variant and score that cannot be compared with the base, with the reason."""
    return [
        f"{variant} on {score}: {found.removesuffix('.')}"
        for variant, score, found in _against_base(study)
        if isinstance(found, str)
    ]


def _against_base(study: Study) -> Iterator[tuple[str, str, Difference | str]]:
    """Variant, score, and its difference to the base, or why there is none."""
    for score in study.shown:
        for variant in study.variants:
            if variant != study.base:
                yield variant, score, _compare(study.runs, variant, study.base, score)


def _compare(runs: Sequence[Run], better: str, worse: str, score: str) -> Difference | str:
    """The difference of two variants, or what there is not."""
    first, second = by_seed(runs, better, score), by_seed(runs, worse, score)
    for variant, found in ((better, first), (worse, second)):
        if not found:
            return f"no finished run of {variant} has the score {score}"
    try:
        return difference(first, second)
    except ValueError as error:
        return str(error)


def _looked(judged: Judged) -> Judged:
    """A verdict of several looks, whose difference has the interval that allows for them."""
    found = judged.difference
    return replace(judged, difference=replace(found, low=judged.low, high=judged.high, method=f"{found.method}{LOOKS}"))
