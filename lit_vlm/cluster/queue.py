"""What SLURM is asked: to take a job, and how its jobs are."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lit_vlm.core.written import write_whole

JOB_FILE = "job.json"
"""Name of the file in the folder of a run that says which job it was submitted as."""
ATTEMPTS = "attempts.tsv"
"""Name of the file in which a job notes when each attempt began and how it ended: time, job, `start` or the exit
code, checkpoints, and at the end whether it went `on` or `nowhere`."""
START = "start"
PATIENCE = 10.0
"""Seconds until a question to SLURM is given up."""
WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD", "SUSPENDED")
RUNNING = ("RUNNING", "COMPLETING", "STAGE_OUT", "SIGNALING", "RESIZING", "STOPPED")


@dataclass(frozen=True)
class Submitted:
    """The job that a run was submitted as.

    Attributes:
        job: its number; of an array `NUMBER_SEED` for each run, and `NUMBER` for all.
        stages: stages of the run.
        seeds: seeds of an array, in the folder above those of its runs; else empty.
    """

    job: str
    stages: tuple[str, ...]
    seeds: tuple[int, ...] = ()

    def save(self, folder: Path) -> None:
        """Write the file, whole or not at all."""
        write_whole(folder / JOB_FILE, json.dumps(asdict(self)) + "\n")

    @staticmethod
    def load(folder: Path) -> Submitted | None:
        """Read the file; None where there is none that can be read."""
        try:
            content = json.loads((folder / JOB_FILE).read_text(encoding="utf-8"))
            return Submitted(str(content["job"]), tuple(content["stages"]), tuple(content["seeds"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None


@dataclass(frozen=True)
class InQueue:
    """How a job is.

    Attributes:
        state: as SLURM calls it: PENDING, RUNNING, COMPLETED, ...
        reason: why it waits; empty where it does not.
    """

    state: str
    reason: str = ""

    @property
    def is_live(self) -> bool:
        """Whether the job waits or runs."""
        return self.state in (*WAITING, *RUNNING)

    def __str__(self) -> str:
        return f"{self.state.lower()} ({self.reason})" if self.reason else self.state.lower()


def has_slurm() -> bool:
    """Whether the commands of SLURM are on this machine."""
    return shutil.which("squeue") is not None


def need_sbatch() -> None:
    """Refuse to go on where there is nothing to submit a job with.

    Raises:
        ValueError: without sbatch.
    """
    if shutil.which("sbatch") is None:
        raise ValueError(
            "there is no sbatch on the PATH, so this is no machine of a SLURM cluster: give the command on one, or add "
            "--dry-run to see the script"
        )


def sbatch(file: Path) -> str:
    """Submit a script; returns the number of the job.

    Raises:
        ValueError: with what sbatch says, where it refuses.
    """
    done = subprocess.run(["sbatch", "--parsable", str(file)], capture_output=True, text=True)
    if done.returncode:
        said = " ".join(line.removeprefix("sbatch: ").removeprefix("error: ") for line in done.stderr.splitlines())
        raise ValueError(f"sbatch refuses {file}: {said}")
    return done.stdout.strip().splitlines()[-1].partition(";")[0]  # JOB;CLUSTER


def states(jobs: Sequence[str]) -> dict[str, InQueue] | None:
    """How jobs are; those that SLURM has forgotten are missing. None where it does not answer.

    Args:
        jobs: their numbers; `NUMBER_SEED` for one of an array, whose own number is known too.
    """
    if not jobs:
        return {}
    # All of the user's jobs, as one that SLURM has forgotten would make it refuse a list.
    lines = _lines(["squeue", "--me", "--noheader", "--array", "--states=all", "--format=%A|%F_%K|%T|%r"])
    if lines is None:
        return None
    found: dict[str, InQueue] = {}
    for number, of_array, state, reason in (line.split("|", 3) for line in lines if line.count("|") >= 3):
        told = InQueue(state, reason if state in WAITING and reason != "None" else "")
        found |= {number: told, of_array: told}
    missing = [job for job in jobs if job not in found]
    if missing and shutil.which("sacct"):
        asked = ["sacct", "-X", "-n", "-P", "-o", "JobID,State", "-j", ",".join(missing)]
        for line in _lines(asked) or ():
            number, _, state = line.partition("|")
            found[number] = InQueue(state.split()[0] if state else "UNKNOWN")  # CANCELLED by 1000
    return {job: found[job] for job in jobs if job in found}


def _lines(command: Sequence[str]) -> list[str] | None:
    """What a command prints; None where it fails or takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.splitlines() if done.returncode == 0 else None
