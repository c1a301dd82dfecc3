"""The cluster itself: what the other tests rely on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.cluster.guard import HOSTS
from tests.cluster.slurm import Slurm, until
from tests.forkserver import ROOT


def test_a_job_is_taken_away_and_comes_back(slurm: Slurm, tmp_path: Path) -> None:
    script = "srun -K1 -l bash -c 'echo \"start ${SLURM_RESTART_COUNT:-0} $SLURM_PROCID $SLURMD_NODENAME\"; sleep 60'"
    job = slurm.submit(tmp_path, script, "-N2", "--ntasks-per-node=1")
    slurm.until_printed(job, "start 0", times=2, seconds=30)
    slurm.signal_rank(job, 1, 0, "sleep")
    slurm.requeue(job)
    slurm.until_printed(job, "start 1", times=2, seconds=30)
    slurm.signal_rank(job, 1, signal.SIGKILL, "sleep")
    assert slurm.wait(job, seconds=30) == "FAILED"
    until(lambda: not slurm.processes(job), 10, "something of the job is left", lambda: str(slurm.processes(job)))


def test_a_job_of_higher_priority_takes_the_nodes(slurm: Slurm, tmp_path: Path) -> None:
    low = slurm.submit(tmp_path, 'trap "echo asked; exit 1" TERM; echo begun; sleep 60 & wait', "-N4", "--exclusive")
    slurm.until_printed(low, "begun", seconds=30)
    high = slurm.submit(tmp_path, "echo high", "-N4", "--exclusive", "--partition=high")
    assert slurm.wait(high, seconds=60) == "COMPLETED"
    assert "asked" in slurm.output(low)
    slurm.until_printed(low, "begun", times=2, seconds=30)
    slurm.cancel(low)
    assert slurm.state(low) == "CANCELLED"


def test_a_job_on_a_node_that_dies_is_queued_again(slurm: Slurm, tmp_path: Path) -> None:
    job = slurm.submit(tmp_path, "srun bash -c 'echo on $SLURMD_NODENAME; sleep 60'", "-N2", "-w", "n3,n4")
    slurm.until_printed(job, "on n4", seconds=30)
    slurm.kill_node("n4")
    until(lambda: slurm.node_state("n4") == "DOWN", 60, "n4 is not given up", lambda: slurm.report(job))
    slurm.start_node("n4")
    slurm.until_printed(job, "on n4", times=2, seconds=60)
    slurm.cancel(job)


def test_nothing_is_left_of_a_cluster_whose_tests_are_killed(slurm: Slurm) -> None:
    code = (
        "from tests.cluster.slurm import Slurm; import time; s = Slurm(nodes=1);"
        "j = s.submit(s.folder, 'srun sleep 60'); s.wait(j, 'RUNNING'); print(s.folder, flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ) as killed:
        assert killed.stdout is not None
        folder = Path(killed.stdout.readline().strip())
        step = "slurmstepd: [1.0]"
        until(lambda: step in commands(folder), 30, "the step does not start", lambda: str(commands(folder)))
        assert str(folder) in HOSTS.read_text()
        killed.kill()
    until(lambda: not folder.exists(), 30, f"{folder} is left", lambda: str(commands(folder)))
    assert not commands(folder)
    assert str(folder) not in HOSTS.read_text()
    assert "slurmctld -D" in commands(slurm.folder)  # the other cluster goes on


def commands(folder: Path) -> list[str]:
    """Command lines of what belongs to a cluster, found by the files of /proc alone."""
    conf = f"SLURM_CONF={folder}/slurm.conf".encode()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if conf in (process / "environ").read_bytes().split(b"\0"):
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").strip().decode())
        except OSError:  # it has ended
            continue
    return found
