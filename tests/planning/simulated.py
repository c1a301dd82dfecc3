"""Jobs on simulated devices, for tests; one process of a test worker serves them all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest

from lit_vlm.commands.plan import jobs, simulator
from lit_vlm.commands.recipe import find_recipe
from lit_vlm.core.devices import CARDS
from lit_vlm.planning.job import Failed, Job, Measured
from lit_vlm.planning.no_gpu import can_simulate
from lit_vlm.planning.plan import Setup
from lit_vlm.planning.roofline import Assumptions
from lit_vlm.planning.simulation import Simulator

GIB = 2**30
needs_simulation = pytest.mark.skipif(
    not can_simulate(), reason="simulated GPUs need Linux, a CUDA build of PyTorch and a C compiler"
)
PLENTY = 400 * GIB
"""More than any device has, so that each stage runs."""


def setup(devices: int, card: str = "h100") -> Setup:
    return Setup(CARDS[card], devices, 8, Assumptions())


def job(
    recipe: str, stage: str, devices: int, strategy: str, flags: Sequence[str] = (), scale: str | None = None
) -> Job:
    """The job of a stage at its published scale, with the statistics of its data, on devices of any size."""
    made = next(jobs(find_recipe(recipe), scale, strategy, [stage], flags, setup(devices)))[1]
    return replace(made, device=made.device._replace(bytes=PLENTY))


@pytest.fixture(scope="session")
def simulated() -> Iterator[Simulator]:
    with simulator(setup(8)) as process:
        yield process


def measured(result: Measured | Failed) -> Measured:
    assert isinstance(result, Measured), f"{result.reason}\n{result.trace}"
    return result
