"""Folders as finished runs leave them, without training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

STAGES = {"1_align": 30, "2_sft": 50}
"""Stage → its optimizer steps."""


def record_scores(right: Sequence[float], source: str = "count") -> dict[str, Any]:
    """What `callbacks.HeldOut` finds of questions with four options each: 1 for a right answer, 0 for a wrong one."""
    return {
        "loss": 2 - sum(right) / len(right), "exact_match": 0.0, "token_f1": 0.1,
        "choice_accuracy": sum(right) / len(right), "choice_chance": 0.25,
        "num_records": len(right), "num_choices": len(right), "by_source": {},
    }  # fmt: skip


def finished_run(
    folder: Path,
    flags: Sequence[str] = (),
    right: Sequence[float] = (1, 0, 1, 0),
    done: bool = True,
    scored: bool = True,
    answered: bool = True,
) -> Path:
    """A run of two stages; `right` are the held-out questions after the second, half of them of each of two sources."""
    state = {
        "recipe": "llava15", "scale": "mini", "strategy": "single", "stages": list(STAGES), "flags": list(flags),
        "done": list(STAGES) if done else list(STAGES)[:1], "parent_run": None, "plugins": [],
    }  # fmt: skip
    for stage, steps in STAGES.items():
        finished_stage(folder / stage, steps)
    (folder / "run.json").write_text(json.dumps(state))
    if scored:
        score_held_out(folder / "2_sft", right, answered)
    return folder


def finished_stage(folder: Path, steps: int, config: str = "seed_everything: 0\n") -> Path:
    """A stage of some steps on two devices, a minute long."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config)
    (folder / "done.json").write_text(json.dumps({"step": steps, "time": "2026-01-01T00:01:00+0000"}))
    progress = {
        "step": steps, "steps": steps, "first_step": 0, "tokens_per_s": 1000.0, "host": "h", "pid": 1,
        "started": "2026-01-01T00:00:00+00:00", "time": "2026-01-01T00:01:00+00:00", "slurm_job": None,
        "state": "finished", "devices": 2, "trained": 12_345, "peak_bytes": 3 * 2**30,
    }  # fmt: skip
    (folder / "progress.json").write_text(json.dumps(progress))
    return folder


def score_held_out(stage: Path, right: Sequence[float], answered: bool = True) -> None:
    """Leave what `callbacks.HeldOut` leaves."""
    half = len(right) // 2
    parts = {"count": record_scores(right[:half]), "depth": record_scores(right[half:])}
    after = record_scores(right) | {"by_source": parts}
    shuffled = record_scores([0.0] * len(right))
    (stage / "held_out.json").write_text(json.dumps({"after": after, "shuffled": shuffled}))
    if answered:
        lines = [
            {"when": when, "id": str(index % half), "source": "count" if index < half else "depth",
             "exact_match": 0.0, "token_f1": 0.1, "choice_accuracy": score if when == "after" else 0.0}
            for when in ("before", "after", "shuffled")
            for index, score in enumerate(right)
        ]  # fmt: skip
        (stage / "held_out.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def score_task(folder: Path, scores: Mapping[str, float], own: Sequence[float | None], **more: Any) -> Path:
    """Leave what `lit-vlm evaluate` leaves in a folder TASK/PROMPT: scores, and a line for each question."""
    folder.mkdir(parents=True)
    main = next(iter(scores))
    saved = {
        "task": folder.parent.name, "scores": dict(scores), "main": main, "averaged": main, "chance": None,
        "count": len(own),
    }  # fmt: skip
    (folder / "scores.json").write_text(json.dumps(saved | more))
    lines = [{"id": str(index), "score": score, "group": "ab"[index % 2]} for index, score in enumerate(own)]
    (folder / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
