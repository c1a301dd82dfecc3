"""What `lit-vlm evaluate` does with scores that are there: report them to MLflow, print them, compare fewer bits."""

from __future__ import annotations

import gc
import logging
from collections.abc import Mapping
from dataclasses import replace
from math import isfinite
from pathlib import Path

import torch
from rich.table import Table

from lit_vlm.checkpoints.folder import step_of
from lit_vlm.commands.named_runs import Named
from lit_vlm.evaluation.tasks import Evaluated
from lit_vlm.experiments.stage_scores import scores_of_task
from lit_vlm.experiments.statistics.paired import difference
from lit_vlm.training.mlflow_run import RUN_FILE, MLflowRun
from lit_vlm.training.mlflow_store import SQLITE, connect, default_uri, first_line, has_run, sqlite_file

Results = dict[tuple[str, str], Evaluated]
"""Name of a task and of a prompt → the result."""

log = logging.getLogger(__name__)


def log_scores(named: Named, results: Mapping[tuple[str, str], Evaluated], dtype: str, out: Path) -> None:
    """Report scores as `evaluate/TASK/PROMPT/SCORE`: to the MLflow run of the checkpoint's stage.

    A stage that was trained without MLflow gets a run of its own for them. What cannot be reported is warned of.

    Args:
        named: the checkpoint.
        results: its results.
        dtype: type of the weights.
        out: folder of the results, beside which unsent reports are kept for a run of its own.
    """
    scores = {
        f"evaluate/{task}/{prompt}/{score}": value
        for (task, prompt), result in results.items()
        for score, value in result.scores.items()
    }
    step = max(0, step_of(named.checkpoint))
    if (named.folder / RUN_FILE).is_file():
        run = _of_stage(named.folder)
        if run is not None:
            run.metrics(scores, step)
            if waiting := run.flush():
                log.warning("MLflow: %d reports wait: lit-vlm sync %s sends them", waiting, named.folder)
        return
    run = MLflowRun(default_uri(), "lit-vlm", f"evaluate {named.folder.name}", {}, out)
    run.params({"checkpoint": str(named.checkpoint), "dtype": dtype})
    run.metrics(scores, step)
    run.end("FINISHED")


def changed(folder: Path, prompt: str, kind: str) -> str:
    """What a type of fewer bits changes of a task's main score, with an interval where its questions have scores.

    Args:
        folder: of the task, with a folder for each prompt.
        prompt: name of the prompt, as the model was asked first.
        kind: the type.

    Raises:
        ValueError: for files that cannot be read.
    """
    rounded, whole = (scores_of_task(folder / name / "scores.json", prompt) for name in (f"{prompt}-{kind}", prompt))
    score, before = next((name, score) for name, score in whole.items() if score.main)
    now = rounded[score]
    scale, unit = (100, " points") if now.share else (1, "")
    change = (now.value - before.value) * scale
    text = f"{folder.name}, {prompt}: {kind} changes {score.rpartition('/')[2]} by {change:+.2f}{unit}"
    if not now.answers or not before.answers:
        return text
    # They are asked alike but for what is compared.
    found = difference({0: replace(now, asked={}, better="higher")}, {0: replace(before, asked={}, better="higher")})
    # Without any change, or with a single question, nothing is known of others.
    known = f" [{found.low * scale:+.2f} to {found.high * scale:+.2f}], {found.level:.0%} for other questions"
    unlike = sum(now.answers[question] != value for question, value in before.answers.items())
    return f"{text}{known if isfinite(found.low) else ''}; {unlike:,} of {len(now.answers):,} answers score otherwise"


def line(result: Evaluated) -> str:
    """A result for the terminal: its main score, and what was left out."""
    text = f"{result.main} {result.scores[result.main]:.2f} ({result.count:,} examples)"
    if result.left_out:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in result.left_out.items())
        text += f", left out and counted as wrong (where there is wrong): {reasons}"
    if "too_long" in result.left_out:
        text += "; a larger --max-length lets long prompts in"
    return text


def table(results: Mapping[str, Results]) -> Table:
    """A column for each checkpoint, and a row for each score of each prompt."""
    shown = Table()
    for title in ("task", "prompt", "score"):
        shown.add_column(title)
    for label in results:
        shown.add_column(label, justify="right", overflow="fold")
    for key in next(iter(results.values())):
        found = [own[key] for own in results.values()]
        for score in dict.fromkeys(score for one in found for score in one.scores):
            values = [f"{one.scores[score]:.2f}" if score in one.scores else "" for one in found]
            shown.add_row(*(key if score == found[0].main else ("", "")), score, *values)
    return shown


def _of_stage(folder: Path) -> MLflowRun | None:
    """The MLflow run of a stage, to add to; None, with a warning, where its store no longer has it.

    It has a file of unsent reports of its own, as training may still be under way and use that of the stage.
    """
    why = ""
    try:
        known = MLflowRun.of_folder(folder)
    except ValueError as error:
        log.warning("MLflow: %s; scores are in files alone", error)
        return None
    file = sqlite_file(known.uri)
    if known.uri.startswith(SQLITE) and not file.exists():  # asking would make an empty store there
        why = f"{file} is gone"
    elif known.run_id is not None:
        try:
            why = "" if has_run(connect(known.uri), known.run_id) else f"{known.uri} has no run {known.run_id} any more"
        except Exception as error:  # a store that does not answer now may later: reports wait
            log.warning("MLflow: %s does not answer (%s)", known.uri, first_line(error))
    if why or known.run_id is None:
        log.warning("MLflow: %s; scores are in files alone", why or f"{folder / RUN_FILE} names no run")
        return None
    return MLflowRun(known.uri, known.experiment, known.name, known.tags, folder, known.run_id)


def release(device: str) -> None:
    """Free the memory of a model that is no longer held."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
