"""`lit-vlm submit` and `lit-vlm status` on a real SLURM."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lit_vlm.checkpoints.progress import Progress
from lit_vlm.cluster.queue import Submitted
from tests.cluster.slurm import Slurm, until

STAGE = [
    *("llava15", "--scale", "tiny", "--stages", "1_align", "--gpus", "0", "--time", "10"),
    *("--trainer.enable_progress_bar", "false", "--trainer.limit_val_batches", "0", "--trainer.max_epochs", "-1"),
]


@pytest.fixture
def lit_vlm(slurm: Slurm, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """A function that runs the command line in a folder with a blank in its name."""
    folder = tmp_path / "my work"
    folder.mkdir()
    environment = slurm.environment | {"XDG_CONFIG_HOME": str(tmp_path)}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "lit_vlm", *words]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        logs = [file.read_text() for file in folder.glob("**/logs/*.out")]
        assert done.returncode == 0, "\n".join([done.stdout[-2000:], done.stderr[-2000:], *logs])
        return done

    return run


def told(lit_vlm: Callable[..., subprocess.CompletedProcess[str]], *runs: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(lit_vlm("status", "--json", *runs).stdout)
    return found


def test_a_job_on_two_nodes_is_followed_to_its_end(lit_vlm, slurm: Slurm, tmp_path: Path) -> None:
    done = lit_vlm("submit", *STAGE, "--strategy", "ddp", "--nodes", "2", "--wait", "--trainer.max_steps", "3")
    (one,) = told(lit_vlm)
    assert f"job {one['job']} completed, finished, 1_align 3 of 3" in done.stdout
    assert (one["state"], one["step"], one["steps"], one["checkpoint_step"]) == ("finished", 3, 3, 3)
    run = tmp_path / "my work" / one["run"]
    log = (run / "logs" / f"{one['job']}.out").read_text()
    assert "MEMBER: 2/2" in log
    assert "ended with exit code 0" in log


def test_a_job_that_is_asked_to_leave_goes_on(lit_vlm, slurm: Slurm, tmp_path: Path) -> None:
    lit_vlm("submit", *STAGE, "--strategy", "ddp", "--nodes", "2", "--out", "a run", "--trainer.max_steps", "300")
    folder = tmp_path / "my work" / "a run"
    submitted = Submitted.load(folder)
    assert submitted is not None
    job = int(submitted.job)

    def trains() -> bool:
        progress = Progress.read(folder / "1_align")
        return progress is not None and progress.state == "training"

    until(trains, 400, "the run does not train", lambda: slurm.report(job))
    slurm.run("scancel", "--signal=USR1", str(job))
    slurm.until_requeued(job, seconds=240)
    assert slurm.wait(job, seconds=500) == "COMPLETED", slurm.report(job)
    (one,) = told(lit_vlm, "a run")
    assert (one["state"], one["step"], one["requeues"], one["job"]) == ("finished", 300, 1, str(job))
    progress = Progress.read(folder / "1_align")
    assert progress is not None
    assert 0 < progress.first_step < 300


def test_an_array_trains_a_run_for_each_seed(lit_vlm, slurm: Slurm, tmp_path: Path) -> None:
    lit_vlm("submit", *STAGE, "--strategy", "single", "--array-of", "3,5", "--out", "seeds", "--wait",
            "--trainer.max_steps", "2")  # fmt: skip
    found = {one["run"]: (one["state"], one["step"]) for one in told(lit_vlm, "seeds")}
    assert found == {"seeds/seed-3": ("finished", 2), "seeds/seed-5": ("finished", 2)}
    for seed in (3, 5):
        config = tmp_path / "my work" / "seeds" / f"seed-{seed}" / "1_align" / "config.yaml"
        assert f"seed_everything: {seed}\n" in config.read_text()
