"""Runs that are taken away end with the weights of a run that nothing happened to; `interruptions` tries many more."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster.interruptions import Case, Driver, script
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


def test_a_job_whose_time_ends_saves_before_and_goes_on(slurm: Slurm, tmp_path: Path) -> None:
    case, driver = Case(8, "1 task", 0, "padded"), Driver(slurm, tmp_path)
    whole = driver.reference(case.layout, case.batching)
    # its steps sleep for 105 seconds, and it has 100: enough to start on a slow machine, too little on any to end
    limited = script(case, "limited", "--preemption.margin 20", pause=1.75)
    store = {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/limited.db"}
    job = slurm.submit(tmp_path, limited, "--time=2", variables=store)
    try:
        assert slurm.wait(job, seconds=480) == "COMPLETED", slurm.report(job)
    finally:
        slurm.run("scancel", str(job), check=False)  # one that never ends would take the nodes from the other tests
    assert slurm.restarts(job) > 0
    assert "asked to leave (the SLURM job ends soon): saved step" in slurm.output(job)
    assert driver.judge("limited", job, whole) == "same"
