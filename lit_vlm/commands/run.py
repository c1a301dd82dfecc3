"""`lit-vlm run`: runs the stages of a recipe, each from the weights of the stage before."""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rich.console import Console

from lit_vlm.checkpoints.folder import checkpoints_in
from lit_vlm.commands.asked import Asked, ask, flags_for, recipe_parser
from lit_vlm.commands.fit import REFUSED, Checked, check_flags, in_one_line
from lit_vlm.commands.foretell import foretell
from lit_vlm.commands.recipe import Recipe, find_recipe, shipped_recipes
from lit_vlm.commands.runs import STATE_FILE, RunState
from lit_vlm.core.launcher import launch
from lit_vlm.core.plugins import named_plugins, nearest, use_plugins

KEYS = ("model", "data", "trainer", "checkpoint", "watchdog")
"""What flags begin with that are of no single stage."""


def main(argv: Sequence[str]) -> None:
    """Parse the arguments, and run, check or resume a recipe.

    Raises:
        ValueError: for a wrong argument or recipe, a folder that holds a run, or nothing to resume.
        SystemExit: when a flag is wrong, a check fails, or a stage ends with an error.
    """
    asked = ask(_parser(), argv)
    arguments = asked.options
    console = Console()
    if arguments.resume:
        folder, state = _find_unfinished(asked)
        console.print(f"resuming {folder}: done {state.done or 'nothing yet'}")
    else:
        folder, state = _new_run(asked)
    recipe = find_recipe(state.recipe)
    use_plugins(state.plugins)
    if arguments.dry_run:
        from lit_vlm.commands.dry_run import check_recipe

        commands = {stage: _command(recipe, state, stage, folder) for stage in state.stages}
        if not check_recipe(commands, console):
            raise SystemExit(1)
        return
    left = [stage for stage in state.stages if stage not in state.done]
    checked = dict(zip(left, _check_flags([_command(recipe, state, stage, folder) for stage in left]), strict=False))
    _run(recipe, state, folder, console, checked)


def _check_flags(commands: Sequence[Sequence[str]]) -> list[Checked]:
    """Check the flags of all stages before anything is written.

    A separate process loads the libraries for it, so that this one stays small while stages run.

    Returns:
        what the flags say; of several processes of a launcher, the first alone looks.

    Raises:
        SystemExit: for a wrong flag, which the separate process has reported in one line.
    """
    if not launch().is_first:
        return []
    sys.stderr.write("checking flags ...\n")  # a few seconds, as classes must be loaded to know their arguments
    context = multiprocessing.get_context("fork")
    results, sends = context.Pipe(duplex=False)
    child = context.Process(target=_check_all, args=(commands, sends))
    child.start()
    sends.close()
    try:
        checked: list[Checked] = results.recv()
    except EOFError:  # a wrong flag
        checked = []
    child.join()
    if child.exitcode:
        raise SystemExit(child.exitcode)
    return checked


def _check_all(commands: Sequence[Sequence[str]], results: Connection) -> None:
    with in_one_line():
        checked = [check_flags(words[1:]) for words in commands]
        if checked and checked[0].start_from:  # later stages start from what earlier ones will leave
            from lit_vlm.checkpoints.weights import find_start

            find_start(checked[0].start_from)
        results.send(checked)


def _parser() -> argparse.ArgumentParser:
    parser = recipe_parser(
        "run",
        "RECIPE [options] [flags for all stages or one]\n--resume [--out DIR]",
        "Run the stages of a recipe in order, each from the weights that the one before left. RECIPE is a folder, or "
        f"one of: {', '.join(shipped_recipes())}.",
        "Any other flag goes to every stage as it is, e.g. --model.projector Resampler --trainer.max_steps 100, or to "
        "one stage, if it begins with its name: --1_align.trainer.max_steps 100.",
    )
    parser.add_argument("--out", type=Path, help="folder of the run (default: runs/RECIPE-SCALE-TIME)")
    parser.add_argument(
        "--dry-run", action="store_true", help="check every stage and say what is missing; train nothing"
    )
    parser.add_argument("--resume", action="store_true", help="go on with --out, or with the newest unfinished run")
    return parser


