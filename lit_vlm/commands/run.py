"""`lit-vlm run`: runs the stages of a recipe, each from the weights of the stage before."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from lit_vlm.checkpoints.folder import DONE_FILE, checkpoints_in, is_done
from lit_vlm.commands.apart import apart
from lit_vlm.commands.asked import Asked, ask, flags_for, recipe_parser
from lit_vlm.commands.begin import Begin, decide, found, together, until
from lit_vlm.commands.child import Stages
from lit_vlm.commands.fit import REFUSED, Checked, check_flags
from lit_vlm.commands.foretell import foretell
from lit_vlm.commands.recipe import Recipe, find_recipe, shipped_recipes
from lit_vlm.commands.runs import RunState
from lit_vlm.core.launcher import LOST, PREEMPTED, launch
from lit_vlm.core.plugins import use_plugins

SEEN = 60.0
"""Seconds until a file that another machine wrote is seen on this one."""


def main(argv: Sequence[str]) -> None:
    """Parse the arguments, and run, check or resume a recipe.

    Raises:
        ValueError: for a wrong argument or recipe, a folder that holds another run, or nothing to resume.
        SystemExit: when a flag is wrong, a check fails, a stage ends with an error, or a signal asks to leave.
    """
    asked = ask(_parser(), argv)
    console = Console()
    if asked.options.dry_run:
        _dry_run(decide(asked), console)
        return
    checked: dict[str, Checked] = {}

    def decided(asked: Asked) -> Begin:
        begin = decide(asked)
        checked.update(_check(begin))
        return found(begin) if begin.goes_on else begin

    # Signals are noted from here on: one that comes while flags are checked ends the run as one that comes later does.
    with Stages() as stages, together(asked, decided) as begin:
        recipe = find_recipe(begin.state.recipe)
        use_plugins(begin.state.plugins)
        _run(recipe, begin, stages, console, checked)


def _dry_run(begin: Begin, console: Console) -> None:
    from lit_vlm.commands.dry_run import check_recipe

    recipe, state = find_recipe(begin.state.recipe), begin.state
    use_plugins(state.plugins)
    if not check_recipe({stage: command_of(recipe, state, stage, begin.folder) for stage in state.stages}, console):
        raise SystemExit(1)


def _check(begin: Begin) -> dict[str, Checked]:
    """Check the flags of the stages that are left, before anything is written."""
    recipe, state = find_recipe(begin.state.recipe), begin.state
    use_plugins(state.plugins)
    left = [stage for stage in state.stages if stage not in state.done]
    commands = [command_of(recipe, state, stage, begin.folder) for stage in left]
    return dict(zip(left, check_commands(commands), strict=True)) if left else {}


def check_commands(commands: Sequence[Sequence[str]]) -> list[Checked]:
    """Check the flags of all stages before anything is written.

    A separate process loads the libraries for it, so that this one stays small while stages run.

    Returns:
        what the flags say.

    Raises:
        SystemExit: for a wrong flag, which the separate process has reported in one line.
    """
    sys.stderr.write("checking flags ...\n")  # a few seconds, as classes must be loaded to know their arguments
    return apart(_check_all, commands)


def _check_all(commands: Sequence[Sequence[str]]) -> list[Checked]:
    checked = [check_flags(words[1:]) for words in commands]
    if checked and checked[0].start_from:  # later stages start from what earlier ones will leave
        from lit_vlm.checkpoints.weights import find_start

        find_start(checked[0].start_from)
    return checked


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


def command_of(recipe: Recipe, state: RunState, stage: str, folder: Path) -> list[str]:
    """Arguments of `lit-vlm` for one stage of a run, whose folder holds one of each stage."""
    start = recipe.start_of(stage, state.stages)
    return stage_words(recipe, state, stage, folder / stage, folder / start if start else None)


def stage_words(recipe: Recipe, state: RunState, stage: str, folder: Path, start: Path | None) -> list[str]:
    """Arguments of `lit-vlm` for one stage.

    Args:
        recipe: the recipe.
        state: what is run of it.
        stage: the stage.
        folder: of the stage.
        start: folder of the stage whose weights it starts from.
    """
    words = ["fit", *(["--plugins", ",".join(state.plugins)] if state.plugins else [])]
    for config in recipe.configs(stage, state.scale, state.strategy):
        words += ["--config", os.path.relpath(config)]
    words += ["--trainer.default_root_dir", str(folder)]
    words += flags_for(stage, state.flags, recipe.stages)
    if start:  # last, as a start_from among the flags is meant for the first stage
        words += ["--model.stage.start_from", str(start)]
    return words


def _run(recipe: Recipe, begin: Begin, stages: Stages, console: Console, checked: Mapping[str, Checked]) -> None:
    folder, state = begin.folder, begin.state
    console.print(f"{recipe.name}: {', '.join(state.stages)} into {folder}", soft_wrap=True, highlight=False)
    if begin.goes_on:
        console.print(f"going on: done {', '.join(state.done) or 'nothing yet'}", soft_wrap=True, highlight=False)
    state.save(folder)
    tracker = _ParentRun(state, folder, recipe)
    for stage in state.stages:
        if stage in state.done:
            continue
        words = command_of(recipe, state, stage, folder)
        if stage in begin.checkpoints:
            words += ["--ckpt_path", begin.checkpoints[stage]]
        console.rule(f"{recipe.name}: {stage}")
        console.print(f"lit-vlm {shlex.join(words)}\n", soft_wrap=True, highlight=False)
        if stage in checked and checked[stage].gpus > 1:
            foretell(state, stage, folder / stage, checked[stage], console)
        code = stages.run(words, tracker.environment(stage))
        if code == 0 and not until(partial(is_done, folder / stage), SEEN):
            console.print(f"stage {stage} ended without {folder / stage / DONE_FILE}", soft_wrap=True)
            code = 1
        if code != 0:
            _end(tracker, folder, stage, code, stages.asked, console)
        state.done.append(stage)
        state.save(folder)
    tracker.end("FINISHED")
    if launch().is_first:
        from lit_vlm.commands.report import report

        report(folder, state.stages, recipe.next, console)


def _end(tracker: _ParentRun, folder: Path, stage: str, code: int, asked: str | None, console: Console) -> NoReturn:
    """Report a stage that has not come to its end, and end as it did."""
    if code == PREEMPTED:
        what = f"stage {stage} left, as {asked} asked it to" if asked else f"stage {stage} left, as its time is over"
        tracker.preempted(what)
        console.print(f"\n{what}: the same command goes on", soft_wrap=True, highlight=False)
        raise SystemExit(PREEMPTED)
    if code < 0 and launch().is_first:  # it could not say so itself
        tracker.end_stage(folder / stage, "KILLED")
    tracker.end("KILLED" if code < 0 or code == 130 else "FAILED", f"stage {stage} ended with exit code {code}")
    console.print(
        f"\n[red]stage {stage} ended with exit code {code}[/]; {_advice(folder, stage, code)}", soft_wrap=True
    )
    # A process that was killed is one that the run has lost, as the other processes say of it.
    raise SystemExit(LOST if -code == signal.SIGKILL else code if code > 0 else 128 - code)


def _advice(folder: Path, stage: str, code: int) -> str:
    """Advice after a failed stage: one that refused to start needs a fix first, any other goes on."""
    if code == REFUSED and not checkpoints_in(folder / stage):
        return (
            "mend what is named above. If it is a file, give the same command again; if it is a flag, choose another "
            "--out as well, as a run goes on with the flags that it began with"
        )
    return f"the same command goes on, or: lit-vlm run --resume --out {folder}"


class _ParentRun:
    """The MLflow run that the stages of one `lit-vlm run` are children of, and the tags that they share."""

    def __init__(self, state: RunState, folder: Path, recipe: Recipe) -> None:
        from lit_vlm.training.run_tags import RUN, TOLD_APART, given_tags, run_name

        self._run: Any = None
        self._state, self._recipe = state, recipe
        own = {"system": recipe.name, "scale": state.scale, "strategy": state.strategy, RUN: run_name(folder)}
        own["seed"] = _flag_value(state.flags, "--seed_everything")
        self._tags = given_tags() | {key: value for key, value in own.items() if value}
        if not (uses_mlflow(state.flags) and launch().is_first):
            return
        from lit_vlm.training.mlflow_run import PARENT_RUN, MLflowRun, known_run
        from lit_vlm.training.mlflow_store import default_uri

        uri, experiment = mlflow_place(state.flags)
        tags = self._tags | {"folder": str(folder), "flags": shlex.join(state.flags)}
        if above := os.environ.get(PARENT_RUN):  # that of a search, of which this run is a trial
            tags["mlflow.parentRunId"] = above
        given = uri or os.environ.get("MLFLOW_TRACKING_URI")
        known = known_run(folder, given) if state.parent_run else None
        label = self._tags[RUN]
        self._run = known or MLflowRun(default_uri(uri), experiment, label, tags, folder, state.parent_run)
        self._run.owns_folder()
        self._run.going_on()
        if not known:
            self._run.params({key: tags[key] for key in TOLD_APART if key in tags})
        if self._run.run_id != state.parent_run:
            state.parent_run = self._run.run_id
            state.save(folder)

    def environment(self, stage: str) -> dict[str, str]:
        """Environment variables that give a stage's run its tags, and make it a child of this one in the same store."""
        from lit_vlm.training.mlflow_run import PARENT_RUN
        from lit_vlm.training.run_tags import for_children

        flags = shlex.join(flags_for(stage, self._state.flags, self._recipe.stages))
        variables = for_children(self._tags | {"flags": flags})
        if self._run and self._run.run_id:
            variables |= {PARENT_RUN: self._run.run_id, "MLFLOW_TRACKING_URI": self._run.uri}
        return variables

    def preempted(self, reason: str) -> None:
        """Report that the run leaves in order and can go on."""
        if self._run:
            self._run.preempted(reason)

    def end(self, status: str, reason: str | None = None) -> None:
        """Report the last status, and the reason of a failure."""
        from lit_vlm.training.mlflow_store import FAILURE

        if self._run:
            if reason:
                self._run.tag(FAILURE, reason)
            self._run.end(status)

    def end_stage(self, folder: Path, status: str) -> None:
        """Report the last status of the stage of a folder, whose process could not."""
        from lit_vlm.training.mlflow_run import RUN_FILE, MLflowRun

        if self._run and (folder / RUN_FILE).is_file():
            MLflowRun.of_folder(folder).end(status)


def uses_mlflow(flags: Sequence[str]) -> bool:
    """Whether stages with these flags report to MLflow."""
    value = _flag_value(flags, "--trainer.logger")
    return value is None or "MLflow" in value


def mlflow_place(flags: Sequence[str]) -> tuple[str | None, str]:
    """The URI of MLflow's store that flags name, None where they name none, and the experiment."""
    prefixes = ("--trainer.logger.init_args", "--trainer.logger")
    uri = _flag_value(flags, *(f"{prefix}.tracking_uri" for prefix in prefixes))
    return uri, _flag_value(flags, *(f"{prefix}.experiment_name" for prefix in prefixes)) or "lit-vlm"


def _flag_value(flags: Sequence[str], *names: str) -> str | None:
    """The value of the last of these flags, as `--name value` or `--name=value`."""
    value = None
    for index, flag in enumerate(flags):
        name, equals, given = flag.partition("=")
        if name in names:
            value = given if equals else next(iter(flags[index + 1 : index + 2]), None)
    return value
