"""Answers to some held-out questions, as a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L

from lit_vlm.core.progress import slowly
from lit_vlm.core.written import write_report
from lit_vlm.data import VLMData
from lit_vlm.data.records import Record, open_image
from lit_vlm.evaluation.asker import Asker
from lit_vlm.evaluation.held_out import Answer, answer_records
from lit_vlm.evaluation.held_out_records import NONE_HELD_OUT, held_out_records
from lit_vlm.training.loggers import reports
from lit_vlm.training.module import LitVLM


class Predictions(L.Callback):
    """Answers some held-out questions now and then and at the end: a PNG and a JSON file in the run and its loggers.

    Args:
        num: number of questions, spread over all of data.val.
        every_n_steps: optimizer steps between two sheets; default: only at the end.
        max_new_tokens: length of an answer at most.

    Raises:
        ValueError: during training, if data.val has no usable question.
    """

    def __init__(self, num: int = 8, every_n_steps: int | None = None, max_new_tokens: int = 16) -> None:
        self.num, self.every_n_steps, self.max_new_tokens = num, every_n_steps, max_new_tokens
        self._records: list[Record] = []
        self._last = -1

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check that the decoder can generate, before anything is trained.

        Raises:
            ValueError: for a decoder that does not go on from a cache.
        """
        assert isinstance(pl_module, LitVLM)
        pl_module.vlm.new_cache()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Answer the questions every `every_n_steps` optimizer steps."""
        step = trainer.global_step
        if self.every_n_steps and step > self._last and step % self.every_n_steps == 0:
            self._answer(trainer, pl_module, f"answers-step={step:08d}")
            self._last = step

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Answer the questions with the trained model."""
        self._answer(trainer, pl_module, "answers")

    def _answer(self, trainer: L.Trainer, module: L.LightningModule, name: str) -> None:
        assert isinstance(module, LitVLM)
        data = getattr(trainer, "datamodule", None)
        assert isinstance(data, VLMData)
        asker = Asker(module, data.format)
        if not self._records:
            self._records = held_out_records(asker, data.val_sources, self.num)
        if not self._records:
            raise ValueError(f"callbacks.Predictions answers the questions of data.val, and {NONE_HELD_OUT}")
        what = f"answering {len(self._records)} held-out questions for {name}.png"
        with slowly(what, trainer.is_global_zero), module.averaged():
            answers = answer_records(asker, self._records, self.max_new_tokens)
        if not trainer.is_global_zero:
            return
        folder = Path(trainer.default_root_dir)
        rows = [{"id": a.record.id, "question": a.question, "expected": a.expected, "given": a.given} for a in answers]
        text = json.dumps(rows, indent=2, ensure_ascii=False)
        picture = folder / f"{name}.png"
        write_report(folder / f"{name}.json", lambda file: file.write_text(text, encoding="utf-8"))
        drawn = write_report(picture, lambda file: draw_answers(answers, file))
        for report in reports(trainer):
            report.table(name, rows, trainer.global_step)
            if drawn:
                report.picture(picture, trainer.global_step)


def draw_answers(answers: Sequence[Answer], path: Path) -> None:
    """Draw pictures with question, answer and expected answer, green where both agree, into a PNG file."""
    from matplotlib.figure import Figure

    columns = 4
    rows = -(-len(answers) // columns)
    figure = Figure(figsize=(3.2 * columns, 4.1 * rows), layout="constrained")
    for index, answer in enumerate(answers):
        axes = figure.add_subplot(rows, columns, index + 1)
        axes.axis("off")
        for image in answer.record.images[:1]:
            axes.imshow(open_image(image, Path("/")))
        right = answer.given.strip().lower() == answer.expected.strip().lower()
        axes.set_title(f"{answer.question[:40]}\n", fontsize=10)
        place: dict[str, Any] = {"transform": axes.transAxes, "ha": "center"}
        colour = "tab:green" if right else "tab:red"
        axes.text(0.5, 1.01, f"→ {answer.given[:40]}", va="bottom", fontsize=11, weight="bold", color=colour, **place)
        axes.text(0.5, -0.02, f"expected: {answer.expected[:40]}", va="top", fontsize=9, **place)
    figure.savefig(path, dpi=90)
