"""A process of a job on several nodes is killed: the job ends within a minute, and each node says which one it was."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lit_vlm.checkpoints.folder import checkpoints_in
from lit_vlm.commands.recipe import find_recipe
from lit_vlm.core.launcher import LOST
from tests.cluster.slurm import Slurm, until

MINUTE = 60.0


def training(slurm: Slurm, folder: Path, nodes: str, strategy: str) -> int:
    """A job that trains one process per node for long, once it has saved; srun leaves the ends of its tasks alone."""
    configs = [f"--config {path.resolve()}" for path in find_recipe("llava15").configs("2_sft", "tiny", strategy)]
    count = nodes.count(",") + 1
    fit = (
        f"python -m lit_vlm fit {' '.join(configs)} --trainer.default_root_dir out --trainer.accelerator cpu "
        f"--trainer.devices 1 --trainer.num_nodes {count} --trainer.precision 32-true --trainer.max_steps 100000 "
        "--trainer.max_epochs -1 --data.batch_size 1 --checkpoint.every_n_steps 5 --trainer.enable_progress_bar false"
    )
    script = f"srun --kill-on-bad-exit=0 --label {fit}\necho ended with $?"
    job = slurm.submit(folder, script, f"-N{count}", "-w", nodes, "--ntasks-per-node=1")
    until(lambda: bool(checkpoints_in(folder / "out")), 240, "nothing is saved", lambda: slurm.report(job))
    return job


@pytest.mark.parametrize(
    ("strategy", "nodes", "rank"),
    [
        pytest.param("ddp", "n1,n2,n3", 1, id="ddp"),
        pytest.param("ddp", "n1,n2", 0, id="ddp-first"),
        pytest.param("fsdp", "n1,n2", 1, id="fsdp"),
    ],
)
def test_a_killed_process_ends_its_job(
    slurm: Slurm,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
    strategy: str,
    nodes: str,
    rank: int,
) -> None:
    names = nodes.split(",")
    job = training(slurm, tmp_path, nodes, strategy)
    slurm.signal_rank(job, rank, signal.SIGKILL, "-m lit_vlm fit")
    killed = time.monotonic()
    slurm.wait(job, seconds=MINUTE)
    record_property("seconds from the death of a process to the end of its job", round(time.monotonic() - killed, 1))
    assert time.monotonic() - killed < MINUTE
    printed = slurm.output(job)
    lost = f"watchdog: rank {rank} on node {names[rank]} is gone: its process ended; this run ends with code {LOST}"
    said = sorted(line for line in printed.splitlines() if "watchdog" in line)
    assert said == [f"{other}: {lost}" for other in range(len(names)) if other != rank], slurm.report(job)
    assert "ended with 137" in printed  # srun gives the highest code of its tasks, and 137 is the killed one's
    until(lambda: not slurm.processes(job), 10, "something of the job is left", lambda: str(slurm.processes(job)))
    assert checkpoints_in(tmp_path / "out")


def test_a_stopped_process_ends_its_job(slurm: Slurm, tmp_path: Path) -> None:
    job = training(slurm, tmp_path, "n3,n4", "ddp")
    (process, *_) = slurm.processes(job, 1, "-m lit_vlm fit")
    process.suspend()
    stopped = time.monotonic()
    slurm.until_printed(job, "watchdog: rank 1 on node n4 is gone: no sign of life for 30 s", seconds=MINUTE)
    assert time.monotonic() - stopped < MINUTE
    process.kill()  # as srun's -K would, and the node's end
    slurm.wait(job, seconds=MINUTE)
