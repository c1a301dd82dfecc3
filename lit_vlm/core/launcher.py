"""Who started this process, and which of its processes it is: srun, torchrun or the like, or nobody."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Literal, NamedTuple

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
    """

    by: Literal["torchrun", "srun", "batch", "alone"]
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    node: str = "0"
    id: str | None = None
    attempt: int = 0

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
        )
    if job and "SLURM_PROCID" in given:  # an interactive allocation does not number its shell
        return Launch("batch", node=node or "0", id=job, attempt=attempt)
    return Launch("alone")
