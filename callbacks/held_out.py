"""Scores of held-out questions, before and after a stage."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import lightning.pytorch as L

from lit_vlm.core.progress import slowly
from lit_vlm.core.written import write_report
from lit_vlm.data import VLMData
from lit_vlm.data.records import Record
from lit_vlm.evaluation.asker import Asker
from lit_vlm.evaluation.held_out import HeldOutScores, held_out_scores, judge_held_out
from lit_vlm.evaluation.held_out_records import NONE_HELD_OUT, held_out_records, shuffle_images
from lit_vlm.training.loggers import reports
from lit_vlm.training.module import LitVLM

FILE, ANSWERS = "held_out.json", "held_out.jsonl"
WHEN = {"before": "before training", "after": "after training", "shuffled": "each with the pictures of another"}
"""Times of scoring, in words."""


class HeldOut(L.Callback):
    """Scores held-out questions when a stage starts and when it ends, into held_out.json and the loggers.

    Answers and scores of single questions stand in held_out.jsonl. At the end it also scores each question with the
    picture of another question (`shuffled`), which shows what can be answered without seeing.

    Args:
        limit: number of records to score, spread evenly over data.val; default: all.
        batch_size: records at a time.
        shuffled: whether the control with shuffled pictures is made.
        max_new_tokens: length of an answer at most.

    Raises:
        ValueError: when training starts or ends, if data.val has no usable question.
    """

    def __init__(
        self,
        limit: int | None = None,
        batch_size: int = 32,
        shuffled: bool = True,
        max_new_tokens: int = 8,
    ) -> None:
        self.limit, self.batch_size, self.shuffled = limit, batch_size, shuffled
        self.max_new_tokens = max_new_tokens
        self._records: list[Record] = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Score the model before training, unless this run, or the stage that it starts from, has scored it already."""
        assert isinstance(pl_module, LitVLM)
        start = pl_module.stage.start_from
        earlier = [Path(start), *list(Path(start).parents)[:2]] if start else []  # a run's folder, or a file in it
        if "before" not in _load(trainer) and not any((folder / FILE).exists() for folder in earlier):
            self._score(trainer, pl_module, "before")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Score the trained model."""
        assert isinstance(pl_module, LitVLM)
        if (bar := trainer.progress_bar_callback) is not None:
            # Lightning's bar of training stays alive until all is over; two of them at once garble a terminal.
            bar.on_train_end(trainer, pl_module)
            bar.teardown(trainer, pl_module, "fit")
        self._score(trainer, pl_module, "after")
        if self.shuffled:
            self._score(trainer, pl_module, "shuffled")

    def _score(self, trainer: L.Trainer, module: LitVLM, when: str) -> None:
        data = getattr(trainer, "datamodule", None)
        assert isinstance(data, VLMData)
        asker = Asker(module, data.format)
        with slowly("held out: reading questions", trainer.is_global_zero):
            self._records = self._records or held_out_records(asker, data.val_sources, self.limit)
            if not self._records:
                raise ValueError(f"callbacks.HeldOut scores the questions of data.val, and {NONE_HELD_OUT}")
            records = shuffle_images(asker, self._records) if when == "shuffled" else self._records
        if not records:
            return
        start = time.perf_counter()
        sources = list(dict.fromkeys(record.source for record in records))
        named = ", ".join(sources) if len(sources) < 4 else f"{len(sources)} sources"
        what = f"{len(records):,} questions of {named}, {WHEN[when]}"
        judged = judge_held_out(asker, records, self.batch_size, self.max_new_tokens, f"held out: asking {what}")
        scores = held_out_scores(judged)
        if not trainer.is_global_zero:
            return
        trainer.print(f"held out: {what}: {_line(scores)} ({time.perf_counter() - start:.0f} s)")
        folder = Path(trainer.default_root_dir)
        found = _load(trainer) | {when: asdict(scores) | {"precision": str(trainer.precision)}}
        text = json.dumps(found, indent=2)
        write_report(folder / FILE, lambda file: file.write_text(text))
        lines = [json.dumps({"when": when} | asdict(one), ensure_ascii=False) for one in judged]
        answers = "".join(f"{line}\n" for line in [*_kept(folder / ANSWERS, when), *lines])
        write_report(folder / ANSWERS, lambda file: file.write_text(answers, encoding="utf-8"))
        for logger in trainer.loggers:
            metrics = _metrics(f"held_out/{when}", scores)
            for source, own in scores.by_source.items():
                metrics |= _metrics(f"held_out/{source}/{when}", own)
            logger.log_metrics(metrics, step=trainer.global_step)
        for report in reports(trainer):
            report.table("held_out_scores", _rows(found), trainer.global_step)


def _metrics(prefix: str, scores: HeldOutScores) -> dict[str, float]:
    """The scores that there are: without options, none of choices."""
    values = {key: value for key, value in asdict(scores).items() if key != "by_source" and value is not None}
    return {f"{prefix}_{key}": float(value) for key, value in values.items()}


def _rows(found: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A table of all scores so far: those of all sources, and of each one where there are several."""
    columns = [field.name for field in fields(HeldOutScores) if field.name != "by_source"]
    return [
        {"when": when, "source": source, **{column: own.get(column) for column in columns}}
        for when, scores in found.items()
        for source, own in {"all": scores, **_several(scores.get("by_source", {}))}.items()
    ]


def _several(by_source: Mapping[str, Any]) -> Mapping[str, Any]:
    return by_source if len(by_source) > 1 else {}


def _line(scores: HeldOutScores) -> str:
    parts = [f"loss {scores.loss:.3f}", f"exact {scores.exact_match:.1%}", f"F1 {scores.token_f1:.1%}"]
    if scores.choice_accuracy is not None:
        parts.append(f"choice {scores.choice_accuracy:.1%} (chance {scores.choice_chance:.0%})")
    return ", ".join(parts)


def _load(trainer: L.Trainer) -> dict[str, Any]:
    file = Path(trainer.default_root_dir) / FILE
    return json.loads(file.read_text()) if file.exists() else {}


def _kept(file: Path, when: str) -> list[str]:
    """Lines of answers of other times."""
    lines = file.read_text(encoding="utf-8").split("\n") if file.exists() else []  # answers may hold other breaks
    return [line for line in lines if line and json.loads(line)["when"] != when]
