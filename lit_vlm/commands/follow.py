"""Following a job of SLURM until it ends."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from lit_vlm.cluster.queue import InQueue, states
from lit_vlm.cluster.status import Told, exit_code, length, tell
from lit_vlm.commands.status import read_run, steps

PERIOD = 5.0
"""Seconds between two questions to SLURM."""
FORGOTTEN = 3
"""Answers of SLURM without a job after which it is taken for ended."""
INTERRUPTED = 130


def follow(folders: Sequence[Path], console: Console) -> int:
    """Show how the job of runs is until it ends.

    Args:
        folders: folders of the runs: one, or those of an array.
        console: where to.

    Returns:
        the exit code of the job, of an array the largest; 130 after Ctrl-C, which does not end the job.
    """
    missing, shown = 0, ""
    try:
        with console.status("") as line:
            while True:
                runs = [read_run(folder) for folder in folders]
                jobs = [run.job or "" for run in runs]
                queued = states(jobs)
                told = [tell(run, (queued or {}).get(job)) for run, job in zip(runs, jobs, strict=True)]
                text = _line(told)
                line.update(text)
                if text != shown and not console.is_terminal:
                    console.print(text)
                shown = text
                missing = missing + 1 if queued is not None and len(queued) < len(jobs) else 0
                known = queued is not None and (len(queued) == len(jobs) or missing >= FORGOTTEN)
                if queued is not None and known and not any(one.is_live for one in queued.values()):
                    break
                time.sleep(PERIOD)
    except KeyboardInterrupt:
        console.print("no longer followed; the job goes on: lit-vlm status tells of it")
        return INTERRUPTED
    for one in told:
        console.print(f"{one.run}: {one.state}{f': {one.error}' if one.error else ''}")
    return max(_code(folder, queued.get(job)) for folder, job in zip(folders, jobs, strict=True))


def _line(told: Sequence[Told]) -> str:
    """One line for all runs."""
    if len(told) > 1:
        counts = {one.queue or one.state: sum(o.queue == one.queue for o in told) for one in told}
        return ", ".join(f"{count} {state}" for state, count in counts.items())
    one = told[0]
    words = [f"job {one.job} {one.queue or ''}".strip(), one.state if one.queue != one.state else ""]
    if one.state not in ("waiting", "starting"):
        words += [f"{one.stage} {steps(one)}".strip()]
        words += [f"{one.tokens_per_s:,.0f} tokens/s" if one.tokens_per_s is not None else ""]
        words += [f"{length(one.eta)} left" if one.eta is not None else ""]
    return ", ".join(filter(None, words))


def _code(folder: Path, queued: InQueue | None) -> int:
    """The exit code of a job that has ended."""
    if queued is not None and queued.state == "COMPLETED":
        return 0
    code = exit_code(folder)
    return 1 if code is None else code
