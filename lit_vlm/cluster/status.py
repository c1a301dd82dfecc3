"""How runs are: what training wrote, what SLURM says, what is saved. Loads no PyTorch, so that it answers at once."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lit_vlm.checkpoints.folder import checkpoints_in, is_done, step_of
from lit_vlm.checkpoints.progress import AT_WORK, PROGRESS_FILE, Progress, now, seconds_between
from lit_vlm.cluster.queue import ATTEMPTS, JOB_FILE, START, WAITING, InQueue, Submitted
from lit_vlm.core.launcher import PREEMPTED

SILENCE = {"training": 300.0, "validating": 300.0, "saving": 1800.0}
"""Seconds without a sign of life after which a run is taken for dead."""


@dataclass(frozen=True)
class Told:
    """What is known of a run.

    Attributes:
        run: its folder.
        stage: the stage that trains or comes next, or the last one.
        state: what the run does: that of `Progress`, or `waiting` (for a machine), `starting`, `lost` (no sign of
            life) or `unknown`.
        step: optimizer steps of the stage that are done.
        steps: all of them.
        tokens_per_s: of all devices.
        eta: seconds until the stage ends at the pace so far.
        job: number of the job.
        queue: how it is, in words; None without SLURM or where it has forgotten the job.
        checkpoint: the stage's newest complete checkpoint.
        checkpoint_step: steps that were done when it was saved.
        checkpoint_age: its age in seconds.
        requeues: how often the job was put into the queue again.
        error: what went wrong last.
    """

    run: str
    stage: str | None
    state: str
    step: int | None = None
    steps: int | None = None
    tokens_per_s: float | None = None
    eta: float | None = None
    job: str | None = None
    queue: str | None = None
    checkpoint: str | None = None
    checkpoint_step: int | None = None
    checkpoint_age: float | None = None
    requeues: int = 0
    error: str | None = None


@dataclass(frozen=True)
class Run:
    """A run to tell of.

    Attributes:
        folder: its folder.
        stages: its stages in order; `.` for a stage that is no part of a run of several.
        done: those that have ended, as far as the folder of the run knows.
        submitted: the job it was submitted as.
    """

    folder: Path
    stages: Sequence[str]
    done: Sequence[str] = ()
    submitted: Submitted | None = None

    @property
    def stage(self) -> str | None:
        """The first stage that has not ended, or the last."""
        left = [stage for stage in self.stages if not self.has_ended(stage)]
        return next(iter(left), self.stages[-1] if self.stages else None)

    def has_ended(self, stage: str) -> bool:
        """Whether a stage is done."""
        return stage in self.done or is_done(self.folder / stage)

    @property
    def has_finished(self) -> bool:
        """Whether all stages are done."""
        return bool(self.stages) and all(self.has_ended(stage) for stage in self.stages)

    @property
    def progress(self) -> Progress | None:
        """What training wrote of the present stage."""
        return Progress.read(self.folder / self.stage) if self.stage else None

    @property
    def job(self) -> str | None:
        """The job that ran last, or was submitted."""
        if self.submitted is not None:
            return self.submitted.job
        return self.progress.slurm_job if self.progress else None


def folders_of_runs(folder: Path, marker: str) -> list[Path]:
    """The runs in a folder, the folder itself among them, an array's after each other.

    Args:
        folder: where to look.
        marker: name of the file that the folder of a run has.

    Raises:
        ValueError: where there is no such folder, or no run in it.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}: name the folder of a run, or one with runs in it")
    found = [one for one in (folder, *_inside(folder)) if _is_run(one, marker)]
    if not found:
        raise ValueError(
            f"{folder} holds no run: it has no {marker}, {JOB_FILE} or {PROGRESS_FILE}, nor has a folder in it"
        )
    return found


def _inside(folder: Path) -> list[Path]:
    """Folders in a folder, and those of arrays and of ablations in them, but not the stages of a run."""
    below = sorted((one for one in folder.iterdir() if one.is_dir()), key=lambda one: one.stat().st_mtime)
    inside = [one for first in below for one in (first, *sorted(first.glob("seed-*"), key=_seed), *_of_ablation(first))]
    return [*_of_ablation(folder), *inside]


def _of_ablation(folder: Path) -> list[Path]:
    """The runs of an ablation, variant by variant."""
    return sorted(folder.glob("runs/*/seed-*"), key=lambda one: (one.parent.name, _seed(one)))


def _seed(folder: Path) -> tuple[int, str]:
    number = folder.name.removeprefix("seed-")
    return (int(number) if number.isdigit() else -1, number)


