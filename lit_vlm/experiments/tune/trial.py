"""One trial: a `lit-vlm run` in a process of its own, and what it leaves."""

from __future__ import annotations

import json
import math
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lit_vlm.checkpoints.progress import AT_WORK, Progress, seconds_between
from lit_vlm.core.children import start_lit_vlm
from lit_vlm.experiments.file import flag_words
from lit_vlm.experiments.tune.file import HELD_OUT, TuneFile
from lit_vlm.experiments.tune.study import STUDY_FILE, missing
from lit_vlm.training.trial import TUNED_FILE

LOG_FILE = "output.log"
"""What a trial prints, in its folder."""
HELD_OUT_FILE = "held_out.json"


class Outcome(NamedTuple):
    """How a trial has ended.

    Attributes:
        value: its score; None where it has not come to its end.
        reason: why it has not.
        failed: whether it ended before anything was trained, or without the score: that says nothing of its settings.
    """

    value: float | None = None
    reason: str = ""
    failed: bool = False


def words_of(
    file: TuneFile, stages: Sequence[str], folder: Path, number: int, trial: int, setting: Mapping[str, Any]
) -> list[str]:
    """Arguments of `lit-vlm` for a trial.

    Args:
        file: what is searched.
        stages: stages of the trial, in order.
        folder: folder of the search.
        number: number of the trial.
        trial: its id in the study.
        setting: flag → value.
    """
    words = ["run", file.recipe, "--stages", ",".join(stages), "--out", str(folder_of(folder, number))]
    words += [word for key in ("scale", "strategy") if (given := getattr(file, key)) for word in (f"--{key}", given)]
    words += flag_words({**file.base, **setting})
    if not file.score.startswith(HELD_OUT):
        arguments = {
            "study": str(folder.absolute() / STUDY_FILE), "trial": trial, "score": file.score, "pruner": file.pruner,
            "startup": file.startup,
        }  # fmt: skip
        callback = {"class_path": "callbacks.Pruning", "init_args": arguments}
        words += flag_words({f"{stages[-1]}.trainer.callbacks+": callback})
    return words


def folder_of(folder: Path, number: int) -> Path:
    """The folder of a trial."""
    return folder / "trials" / f"{number:04d}"


def start(words: Sequence[str], folder: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a trial.

    Its process has a session of its own, as Ctrl-C in a terminal would reach it beside what the search tells it. It
    dies with the search.

    Args:
        words: arguments of `lit-vlm`.
        folder: folder of the trial, where what it prints is kept.
        environment: variables besides those of this process.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOG_FILE).open("ab") as log:
        log.write(f"\n$ lit-vlm {shlex.join(words)}\n".encode())
        log.flush()
        return start_lit_vlm(words, environment, log)


def outcome(code: int, folder: Path, stages: Sequence[str], score: str, since: str) -> Outcome:
    """What has become of a trial whose process has ended.

    Args:
        code: exit code of the process.
        folder: folder of the trial.
        stages: its stages, in order.
        score: name of the score.
        since: when the process started, as `checkpoints.progress.now` says it.
    """
    if code != 0:
        trained = any(_broke(Progress.read(folder / stage), since) for stage in stages)
        return Outcome(None, last_error(folder / LOG_FILE) or f"exit code {code}", failed=not trained)
    held_out = score.startswith(HELD_OUT)
    file = folder / stages[-1] / (HELD_OUT_FILE if held_out else TUNED_FILE)
    try:
        return _of_held_out(file, score) if held_out else _of_training(file)
    except (OSError, ValueError, KeyError, TypeError) as error:  # the search goes on whatever a trial leaves
        return Outcome(None, f"score: {file} cannot be read: {type(error).__name__}: {error}", failed=True)


def _broke(one: Progress | None, since: str) -> bool:
    """Whether a training broke on the way; one that was killed, as for its memory, had no time to say so."""
    if one is None or seconds_between(since, one.started) < 0:  # of an earlier process, which left the trial under way
        return False
    return one.state == "failed" or one.state in AT_WORK


def _of_held_out(file: Path, score: str) -> Outcome:
    found = held_out_scores(file)
    if score not in found:
        return Outcome(None, f"score: {missing(score, list(found))}, in {file}", failed=True)
    return _of_value(found[score])


def _of_training(file: Path) -> Outcome:
    left: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return Outcome(None, f"given up at step {left['step']}") if left["pruned"] else _of_value(left["value"])


def _of_value(value: float) -> Outcome:
    return Outcome(value) if math.isfinite(value) else Outcome(None, f"its score is {value}")


def held_out_scores(file: Path) -> dict[str, float]:
    """Name → score of what `callbacks.HeldOut` leaves at the end of a stage; none where it leaves nothing.

    `held_out/accuracy` is the share of right choices, or of exact answers where there are none to choose from.
    """
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if (after := found.get("after")) is None:
        return {}
    scores: dict[str, float] = {}
    for prefix, own in {
        HELD_OUT: after,
        **{f"{HELD_OUT}{key}/": one for key, one in after["by_source"].items()},
    }.items():
        scores[f"{prefix}accuracy"] = own["choice_accuracy" if own["num_choices"] else "exact_match"]
        scores |= {f"{prefix}{key}": float(value) for key, value in own.items() if isinstance(value, int | float)}
    return scores


def last_error(log: Path) -> str:
    """The last line of a log that begins with `error:`, without that; empty where there is none."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return errors[-1][:500] if errors else ""


def where(folder: Path, stages: Sequence[str]) -> str:
    """Where a trial is, in a few words."""
    begun = [(stage, one) for stage in stages if (one := Progress.read(folder / stage)) is not None]
    if not begun:
        return "starting"
    stage, one = begun[-1]
    return f"{stage} {one.step}{f' of {one.steps}' if one.steps else ''}"


def remove_checkpoints(folder: Path, stages: Sequence[str]) -> None:
    """Remove the checkpoints of a trial."""
    for stage in stages:
        shutil.rmtree(folder / stage / "checkpoints", ignore_errors=True)


def stop(processes: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    """Send a signal to the trials that run."""
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)
