"""`lit-vlm bench`: speed and memory of the stages of a recipe on this machine, with random weights."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from lit_vlm.commands.asked import FLAGS_OF_RUN, ask, recipe_parser
from lit_vlm.commands.plan import DEFAULT_CARD, jobs, simulator
from lit_vlm.commands.recipe import find_recipe, shipped_recipes
from lit_vlm.core.devices import CARDS, known_card
from lit_vlm.core.launcher import launch
from lit_vlm.core.plugins import named_plugins, use_plugins
from lit_vlm.planning.bench.job import Benched, BenchJob, Reference
from lit_vlm.planning.bench.report import Row, report, show
from lit_vlm.planning.job import Job
from lit_vlm.planning.plan import Setup, StagePlan, plan_stage
from lit_vlm.planning.roofline import Assumptions
from lit_vlm.planning.simulation import Simulator

WORKER = (sys.executable, "-P", "-m", "lit_vlm.commands.benched")
HF = "hf"


def main(argv: Sequence[str]) -> None:
    """Measure the stages of a recipe, and print tables.

    Raises:
        ValueError: for a wrong argument.
        SystemExit: for a wrong flag, or where a stage does not run.
    """
    asked = ask(_parser(), argv)
    if asked.recipe is None:
        raise ValueError(f"name a recipe, as the first argument: {', '.join(shipped_recipes())}")
    arguments = asked.options
    _check(arguments)
    recipe = find_recipe(asked.recipe)
    use_plugins([*recipe.plugins, *named_plugins()])
    # What is planned with is set when it is known what the stage ran on.
    setup = Setup(CARDS[DEFAULT_CARD], 1, 1, Assumptions())
    console = Console()
    rows: list[Row] = []
    with ExitStack() as stack:
        planner = _Planner(stack)
        for stage, job in jobs(recipe, arguments.scale, arguments.strategy, asked.stages, asked.flags, setup):
            trace = str(arguments.profile.resolve() / f"{stage}.json") if arguments.profile else None
            measured = BenchJob(stage, job.words, job.statistics, arguments.steps, trace)
            row = _measure(measured, job, arguments.against == HF, planner)
            if row is None:  # another process than the first of a launcher
                continue
            rows.append(row)
            show(row, console)
            if trace is not None:
                console.print(f"trace of a step, for ui.perfetto.dev: {trace}", soft_wrap=True, highlight=False)
            if arguments.json is not None:  # after each stage, as a later one may not run
                given = vars(arguments) | {"recipe": asked.recipe, "flags": asked.flags}
                _write(arguments.json, report(rows, given))


def _write(file: Path, content: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = recipe_parser(
        "bench",
        "RECIPE [options] [flags for all stages or one]",
        "Measure each stage of a recipe on the devices of this machine: speed, memory, where the time goes, and what "
        "the plan had said. Weights are random; data are the stage's own where they are there, else drawn with its "
        "published statistics.",
        FLAGS_OF_RUN,
    )
    parser.add_argument("--steps", type=int, default=30, help="measured steps, after 5 to warm up (default: 30)")
    parser.add_argument("--json", type=Path, help="a file for all figures; lit-vlm plan --measured reads it")
    parser.add_argument(
        "--against", choices=[HF], help="hf: also train transformers' Llava model on the same samples, unpacked"
    )
    parser.add_argument("--profile", type=Path, help="a folder for a trace of a step of each stage")
    return parser


def _check(arguments: argparse.Namespace) -> None:
    if arguments.steps < 1:
        raise ValueError(f"--steps is at least 1, not {arguments.steps}")
    for flag, path in (("--json", arguments.json), ("--profile", arguments.profile)):
        if path is not None and path.is_dir() != (flag == "--profile") and path.exists():
            raise ValueError(f"{flag} {path} is a {'folder' if path.is_dir() else 'file'}; name another")


def _measure(asked: BenchJob, job: Job, against: bool, planner: _Planner) -> Row | None:
    """A stage's row; None on another process than the first of a launcher."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result"
        reference = None
        if against:
            _in_process(replace(asked, against=True), out)
            reference = Reference.read(out)
            out.unlink()
        _in_process(asked, out)
        if not (launch().is_first and out.is_file()):
            return None
        measured = Benched.read(out)
    return Row(measured, planner.plan(asked.stage, job, measured), reference)


def _in_process(asked: BenchJob, out: Path) -> None:
    """Measure in a process of its own, whose memory is its stage's alone.

    Raises:
        ValueError: where the process is killed.
        SystemExit: where it ends with an error, which it has reported.
    """
    file = out.with_suffix(".job")
    asked.write(file)
    if launch().is_first:
        sys.stderr.write(f"{asked.stage}: loading libraries ...\n")
    # The profiler's notices of devices that a machine does not have.
    process = subprocess.Popen([*WORKER, str(file), str(out)], env=os.environ | {"KINETO_LOG_LEVEL": "99"})
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        code = process.wait() or 130
    if code < 0:
        raise ValueError(f"{asked.stage}: the process that measures it was killed by signal {-code}")
    if code:
        raise SystemExit(code)


class _Planner:
    """Plans what was measured, on simulated devices of the same kind; starts their process when it is first asked.

    Args:
        stack: ends the process.
    """

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._process: Simulator | None = None
        self._setup: Setup | None = None

    def plan(self, stage: str, job: Job, measured: Benched) -> StagePlan | str:
        """The plan of a stage, or why there is none."""
        if not measured.cuda:
            return "the plan is one of GPUs"
        card = known_card(measured.device, measured.memory["total"])
        if card is None:
            return f"{measured.device} is no GPU that is known"
        setup = Setup(card, measured.processes, measured.per_node, Assumptions())
        words = (*job.words, "--trainer.precision", measured.precision)
        same = replace(job, words=words, world_size=measured.processes, per_node=measured.per_node)
        try:
            sys.stderr.write(f"{stage}: planning ...\n")
            if self._process is None or self._setup != setup:
                self._process, self._setup = self._stack.enter_context(simulator(setup)), setup
            return plan_stage(stage, same, setup, self._process.run)
        except ValueError as error:  # a missing compiler among them; what was measured counts all the same
            return str(error)