def _new_run(asked: Asked) -> tuple[Path, RunState]:
    arguments, flags = asked.options, asked.flags
    if asked.recipe is None:
        raise ValueError(f"name a recipe, as the first argument: {', '.join(shipped_recipes())}")
    recipe = find_recipe(asked.recipe)
    scale = arguments.scale or recipe.scale
    stages = asked.stages or recipe.stages_for(scale)
    plugins = list(dict.fromkeys([*recipe.plugins, *named_plugins()]))
    strategy = arguments.strategy or recipe.strategy_for(scale)
    state = RunState(asked.recipe, scale, strategy, stages, flags, plugins=plugins)
    for stage in stages:
        recipe.configs(stage, scale, state.strategy)
    for flag in flags:
        first = flag.removeprefix("--").partition(".")[0]
        other = flag.startswith("--") and "." in flag and first not in (*KEYS, *recipe.stages)
        if other and (near := nearest(first, recipe.stages)):
            raise ValueError(f"{flag}: '{first}' is no stage{near}; stages: {', '.join(recipe.stages)}")
    job = os.environ.get("TORCHELASTIC_RUN_ID") or os.environ.get("SLURM_JOB_ID") or time.strftime("%Y%m%d-%H%M%S")
    folder = arguments.out or Path("runs") / "-".join(filter(None, (recipe.name, scale, job)))
    if (folder / STATE_FILE).exists() and not arguments.dry_run and launch().is_first:
        raise ValueError(f"{folder} holds a run already: add --resume to go on with it, or choose another --out")
    return folder, state


def _find_unfinished(asked: Asked) -> tuple[Path, RunState]:
    arguments = asked.options
    if asked.flags or arguments.scale or arguments.strategy or arguments.stages:
        raise ValueError("--resume goes on with what the run was started with; it takes no other flag than --out")
    if arguments.out:
        return arguments.out, RunState.load(arguments.out)
    found = sorted(Path("runs").glob(f"*/{STATE_FILE}"), key=lambda file: file.stat().st_mtime, reverse=True)
    for file in found:
        state = RunState.load(file.parent)
        if state.done != state.stages and asked.recipe in (None, state.recipe):
            return file.parent, state
    raise ValueError(f"there is no unfinished run{f' of {asked.recipe}' if asked.recipe else ''} in runs/")


def _command(recipe: Recipe, state: RunState, stage: str, folder: Path) -> list[str]:
    """Arguments of `lit-vlm` for one stage."""
    words = ["fit", *(["--plugins", ",".join(state.plugins)] if state.plugins else [])]
    for config in recipe.configs(stage, state.scale, state.strategy):
        words += ["--config", os.path.relpath(config)]
    start = recipe.start_of(stage, state.stages)
    words += ["--trainer.default_root_dir", str(folder / stage)]
    words += flags_for(stage, state.flags, recipe.stages)
    if start:  # last, as a start_from among the flags is meant for the first stage
        words += ["--model.stage.start_from", str(folder / start)]
    return words


def _run(recipe: Recipe, state: RunState, folder: Path, console: Console, checked: Mapping[str, Checked]) -> None:
    console.print(f"{recipe.name}: {', '.join(state.stages)} into {folder}", soft_wrap=True, highlight=False)
    state.save(folder)
    tracker = _ParentRun(state, folder, recipe)
    for stage in state.stages:
        if stage in state.done:
            continue
        words = _command(recipe, state, stage, folder)
        found = checkpoints_in(folder / stage)
        if found:
            words += ["--ckpt_path", str(found[-1])]
        console.rule(f"{recipe.name}: {stage}")
        console.print(f"lit-vlm {shlex.join(words)}\n", soft_wrap=True, highlight=False)
        if stage in checked and checked[stage].gpus > 1:
            foretell(state, stage, folder / stage, checked[stage], console)
        code = _execute(words, tracker.environment())
        if code != 0:
            tracker.end("KILLED" if code < 0 or code == 130 else "FAILED", f"stage {stage} ended with exit code {code}")
            console.print(
                f"\n[red]stage {stage} ended with exit code {code}[/]; {_advice(folder, stage, code)}", soft_wrap=True
            )
            raise SystemExit(code if code > 0 else 1)
        state.done.append(stage)
        state.save(folder)
    tracker.end("FINISHED")
    from lit_vlm.commands.report import report

    report(folder, state.stages, recipe.next, console)


