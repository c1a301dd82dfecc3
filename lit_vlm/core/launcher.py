"""Who started this process, and which of its processes it is: srun, torchrun or the like, or nobody."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Literal, NamedTuple

PORTS = range(15000, 25000)
"""Ports where the processes of a step meet: below those that Linux gives to outgoing connections."""
ASKING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that ask a run to leave."""
PREEMPTED = 75
"""Exit code of a run that saved its state because it was asked to leave: the same command goes on. EX_TEMPFAIL."""
LOST = 69
"""Exit code of a process that ended because another one of its run is gone or has failed. EX_UNAVAILABLE."""
HUNG = 70
"""Exit code of a run in which nothing happened for too long; to start it again may end alike. EX_SOFTWARE."""


class Launch(NamedTuple):
    """A process among those that were started together.

    Attributes:
        by: `torchrun`, or another program that sets its variables; `srun`; `batch`, for a job script of SLURM that
            starts the process itself; `alone` otherwise.
        rank: number of the process, from 0.
        world_size: number of processes.
        local_rank: number of the process on its machine, from 0.
        node: name of the machine where SLURM gives it one, else the number of the machine.
        id: of the launch, alike in all its processes and in later attempts, and unlike other launches; None where the
            launcher gives none.
        attempt: how often the launch was started again before, by a requeue or a restart.
        nodes: number of machines that the processes are on.
        per_node: number of processes on each machine; 0 where machines have different numbers.
        node_rank: number of the machine, from 0.
    """

    by: Literal["torchrun", "srun", "batch", "alone"]
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    node: str = "0"
    id: str | None = None
    attempt: int = 0
    nodes: int = 1
    per_node: int = 1
    node_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes what a run has one of."""
        return self.rank == 0


def launch(variables: Mapping[str, str] | None = None) -> Launch:
    """The launch that this process belongs to, from its environment variables.

    torchrun comes first: under `srun torchrun` SLURM has numbered the agents, of which there is one per machine.

    Args:
        variables: the environment; default: that of this process.
    """
    given: Mapping[str, str] = os.environ if variables is None else variables
    job, attempt = given.get("SLURM_JOB_ID"), int(given.get("SLURM_RESTART_COUNT", "0"))
    node = given.get("SLURMD_NODENAME")
    if "RANK" in given and "WORLD_SIZE" in given:
        name = given.get("TORCHELASTIC_RUN_ID")
        rank, world_size = int(given["RANK"]), int(given["WORLD_SIZE"])
        local_rank = int(given.get("LOCAL_RANK", "0"))
        # A program that does not number the processes of a machine starts one on each.
        local_size = int(given.get("LOCAL_WORLD_SIZE") or (world_size if "LOCAL_RANK" in given else 1))
        nodes = int(given.get("GROUP_WORLD_SIZE") or -(-world_size // local_size))
        group = given.get("GROUP_RANK") or str(rank // local_size)
        return Launch(
            "torchrun",
            rank,
            world_size,
            local_rank,
            node or group,
            None if name in (None, "", "none") else name,  # what torchrun says without --rdzv-id
            attempt + int(given.get("TORCHELASTIC_RESTART_COUNT", "0")),
            nodes,
            local_size if nodes * local_size == world_size else 0,
            int(group),
        )
    if job and "SLURM_PROCID" in given and "SLURM_STEP_ID" in given:
        world_size = int(given.get("SLURM_STEP_NUM_TASKS") or given.get("SLURM_NTASKS", "1"))
        nodes = int(given.get("SLURM_STEP_NUM_NODES") or given.get("SLURM_NNODES", "1"))
        even = "," not in given.get("SLURM_STEP_TASKS_PER_NODE", "") and world_size % nodes == 0  # as in 2(x3),1
        return Launch(
            "srun",
            int(given["SLURM_PROCID"]),
            world_size,
            int(given.get("SLURM_LOCALID", "0")),
            node or given.get("SLURM_NODEID", "0"),
            f"{job}.{given['SLURM_STEP_ID']}",
            attempt,
            nodes,
            world_size // nodes if even else 0,
            int(given.get("SLURM_NODEID", "0")),
        )
    if job and "SLURM_PROCID" in given:  # an interactive allocation does not number its shell
        return Launch("batch", node=node or "0", id=job, attempt=attempt)
    return Launch("alone")


def rendezvous(variables: Mapping[str, str] | None = None) -> tuple[str, int]:
    """Address and port where the processes of a step of SLURM meet, alike in all of them.

    `MASTER_ADDR` and `MASTER_PORT` are taken where they are set. The port depends on the job, the step and the attempt:
    steps that share their first machine do not meet each other, nor what an earlier attempt may have left there.

    Args:
        variables: the environment; default: that of this process.

    Raises:
        ValueError: outside of a step of SLURM, where neither variable is set.
    """
    given: Mapping[str, str] = os.environ if variables is None else variables
    if "MASTER_ADDR" in given and "MASTER_PORT" in given:
        return given["MASTER_ADDR"], int(given["MASTER_PORT"])
    started = launch(given)
    if started.by != "srun" or started.id is None:
        raise ValueError("MASTER_ADDR and MASTER_PORT are not set, and no step of SLURM tells where processes meet")
    job, step = (int(part) for part in started.id.split("."))
    port = PORTS[(job * 101 + step * 13 + started.attempt) % len(PORTS)]
    # Of gpu[07-09,12],cpu3 the first is gpu07.
    names = given.get("SLURM_STEP_NODELIST") or given.get("SLURM_NODELIST", "127.0.0.1")
    first = re.sub(r"\[([^],-]+)[^]]*\]", r"\1", names).split(",")[0]
    return given.get("MASTER_ADDR", first), int(given.get("MASTER_PORT", port))


def tasks_of_job(variables: Mapping[str, str] | None = None) -> tuple[int, int]:
    """How many tasks, and machines, the job of SLURM has that this process belongs to; (1, 1) outside of a job."""
    given: Mapping[str, str] = os.environ if variables is None else variables
    nodes = int(given.get("SLURM_JOB_NUM_NODES", "1")) if "SLURM_JOB_ID" in given else 1
    return max(nodes, int(given.get("SLURM_NTASKS", "1")) if "SLURM_JOB_ID" in given else 1), nodes


def end_of_job(variables: Mapping[str, str] | None = None) -> float | None:
    """When SLURM ends the job of this process, in seconds since the epoch; None without a job, or where it is not told.

    Newer versions of SLURM tell it by a variable, others are asked.

    Args:
        variables: the environment; default: that of this process.
    """
    given: Mapping[str, str] = os.environ if variables is None else variables
    if "SLURM_JOB_ID" not in given:
        return None
    try:
        if end := given.get("SLURM_JOB_END_TIME"):
            return float(end)
        asked = ["squeue", "--noheader", "--jobs", given["SLURM_JOB_ID"], "--format", "%e"]
        said = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True, env=dict(given)).stdout
        return datetime.fromisoformat(said.strip().splitlines()[0]).timestamp()
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None  # no limit, or nobody who answers


def launch_name(variables: Mapping[str, str] | None = None) -> str:
    """A name of the launch for files: alike in all its processes and later attempts; the time, where there is one.

    Args:
        variables: the environment; default: that of this process.

    Raises:
        ValueError: where several machines have nothing in common to name it by.
    """
    given: Mapping[str, str] = os.environ if variables is None else variables
    mine = launch(given)
    if mine.id is not None:
        return mine.id
    started = time.time()
    if mine.world_size > 1:
        if mine.nodes > 1:
            raise ValueError(
                "this launch of several machines has no name that all its processes know: give torchrun a --rdzv-id, "
                "or name the folder of the run (lit-vlm run: --out, lit-vlm fit: --trainer.default_root_dir)"
            )
        started = _start_of(os.getppid())  # the agent, which is the parent of all
    return time.strftime("%Y%m%d-%H%M%S", time.localtime(started))


def _start_of(process: int) -> float:
    """When a process started, in seconds since the epoch.

    Raises:
        ValueError: where the machine does not tell.
    """
    try:
        ticks = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19])
        boot = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime"))
    except (OSError, StopIteration, IndexError) as error:
        raise ValueError(
            "this machine does not tell when torchrun started, by which the folder of the run is named: give torchrun "
            "a --rdzv-id"
        ) from error
    return int(boot.split()[1]) + ticks / os.sysconf("SC_CLK_TCK")
