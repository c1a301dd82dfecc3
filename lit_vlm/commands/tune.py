"""`lit-vlm tune`: search of learning rates and other settings, by Optuna."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from lit_vlm.commands.recipe import SHIPPED, Recipe, find_recipe
from lit_vlm.core.launcher import launch
from lit_vlm.core.plugins import nearest

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from lit_vlm.experiments.tune.file import TuneFile
    from lit_vlm.experiments.tune.search import Setup
    from lit_vlm.experiments.tune.study import Trials
    from lit_vlm.training.mlflow_run import MLflowRun


def main(argv: Sequence[str]) -> None:
    """Run the trials of a file, or what is left of them, and report the best setting.

    Raises:
        ValueError: for a wrong file or argument, a package that is missing, a folder that holds another search, or
            trials that all fail.
        SystemExit: when a check of `--dry-run` fails, or a signal asks to leave.
    """
    options = _parser().parse_args(argv)
    if importlib.util.find_spec("optuna") is None:
        raise ValueError("lit-vlm tune needs the package optuna: pip install 'lit-vlm[tune]'")
    if launch().world_size > 1:
        raise ValueError("lit-vlm tune is one process, which starts others: give it without srun or torchrun")
    from lit_vlm.experiments.tune.best import flags_line
    from lit_vlm.experiments.tune.file import read_file
    from lit_vlm.experiments.tune.search import Setup, places

    file = read_file(options.file)
    file = file.model_copy(update={"trials": options.trials or file.trials})
    recipe = find_recipe(file.recipe)
    stages = _stages(options.file, file, recipe)
    name = "-".join(filter(None, ("tune", recipe.name, file.scale, options.file.stem.removeprefix("tune"))))
    folder: Path = options.out or Path("runs") / name
    console = Console()
    if options.dry_run:
        _dry_run(file, stages, folder, console)
        return
    setup = Setup(file, folder, stages, file.count, places(options.jobs))
    console.print(f"{setup.count} trials of {file.recipe} into {folder}", soft_wrap=True, highlight=False)
    trials, parent = _search(setup, recipe, console)
    try:
        best, written, report = _finish(setup, trials, recipe, shlex.join(["lit-vlm", "tune", *argv]), parent)
    except BaseException:
        _fail(parent)
        raise
    if best is None:
        console.print(f"no trial came to its end: {report}", soft_wrap=True, highlight=False)
        raise SystemExit(1)
    console.print(f"\nbest: trial {best.number}, {file.score} {best.value:.6g}", highlight=False)
    console.print(flags_line(best.params), soft_wrap=True, highlight=False, markup=False)
    console.print(f"lit-vlm run {shlex.quote(str(written))}", soft_wrap=True, highlight=False, markup=False)
    console.print(f"report: {report}", soft_wrap=True, highlight=False)


def _search(setup: Setup, recipe: Recipe, console: Console) -> tuple[Trials, MLflowRun | None]:
    """Run the trials, and report each to the search's MLflow run.

    That run is opened by the process that may work in the folder alone: one that is refused would end the run of a
    search that goes on elsewhere, or of another file.
    """
    from lit_vlm.experiments.tune.search import Search

    parent: MLflowRun | None = None

    def begin() -> Mapping[str, str]:
        nonlocal parent
        parent = _parent_run(setup.file, setup.folder, recipe)
        return _environment(parent)

    def ended(trial: FrozenTrial) -> None:
        if parent is not None and trial.state.name == "COMPLETE" and trial.value is not None:
            parent.metrics({setup.file.score: trial.value}, trial.number)

    try:
        return Search(setup, begin, console, ended).run(), parent
    except SystemExit:
        if parent is not None:
            parent.preempted("a signal asked to leave")
        raise
    except BaseException:
        _fail(parent)
        raise


def _fail(parent: MLflowRun | None) -> None:
    if parent is not None:
        parent.end("FAILED")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lit-vlm tune",
        description="Search of learning rates and other settings: FILE names a recipe, flags and the values that they "
        "may have; Optuna chooses, and each trial is a run of the recipe. The same command goes on with a search that "
        "was interrupted.",
        allow_abbrev=False,
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="what is searched, in YAML")
    parser.add_argument("--out", type=Path, help="folder of the search (default: runs/tune-RECIPE-SCALE-FILE)")
    parser.add_argument("--trials", type=_count, help="how many in all, in place of the file's")
    parser.add_argument(
        "--jobs", type=_count, default=1, help="trials at the same time: one per GPU, or sharing the processor's cores"
    )
    parser.add_argument("--dry-run", action="store_true", help="check every stage with some settings; train nothing")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 1 on, found '{text}'")
    return int(text)


def _stages(path: Path, file: TuneFile, recipe: Recipe) -> list[str]:
    """The stages of a trial.

    Raises:
        ValueError: for a stage, scale or strategy that the recipe does not have, or a flag of a stage that is not run.
    """
    scale = file.scale or recipe.scale
    stages = list(file.stages or recipe.stages_for(scale))
    for stage in stages:
        recipe.configs(stage, scale, file.strategy or recipe.strategy_for(scale))
    known = ("model", "data", "trainer", "checkpoint", "preemption", "watchdog")
    for name in (*file.base, *file.search):
        first, dot, _ = name.partition(".")
        if dot and first not in (*stages, *known):
            raise ValueError(
                f"{path}: {name}: '{first}' is neither a stage of a trial nor a key of its config"
                f"{nearest(first, [*stages, *known])}; stages: {', '.join(stages)}"
            )
    return stages


def _dry_run(file: TuneFile, stages: Sequence[str], folder: Path, console: Console) -> None:
    """Check the first and the last value of each range, and all choices."""
    from lit_vlm.commands import run
    from lit_vlm.experiments.tune.trial import words_of

    ends = {name: list(one.choices or (one.low, one.high)) for name, one in file.search.items()}
    for index in range(max(map(len, ends.values()))):
        setting = {name: values[min(index, len(values) - 1)] for name, values in ends.items()}
        console.rule(" ".join(f"{name}={value}" for name, value in setting.items()))
        # A trial may have begun in its folder, with flags of its own.
        run.main([*words_of(file, stages, folder / "dry-run", index, index + 1, setting)[1:], "--dry-run"])
    console.print(f"{file.count} trials; {file.score}, {file.better} is better; nothing was trained", highlight=False)


def _parent_run(file: TuneFile, folder: Path, recipe: Recipe) -> MLflowRun | None:
    """The MLflow run that the runs of trials are children of; None where these do not report to MLflow."""
    from lit_vlm.commands.run import mlflow_place, uses_mlflow
    from lit_vlm.experiments.file import flag_words

    flags = flag_words(file.base)
    if not uses_mlflow(flags):
        return None
    from lit_vlm.training.mlflow_run import MLflowRun, known_run
    from lit_vlm.training.mlflow_store import default_uri

    tags = {"system": recipe.name, "scale": file.scale or "", "folder": str(folder)}
    uri, experiment = mlflow_place(flags)
    known = known_run(folder, uri or os.environ.get("MLFLOW_TRACKING_URI"))
    parent = known or MLflowRun(default_uri(uri), experiment, folder.name, tags, folder)
    parent.owns_folder()
    parent.going_on()
    if known is None:
        kept = file.model_dump(mode="json", exclude={"search", "base", "trials", "checkpoints"}, exclude_none=True)
        parent.params({**kept, **file.base, **{f"search.{name}": one for name, one in _ranges(file).items()}})
    return parent


def _ranges(file: TuneFile) -> dict[str, str]:
    return {
        name: " | ".join(map(str, one.choices)) if one.choices else f"{one.low} to {one.high}{' (log)' * one.log}"
        for name, one in file.search.items()
    }


def _environment(parent: MLflowRun | None) -> dict[str, str]:
    """Environment variables by which the MLflow run of a trial becomes a child of the search's."""
    if parent is None or parent.run_id is None:
        return {}
    from lit_vlm.training.mlflow_run import PARENT_RUN

    return {PARENT_RUN: parent.run_id, "MLFLOW_TRACKING_URI": parent.uri}


