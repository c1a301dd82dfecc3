"""Who started this process, and which of its processes it is: srun, torchrun or the like, or nobody."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Literal, NamedTuple

PREEMPTED = 75
"""Exit code of a run that saved its state because it was asked to leave: the same command goes on. EX_TEMPFAIL."""


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
        local_world_size: number of the processes on its machine.
    """

    by: Literal["torchrun", "srun", "batch", "alone"]
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    node: str = "0"
    id: str | None = None
    attempt: int = 0
    local_world_size: int = 1

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
        return Launch(
            "torchrun",
            int(given["RANK"]),
            int(given["WORLD_SIZE"]),
            int(given.get("LOCAL_RANK", "0")),
            node or given.get("GROUP_RANK", "0"),
            None if name in (None, "", "none") else name,  # what torchrun says without --rdzv-id
            attempt + int(given.get("TORCHELASTIC_RESTART_COUNT", "0")),
            int(given.get("LOCAL_WORLD_SIZE", "1")),
        )
    if job and "SLURM_PROCID" in given and "SLURM_STEP_ID" in given:
        return Launch(
            "srun",
            int(given["SLURM_PROCID"]),
            int(given.get("SLURM_STEP_NUM_TASKS") or given.get("SLURM_NTASKS", "1")),
            int(given.get("SLURM_LOCALID", "0")),
            node or given.get("SLURM_NODEID", "0"),
            f"{job}.{given['SLURM_STEP_ID']}",
            attempt,
            _tasks_here(given.get("SLURM_STEP_TASKS_PER_NODE", "1"), int(given.get("SLURM_NODEID", "0"))),
        )
    if job and "SLURM_PROCID" in given:  # an interactive allocation does not number its shell
        return Launch("batch", node=node or "0", id=job, attempt=attempt)
    return Launch("alone")


def _tasks_here(tasks: str, node: int) -> int:
    """Number of tasks on a node of a step, from SLURM's list of them: `2(x3),1` are 2 on three nodes and 1 on a fourth.

    Args:
        tasks: the list.
        node: number of the node, from 0.
    """
    for words in tasks.split(","):
        count, _, times = words.partition("(x")
        node -= int(times.rstrip(")") or 1)
        if node < 0:
            return int(count)
    return 1
