"""`lit-vlm status`: how runs are, whether they train here, wait in a queue or have ended."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lit_vlm.cluster.queue import InQueue, Submitted, has_slurm, states
from lit_vlm.cluster.status import Run, Told, folders_of_runs, length, tell
from lit_vlm.commands.runs import STATE_FILE, RunState

RUNS = Path("runs")
COLOURS = {"failed": "red", "lost": "red", "finished": "green", "preempted": "yellow", "waiting": "yellow"}


def main(argv: Sequence[str]) -> None:
    """Print a table of runs, or JSON.

    Raises:
        ValueError: for a folder that is missing or holds no run.
    """
    arguments = _parser().parse_args(argv)
    if not arguments.run and not RUNS.is_dir():
        raise ValueError(f"there is no folder {RUNS} here: name the folders of runs, or go to where they were started")
    given = arguments.run or [RUNS]
    folders = list(dict.fromkeys(run for folder in given for run in folders_of_runs(folder, STATE_FILE)))
    told = tell_all([read_run(folder) for folder in folders])
    if arguments.json:
        sys.stdout.write(json.dumps([asdict(one) for one in told], indent=1) + "\n")
    else:
        _show(told, Console())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lit-vlm status",
        description="Tell of each run: stage, step, speed, time left, place in the queue of SLURM, newest checkpoint, "
        "requeues, and what went wrong last.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "run", type=Path, nargs="*", metavar="RUN", help=f"folders of runs, or folders with runs (default: {RUNS}/)"
    )
    parser.add_argument("--json", action="store_true", help="print a list of objects as JSON")
    return parser


def read_run(folder: Path) -> Run:
    """What the folder of a run says of it."""
    submitted = Submitted.load(folder)
    if (folder / STATE_FILE).is_file():
        state = RunState.load(folder)
        return Run(folder, state.stages, state.done, submitted)
    return Run(folder, submitted.stages if submitted else ["."], (), submitted)


def tell_all(runs: Sequence[Run]) -> list[Told]:
    """What is known of runs, asking SLURM once."""
    jobs = [run.job for run in runs if run.job is not None and not run.has_finished]
    queued: dict[str, InQueue] = (states(jobs) or {}) if jobs and has_slurm() else {}
    return [tell(run, queued.get(run.job or "")) for run in runs]


def _show(told: Sequence[Told], console: Console) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("run", "stage", "state"):
        table.add_column(title, overflow="fold")
    for title in ("step", "tokens/s", "left"):
        table.add_column(title, justify="right", no_wrap=True)
    for title in ("job", "checkpoint", "requeues"):
        table.add_column(title, overflow="fold")
    for one in told:
        colour = COLOURS.get(one.state)
        table.add_row(
            escape(one.run),
            one.stage or "",
            f"[{colour}]{one.state}[/]" if colour else one.state,
            steps(one),
            f"{one.tokens_per_s:,.0f}" if one.tokens_per_s is not None else "",
            length(one.eta) if one.eta is not None else "",
            " ".join(filter(None, (one.job, one.queue))),
            _checkpoint(one),
            str(one.requeues or ""),
        )
    console.print(table)
    for one in told:
        if one.error:
            console.print(f"{escape(one.run)}: [red]{escape(one.error)}[/]", soft_wrap=True, highlight=False)


def steps(told: Told) -> str:
    """Steps that are done, of how many."""
    if told.step is None:
        return ""
    return f"{told.step:,} of {told.steps:,}" if told.steps is not None else f"{told.step:,}"


def _checkpoint(told: Told) -> str:
    """Step and age of the newest checkpoint."""
    if told.checkpoint_step is None or told.checkpoint_age is None:
        return "none"
    return f"{told.checkpoint_step:,}, {length(told.checkpoint_age)} ago"