def _finish(
    setup: Setup, trials: Trials, recipe: Recipe, command: str, parent: MLflowRun | None
) -> tuple[FrozenTrial | None, Path | None, Path]:
    """Write the recipe with the best setting and the report, and end the search's MLflow run.

    Returns:
        the best trial, the folder of the recipe, None of both where no trial came to its end, and the report.
    """
    from lit_vlm.experiments.tune.best import RECIPE, write_recipe
    from lit_vlm.experiments.tune.report import write
    from lit_vlm.experiments.tune.study import best_of
    from lit_vlm.experiments.tune.trial import folder_of

    file, folder = setup.file, setup.folder
    best, written = best_of(trials.finished(), file.better), None
    if best is not None:
        shipped = recipe.folder.resolve().parent == SHIPPED.resolve()
        base = recipe.name if shipped else os.path.relpath(recipe.folder, folder / RECIPE)
        scale = file.scale or recipe.scale
        written = write_recipe(folder, base, scale, setup.stages, folder_of(folder, best.number), best.params)
    files = write(trials, folder, command, written)
    if parent is not None:
        if best is not None and best.value is not None:
            parent.metrics({f"best {file.score}": best.value}, len(trials.finished()))
            for name, value in {"trial": best.number, **best.params}.items():
                parent.tag(f"best.{name}", str(value))
        for one in files:
            parent.file(one)
        parent.end("FINISHED")
    return best, written, files[0]
