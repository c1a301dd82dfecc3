"""What finished runs have found, as plain data: scores, answers to single questions, curves, costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Better = Literal["higher", "lower"]


@dataclass(frozen=True)
class Score:
    """A score of one run.

    Attributes:
        value: the score as it is reported: a share of 0 to 1 for accuracies, nats for losses.
        better: whether a higher or a lower value is the better one.
        answers: question → its own score, where answers are kept. Their mean is `value` for scores that are means of
            questions; for others, such as corpus scores, it is empty.
        kinds: question → its kind, source or skill, where it has one.
        chance: value of guessing, where it is known.
        shuffled: value where pictures were exchanged between questions, where that was asked.
        share: whether it is a share of 0 to 1, which tables print in percent.
        main: whether it stands for its task, so that tables have it without being asked.
        by_kind: kind, source or skill of question → value, where there are several.
        asked: settings of an evaluation on which answers depend, by name; scores of others are not compared.
    """

    value: float
    better: Better = "higher"
    answers: Mapping[str, float] = field(default_factory=dict)
    kinds: Mapping[str, str] = field(default_factory=dict)
    chance: float | None = None
    shuffled: float | None = None
    share: bool = True
    main: bool = False
    by_kind: Mapping[str, float] = field(default_factory=dict)
    asked: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Cost:
    """What a run has taken, summed over its stages.

    Attributes:
        seconds: time in training; that of shared stages is counted in each run that has them. NaN where a stage does
            not tell it.
        devices: devices of the largest stage; 0 where none tells it.
        trained: parameters that the last stage trained; 0 where it does not tell it.
        steps: optimizer steps of all stages.
        tokens_per_second: of the last stage, in the mean; None where it was not measured.
        peak_bytes: most memory that a device held, or without one the process; None where it was not measured.
        device_seconds: time of each stage times its devices, summed. NaN where a stage does not tell it.
    """

    seconds: float
    devices: int
    trained: int
    steps: int
    tokens_per_second: float | None = None
    peak_bytes: int | None = None
    device_seconds: float = math.nan


@dataclass(frozen=True)
class Run:
    """A finished run of a recipe.

    Attributes:
        variant: name of its settings; runs of one variant differ in the seed alone.
        seed: value of `--seed_everything`.
        folder: folder of the run, with a folder per stage.
        flags: recipe, scale, stages, and what else its command line says, without the seed.
        scores: name → score, e.g. `held_out/accuracy`, `scenes/4-shot/accuracy`, `held_out/loss`.
        curves: name of a metric → optimizer step and value, stages one after the other.
        cost: what it has taken.
        origin: where it comes from: versions, commit, fingerprint of each source of data.
    """

    variant: str
    seed: int
    folder: Path
    flags: tuple[str, ...]
    scores: Mapping[str, Score]
    curves: Mapping[str, Sequence[tuple[int, float]]]
    cost: Cost
    origin: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Claim:
    """What is said of two variants, to be judged.

    Attributes:
        text: the claim, in its author's words.
        better: the variant that is said to be better.
        worse: the other one.
        score: name of the score by which it is.
        source: where that is said.
    """

    text: str
    better: str
    worse: str
    score: str
    source: str | None = None


def by_seed(runs: Sequence[Run], variant: str, score: str) -> dict[int, Score]:
    """Seed → a score of a variant, of the runs that have it, by seed."""
    found = {run.seed: run.scores[score] for run in runs if run.variant == variant and score in run.scores}
    return dict(sorted(found.items()))
