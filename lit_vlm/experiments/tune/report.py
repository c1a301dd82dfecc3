"""The report of a search: report.md with the best setting, the trials, and Optuna's plots."""

from __future__ import annotations

import logging
import shlex
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_vlm import __version__
from lit_vlm.core.written import write_report
from lit_vlm.experiments.file import short_names
from lit_vlm.experiments.tune.best import flags_line
from lit_vlm.experiments.tune.file import TuneFile
from lit_vlm.experiments.tune.study import REASON, Trials, best_of, shown
from lit_vlm.experiments.tune.trial import folder_of

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

log = logging.getLogger(__name__)

REPORT = "report.md"
ROWS = 30
"""Trials in the table, best first."""


def write(trials: Trials, folder: Path, command: str, recipe: Path | None) -> list[Path]:
    """Write the report and its plots into the folder of a search.

    Args:
        trials: the trials.
        folder: folder of the search.
        command: the command that made it.
        recipe: folder of the recipe with the best setting; None where no trial came to its end.

    Returns:
        the files that were written.
    """
    plots = _plots(trials, folder)
    finished = trials.finished()
    text = "\n".join([*_head(trials.file, finished, command, recipe), *_table(trials.file, finished), *_images(plots)])
    write_report(folder / REPORT, lambda path: path.write_text(f"{text}\n", encoding="utf-8"))
    return [folder / REPORT, *plots]


def _head(file: TuneFile, finished: Sequence[FrozenTrial], command: str, recipe: Path | None) -> list[str]:
    best = best_of(finished, file.better)
    states = Counter(one.state.name.lower() for one in finished)
    counted = ", ".join(f"{count} {state}" for state, count in states.items())
    lines = [f"# Search on {file.recipe}{f' at {file.scale}' if file.scale else ''}", ""]
    if best is None or recipe is None:
        lines.append("No trial came to its end.")
    else:
        lines += [
            f"Best: **{file.score} {best.value:.6g}** (trial {best.number}, {folder_of(Path('.'), best.number)}).",
            "", "    " + flags_line(best.params), f"    lit-vlm run {shlex.quote(str(recipe))}",
        ]  # fmt: skip
    return [
        *lines, "", f"{len(finished)} trials ({counted}); sampler {file.sampler}, pruner {file.pruner}, seed "
        f"{file.seed}; lit-vlm {__version__}. Made by `{command}`.", "",
    ]  # fmt: skip


def _table(file: TuneFile, finished: Sequence[FrozenTrial]) -> list[str]:
    names = short_names(list(file.search))
    sign = 1 if file.better == "lower" else -1

    def rank(one: FrozenTrial) -> tuple[bool, float, int]:
        complete = one.state.name == "COMPLETE" and one.value is not None
        return not complete, sign * (one.value or 0.0) if complete else 0.0, one.number

    rows = [f"| trial | {' | '.join(names.values())} | {file.score} | |", "|" + "---|" * (len(names) + 3)]
    for one in sorted(finished, key=rank)[:ROWS]:
        cells = [shown(one.params.get(name)) for name in file.search]
        complete = one.state.name == "COMPLETE"
        value = f"{one.value:.6g}" if complete else one.state.name.lower()
        reason = str(one.user_attrs.get(REASON, "")).replace("|", "\\|")
        rows.append(f"| {one.number} | {' | '.join(cells)} | {value} | {reason} |")
    if len(finished) > ROWS:
        rows.append(f"\n{len(finished) - ROWS} more are in study.db.")
    return rows


def _images(plots: Sequence[Path]) -> list[str]:
    return [line for plot in plots for line in ("", f"![{plot.stem}]({plot.name})")]


def _plots(trials: Trials, folder: Path) -> list[Path]:
    """Draw what there are enough trials for."""
    import matplotlib as mpl

    mpl.use("Agg")
    from optuna.importance import PedAnovaImportanceEvaluator
    from optuna.visualization import matplotlib as plots

    study, several = trials.study, len(trials.file.search) > 1
    values = [one.value for one in trials.finished() if one.state.name == "COMPLETE"]
    name = trials.file.score
    drawn: dict[str, Callable[[], Any]] = {}
    if values:
        drawn["history"] = lambda: plots.plot_optimization_history(study, target_name=name)
    if len(set(values)) > 1:
        drawn["slice"] = lambda: plots.plot_slice(study, target_name=name)
    if len(set(values)) > 1 and several:
        evaluator = PedAnovaImportanceEvaluator()  # needs no further package
        drawn["importances"] = lambda: plots.plot_param_importances(study, evaluator=evaluator, target_name=name)
        drawn["contour"] = lambda: plots.plot_contour(study, target_name=name)
    if any(one.intermediate_values for one in trials.finished()):
        drawn["curves"] = lambda: plots.plot_intermediate_values(study).set(
            title="By share of training", xlabel="% of training", ylabel=name
        )
    return [file for title, draw in drawn.items() if (file := _draw(draw, folder / f"{title}.png")) is not None]


def _draw(draw: Callable[[], Any], file: Path) -> Path | None:
    """Draw a plot into a file; None where Optuna cannot draw it, or the file cannot be written."""
    import matplotlib.pyplot as plt

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Optuna's, of plots that are experimental
            draw()
    except Exception as error:  # whatever it raises: the report can do without
        log.warning("%s is left out: %s: %s", file, type(error).__name__, error)
        plt.close("all")
        return None
    figure = plt.gcf()
    figure.set_size_inches(max(7.0, figure.get_figwidth()), max(4.5, figure.get_figheight()))
    written = write_report(file, lambda path: figure.savefig(path, dpi=110, bbox_inches="tight", format="png"))
    plt.close("all")
    return file if written else None
