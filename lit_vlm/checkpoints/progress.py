"""How far the training of a stage is: a small file that training writes and other programs read. Loads no PyTorch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from lit_vlm.core.written import write_whole

PROGRESS_FILE = "progress.json"
"""Name of the file, in the folder of the stage."""
State = Literal["training", "validating", "saving", "finished", "preempted", "failed"]
AT_WORK: tuple[State, ...] = ("training", "validating", "saving")
"""States in which the file is written anew every few seconds."""


@dataclass(frozen=True)
class Progress:
    """How far the training of a stage was at one moment.

    Attributes:
        step: optimizer steps that are done.
        steps: optimizer steps of the stage; None where their number is not known in advance.
        first_step: `step` when this process began or went on.
        tokens_per_s: tokens without padding per second, of all devices; None before it was measured.
        time: when this was written, ISO 8601 in UTC.
        started: when this process began to train, ISO 8601 in UTC.
        host: machine of the first process, which writes this.
        pid: its number there.
        slurm_job: the job of SLURM that it belongs to.
        state: what it was doing.
        error: why training failed, in one line.
        seconds_before: time that earlier processes of the stage trained for.
        devices: number of processes, each with a device.
        trained: parameters that train; 0 before that is known.
        slots: slot → parameters that train, and that are frozen; empty before that is known.
        peak_bytes: most memory that the device of the first process held, or without one that process; None before it
            was measured.
    """

    step: int
    steps: int | None
    first_step: int
    tokens_per_s: float | None
    time: str
    started: str
    host: str
    pid: int
    slurm_job: str | None
    state: State
    error: str | None = None
    seconds_before: float = 0.0
    devices: int = 0
    trained: int = 0
    slots: dict[str, tuple[int, int]] = field(default_factory=dict)
    peak_bytes: int | None = None

    @property
    def seconds(self) -> float:
        """Time that the stage has trained for, in all its processes."""
        return self.seconds_before + seconds_between(self.started, self.time)

    def write(self, folder: Path) -> None:
        """Write the file into the folder of a stage, whole or not at all.

        Raises:
            OSError: where that is not possible.
        """
        write_whole(folder / PROGRESS_FILE, json.dumps(asdict(self)) + "\n")

    @staticmethod
    def read(folder: Path) -> Progress | None:
        """What is in the folder of a stage; None where there is nothing that can be read."""
        try:
            content = json.loads((folder / PROGRESS_FILE).read_text(encoding="utf-8"))
            known = {field.name for field in fields(Progress)}
            return Progress(**{name: value for name, value in content.items() if name in known})
        except (OSError, ValueError, AttributeError, TypeError):
            return None


def now() -> str:
    """This moment as ISO 8601 in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def seconds_between(earlier: str, later: str) -> float:
    """Seconds from one moment to another, both in ISO 8601."""
    return (datetime.fromisoformat(later) - datetime.fromisoformat(earlier)).total_seconds()
