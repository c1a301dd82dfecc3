"""The plans of many stages as a table for the documentation, with the least hardware that each fits on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import NamedTuple

from lit_vlm.core.devices import CARDS
from lit_vlm.planning.job import Device, Failed, Job, Measured
from lit_vlm.planning.plan import GIB, RunStep, Setup, StagePlan
from lit_vlm.planning.simulation import UNLIMITED

COUNTS = (1, 4, 8, 16, 32, 64, 128)
"""Numbers of devices that are tried, fewest first."""
SIZES = ("4090", "a100-40", "l40s", "h100", "h200", "b200")
"""Cards that are tried, those with less memory first."""


class Stage(NamedTuple):
    """A stage that is surveyed.

    Attributes:
        recipe: name of the recipe.
        scale: its scale.
        name: name of the stage.
        job: gives the job on a number of devices; on one, without sharding.
    """

    recipe: str
    scale: str
    name: str
    job: Callable[[int], Job]


def markdown(stages: Iterable[Stage], setup: Setup, run: RunStep) -> Iterable[str]:
    """Yield the lines of a table: what each stage takes of the devices of `setup`, and the least hardware it fits on.

    Args:
        stages: the stages.
        setup: devices of the table's figures.
        run: runs a step.

    Raises:
        ValueError: where a step does not run for another reason than memory.
    """
    yield "| recipe | scale | stage | states | peak | reserved | s per step | MFU | GPU-hours | fits on |"
    yield "|" + "---|" * 10
    for stage in stages:
        job = replace(stage.job(setup.devices), device=setup.device(UNLIMITED), record=True)
        plan = StagePlan(stage.name, setup, _measured(stage, run(job)), fits=True)
        took = plan.runs
        cells = [
            *(stage.recipe, stage.scale, stage.name),
            *(f"{size / GIB:.1f}" for size in (took.states.total, took.peak, took.reserved)),
            f"{plan.step_seconds:.2f}",
            f"{100 * plan.mfu:.0f} %",
            f"{plan.hours * setup.devices:,.0f}",
            least(stage, setup, run) or "none that was tried",
        ]
        yield "| " + " | ".join(cells) + " |"


def least(stage: Stage, setup: Setup, run: RunStep) -> str | None:
    """The fewest devices on which a stage's step runs with its micro-batch, and of these the one with least memory.

    Args:
        stage: the stage.
        setup: assumptions, and devices of a machine.
        run: runs a step.
    """
    for count in COUNTS:
        job = stage.job(count)
        asked = run(replace(job, device=_room(SIZES[-1], setup)))
        if isinstance(asked, Failed):
            _refuse_other(stage, asked)
            continue
        for name in SIZES[:-1]:
            room = _room(name, setup)
            if room.bytes > asked.peak and isinstance(run(replace(job, device=room)), Measured):
                return f"{count} × {CARDS[name].name}"
        return f"{count} × {CARDS[SIZES[-1]].name}"
    return None


def _room(name: str, setup: Setup) -> Device:
    """What PyTorch may allocate on a card."""
    return setup.device(int(CARDS[name].memory - setup.assumed.context))


def _measured(stage: Stage, result: Measured | Failed) -> Measured:
    if isinstance(result, Failed):
        raise ValueError(f"{stage.recipe}, {stage.scale}, {stage.name}: {result.reason}")
    return result


def _refuse_other(stage: Stage, failed: Failed) -> None:
    if not failed.memory:
        _measured(stage, failed)
