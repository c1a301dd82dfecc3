"""Runs that are taken away end with the weights of a run that nothing happened to; `interruptions` tries many more."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster.interruptions import Case, Driver
from tests.cluster.slurm import Slurm


@pytest.mark.parametrize(
    ("layout", "kinds"),
    [
        ("2-node ddp", ["requeue", "requeue", "requeue"]),
        ("2-node fsdp", ["USR1 of a rank", "KILL of a rank"]),
        ("1 task", ["preemption", "TERM"]),
    ],
)
def test_a_job_that_is_taken_away_ends_as_one_that_is_not(
    layout: str, kinds: list[str], slurm: Slurm, tmp_path: Path
) -> None:
    case = Case(7, layout, 2, "packed")
    Driver(slurm, tmp_path).run(case, kinds)
    assert case.outcome == "same", case
    assert case.interruptions