def _is_run(folder: Path, marker: str) -> bool:
    if (folder / marker).is_file():
        return True
    submitted = Submitted.load(folder)
    if submitted is not None:
        return not submitted.seeds
    of_a_run = (folder.parent / marker).is_file() or (folder.parent / JOB_FILE).is_file()
    return (folder / PROGRESS_FILE).is_file() and not of_a_run


def tell(run: Run, queued: InQueue | None) -> Told:
    """What is known of a run.

    Args:
        run: the run.
        queued: how its job is; None where that is not known.
    """
    progress, stage = run.progress, run.stage
    checkpoints = checkpoints_in(run.folder / stage) if stage else []
    newest = checkpoints[-1] if checkpoints else None
    code = exit_code(run.folder)
    state, error = _state(run, progress, queued)
    if error is None and code not in (None, 0, PREEMPTED) and state in ("failed", "lost", "unknown", "preempted"):
        error = f"the job ended with exit code {code}"
    at_work = state in AT_WORK and progress is not None
    return Told(
        run=str(run.folder),
        stage=stage if stage != "." else run.folder.name,
        state=state,
        step=progress.step if progress else None,
        steps=progress.steps if progress else None,
        tokens_per_s=progress.tokens_per_s if progress else None,
        eta=_seconds_left(progress) if at_work and progress else None,
        job=run.job,
        queue=str(queued) if queued else None,
        checkpoint=str(newest) if newest else None,
        checkpoint_step=step_of(newest) if newest else None,
        checkpoint_age=time.time() - newest.stat().st_mtime if newest else None,
        requeues=_requeues(run.folder),
        error=error,
    )


def _state(run: Run, progress: Progress | None, queued: InQueue | None) -> tuple[str, str | None]:
    """What a run does, and what went wrong."""
    if run.has_finished:
        return "finished", None
    if queued is not None and queued.state in WAITING:
        return "waiting", progress.error if progress else None
    attempts = _attempts(run.folder)
    begun = max((one.time for one in attempts if one.end is None), default="")
    running = queued is not None and queued.state == "RUNNING"
    if running and (progress is None or seconds_between(begun or progress.time, progress.time) < 0):
        return "starting", None
    if progress is None:
        return "unknown", None
    lost = _lost(progress) if progress.state in AT_WORK else None
    return ("lost", f"no sign of life since {progress.time}: {lost}") if lost else (progress.state, progress.error)


def _lost(progress: Progress) -> str | None:
    """Why a run is taken for dead; None for one that is not."""
    if progress.host == socket.gethostname() and not _lives(progress.pid):
        return f"process {progress.pid} is gone"
    silent = seconds_between(progress.time, now())
    return f"{progress.host} wrote nothing for {length(silent)}" if silent > SILENCE[progress.state] else None


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        return True
    return True


def _seconds_left(progress: Progress) -> float | None:
    """Seconds until the stage ends, at the pace since the process began."""
    done = progress.step - progress.first_step
    if progress.steps is None or done < 1:
        return None
    return (progress.steps - progress.step) * seconds_between(progress.started, progress.time) / done


class _Noted(NamedTuple):
    """What the script of a job noted when it began or ended; `end` is the exit code, None when it began."""

    time: str
    job: str
    end: int | None


def _attempts(folder: Path) -> list[_Noted]:
    """What the script of the job noted, oldest first."""
    try:
        lines = [line.split("\t") for line in (folder / ATTEMPTS).read_text(encoding="utf-8").splitlines()]
    except OSError:
        return []
    return [_Noted(one[0], one[1], None if one[2] == START else int(one[2])) for one in lines if len(one) > 3]


def _requeues(folder: Path) -> int:
    """How often the last job has begun again."""
    attempts = _attempts(folder)
    starts = [one for one in attempts if one.end is None and one.job == attempts[-1].job]
    return max(0, len(starts) - 1)


def exit_code(folder: Path) -> int | None:
    """The exit code of the last attempt at a run; None while it lasts, or where it could not note it."""
    attempts = _attempts(folder)
    return attempts[-1].end if attempts else None


def length(seconds: float) -> str:
    """A length of time in at most two units: `2 d 5 h`, `3 min`, `12 s`."""
    left = max(0, round(seconds))
    words = []
    for name, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, left = divmod(left, size)
        words.append(f"{count} {name}" if count else "")
    first = next((place for place, word in enumerate(words) if word), len(words) - 1)
    return " ".join(filter(None, words[first : first + 2])) or "0 s"
