"""A benchmark on a schedule, while a stage trains."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning.pytorch as L

from lit_vlm.data import VLMData
from lit_vlm.evaluation.asker import Asker
from lit_vlm.evaluation.tasks import Prompts, Shots, Task, TaskSettings, find_task, run_task
from lit_vlm.evaluation.tasks.prompts import in_order
from lit_vlm.training.module import LitVLM


class Evaluate(L.Callback):
    """Runs a task every so many optimizer steps and at the end; scores go to the loggers as `task/NAME/K-shot/SCORE`.

    Answers and scores are written to tasks/NAME/K-shot/STEP/ of the run.

    Args:
        task: name of a task, as `lit-vlm evaluate --help` lists them, or the path of its class.
        folder: folder of the task's files, or for `file` the file itself; not needed for generated scenes.
        every_n_steps: optimizer steps between two runs of the task; None runs it at the end only.
        limit: number of examples; default: all.
        shots: demonstrations with pictures.
        batch_size: examples at a time.

    Raises:
        ValueError: for an unknown task, a missing folder, or an interval below 1.
    """

    def __init__(
        self,
        task: str,
        folder: str = ".",
        every_n_steps: int | None = None,
        limit: int | None = None,
        shots: int = 0,
        batch_size: int = 16,
    ) -> None:
        kind = find_task(task, "callbacks.Evaluate: task")
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"callbacks.Evaluate: every_n_steps is at least 1, not {every_n_steps}")
        self.task: Task = kind(folder)
        self.every_n_steps = every_n_steps
        self.settings = TaskSettings(Shots(shots), limit=limit, batch_size=batch_size)
        self._last = -1

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Read the task's files, and check that the decoder can generate, before anything is trained.

        Raises:
            ValueError: for a missing or wrong file, or a decoder that does not go on from a cache.
        """
        assert isinstance(pl_module, LitVLM)
        Prompts(self.task, self.settings.prompt)
        pl_module.vlm.new_cache()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Run the task every `every_n_steps` optimizer steps; micro-batches of one step run it once."""
        step = trainer.global_step
        if self.every_n_steps is not None and step and step % self.every_n_steps == 0 and step != self._last:
            self._run(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Run the task on the trained model, unless the last step has run it."""
        if trainer.global_step != self._last:
            self._run(trainer, pl_module)

    def _run(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        data = getattr(trainer, "datamodule", None)
        assert isinstance(module, LitVLM)
        assert isinstance(data, VLMData)
        self._last = trainer.global_step
        start = time.perf_counter()
        name = f"{self.task.name}/{self.settings.prompt.name}"
        out = Path(trainer.default_root_dir) / "tasks" / name / str(trainer.global_step)
        asker = Asker(module, data.format)
        count = len(in_order(self.task, self.settings.limit, self.settings.prompt.seed))
        trainer.print(f"{name}, step {self._last}: asking {count:,} questions ...")
        with module.averaged():
            result = run_task(asker, self.task, self.settings, out, f"step {trainer.global_step}", resume=False)
        if trainer.is_global_zero:
            main = f"{result.main} {result.scores[result.main]:.2f}"
            trainer.print(f"{name}, step {self._last}: {main} ({time.perf_counter() - start:.0f} s)")
            scores = {f"task/{name}/{score}": value for score, value in result.scores.items()}
            for logger in trainer.loggers:
                logger.log_metrics(scores, step=trainer.global_step)