def _advice(folder: Path, stage: str, code: int) -> str:
    """Advice after a failed stage: one that refused to start needs a fix first, any other is resumed."""
    again = f"lit-vlm run --resume --out {folder}"
    if code == REFUSED and not checkpoints_in(folder / stage):
        return (
            f"mend what is named above. If it is a file: {again}. If it is a flag, give the command again with another "
            "--out, as --resume takes the same flags"
        )
    return f"go on with: {again}"


def _execute(words: Sequence[str], environment: dict[str, str]) -> int:
    """Run one stage in a process of its own, which frees its memory and dies with this one; returns its exit code."""
    command = [sys.executable, "-P", "-m", "lit_vlm", *words]
    process = subprocess.Popen(command, env=os.environ | environment, preexec_fn=_die_with_parent)
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        return process.wait() or 130


def _die_with_parent() -> None:
    """Ask Linux to kill this process when its parent dies, so that no orphan goes on writing into the run."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


class _ParentRun:
    """The MLflow run that the stages of one `lit-vlm run` are children of."""

    def __init__(self, state: RunState, folder: Path, recipe: Recipe) -> None:
        self._run: Any = None
        if not (_uses_mlflow(state.flags) and launch().is_first):
            return
        from lit_vlm.training.mlflow_run import MLflowRun, known_run
        from lit_vlm.training.mlflow_store import default_uri

        prefixes = ("--trainer.logger.init_args", "--trainer.logger")
        uri = _flag_value(state.flags, *(f"{prefix}.tracking_uri" for prefix in prefixes))
        name = _flag_value(state.flags, *(f"{prefix}.experiment_name" for prefix in prefixes))
        tags = {"system": recipe.name, "scale": state.scale or "", "strategy": state.strategy, "folder": str(folder)}
        label = "-".join(filter(None, (recipe.name, state.scale)))
        given = uri or os.environ.get("MLFLOW_TRACKING_URI")
        known = known_run(folder, given) if state.parent_run else None
        self._run = known or MLflowRun(default_uri(uri), name or "lit-vlm", label, tags, folder, state.parent_run)
        self._run.owns_folder()
        self._run.going_on()
        if self._run.run_id != state.parent_run:
            state.parent_run = self._run.run_id
            state.save(folder)

    def environment(self) -> dict[str, str]:
        """Environment variables by which a stage's MLflow run becomes a child of this one, in the same store."""
        from lit_vlm.training.mlflow_run import PARENT_RUN

        if not (self._run and self._run.run_id):
            return {}
        return {PARENT_RUN: self._run.run_id, "MLFLOW_TRACKING_URI": self._run.uri}

    def end(self, status: str, reason: str | None = None) -> None:
        """Report the last status, and the reason of a failure."""
        if self._run:
            if reason:
                self._run.tag("failure", reason)
            self._run.end(status)


def _uses_mlflow(flags: Sequence[str]) -> bool:
    value = _flag_value(flags, "--trainer.logger")
    return value is None or "MLflow" in value


def _flag_value(flags: Sequence[str], *names: str) -> str | None:
    """The value of the last of these flags, as `--name value` or `--name=value`."""
    value = None
    for index, flag in enumerate(flags):
        name, equals, given = flag.partition("=")
        if name in names:
            value = given if equals else next(iter(flags[index + 1 : index + 2]), None)
    return value
