"""Scores and pictures of held-out questions, before and after a stage."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as L

from lit_vlm.data import VLMData
from lit_vlm.data.records import Record, open_image
from lit_vlm.module import LitVLM
from lit_vlm.tasks import Answer, HeldOutScores, evaluate_held_out
from lit_vlm.tasks.held_out import held_out_records, shuffle_images
from lit_vlm.tracking import MLflow

FILE = "held_out.json"
PICTURE = "answers.png"


class HeldOut(L.Callback):
    """Scores held-out questions when a stage starts and when it ends, into held_out.json and MLflow.

    At the end it also scores the same questions with the pictures of others (`shuffled`), which shows what can be
    answered without seeing, and draws some pictures with their answers into answers.png.

    Args:
        limit: records to score; default: all of data.val.
        batch_size: records at a time.
        shuffled: whether the control with shuffled pictures is made.
        num_pictures: pictures to draw.
        max_new_tokens: length of an answer at most.
    """

    def __init__(
        self,
        limit: int | None = None,
        batch_size: int = 32,
        shuffled: bool = True,
        num_pictures: int = 8,
        max_new_tokens: int = 8,
    ) -> None:
        self.limit, self.batch_size, self.shuffled, self.num_pictures = limit, batch_size, shuffled, num_pictures
        self.max_new_tokens = max_new_tokens
        self._records: list[Record] = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Score the start; a stage that goes on from another has that one's end as its start."""
        assert isinstance(pl_module, LitVLM)
        if pl_module.stage.start_from is None and "before" not in _load(trainer):
            self._score(trainer, pl_module, "before")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Score the end, and draw."""
        assert isinstance(pl_module, LitVLM)
        answers = self._score(trainer, pl_module, "after")
        if self.shuffled:
            self._score(trainer, pl_module, "shuffled")
        if trainer.is_global_zero:
            path = Path(trainer.default_root_dir) / PICTURE
            # Some of each kind of question, spread over the whole list.
            stride = max(1, len(answers) // self.num_pictures) | 1
            draw_answers(answers[::stride][: self.num_pictures], path)
            for logger in trainer.loggers:
                if isinstance(logger, MLflow):
                    logger.experiment.log_artifact(logger.run_id, str(path))

    def _score(self, trainer: L.Trainer, module: LitVLM, when: str) -> Sequence[Answer]:
        data = getattr(trainer, "datamodule", None)
        assert isinstance(data, VLMData)
        self._records = self._records or held_out_records(module, data, self.limit)
        if not self._records:
            raise ValueError("callbacks.HeldOut scores the questions of data.val, and there is no usable one")
        records = shuffle_images(self._records) if when == "shuffled" else self._records
        start = time.perf_counter()
        scores, answers = evaluate_held_out(module, data, records, self.batch_size, self.max_new_tokens)
        if trainer.is_global_zero:
            trainer.print(f"held-out questions, {when}: {_line(scores)} ({time.perf_counter() - start:.0f} s)")
            found = _load(trainer) | {when: asdict(scores)}
            (Path(trainer.default_root_dir) / FILE).write_text(json.dumps(found, indent=2))
            for logger in trainer.loggers:
                metrics = {f"held_out/{when}_{key}": float(value) for key, value in asdict(scores).items()}
                logger.log_metrics(metrics, step=trainer.global_step)
        return answers


def _line(scores: HeldOutScores) -> str:
    parts = [f"loss {scores.loss:.3f}", f"exact {scores.exact_match:.1%}", f"F1 {scores.token_f1:.1%}"]
    if scores.num_choices:
        parts.append(f"choice {scores.choice_accuracy:.1%} (chance {scores.choice_chance:.0%})")
    return ", ".join(parts)


def _load(trainer: L.Trainer) -> dict[str, Any]:
    file = Path(trainer.default_root_dir) / FILE
    return json.loads(file.read_text()) if file.exists() else {}


def draw_answers(answers: Sequence[Answer], path: Path) -> None:
    """A sheet of pictures with question, answer, and the expected answer, green where they agree."""
    from matplotlib.figure import Figure

    columns = 4
    rows = -(-len(answers) // columns)
    figure = Figure(figsize=(3.2 * columns, 3.9 * rows), layout="constrained")
    for index, answer in enumerate(answers):
        axes = figure.add_subplot(rows, columns, index + 1)
        axes.axis("off")
        for image in answer.record.images[:1]:
            axes.imshow(open_image(image, Path("/")))
        right = answer.given.strip().lower() == answer.expected.strip().lower()
        axes.set_title(f"{answer.question[:40]}\n", fontsize=10)
        axes.text(
            0.5, 1.01, f"→ {answer.given[:40]}", transform=axes.transAxes, ha="center", va="bottom", fontsize=11,
            color="tab:green" if right else "tab:red", weight="bold",
        )  # fmt: skip
        axes.text(
            0.5, -0.02, f"expected: {answer.expected[:40]}", transform=axes.transAxes, ha="center", va="top", fontsize=9
        )
    figure.savefig(path, dpi=90)
