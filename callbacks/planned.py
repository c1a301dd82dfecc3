"""What a stage was planned to take, beside what it takes."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console

from lit_vlm.checkpoints.folder import PLAN_FILE
from lit_vlm.core.batch import Batch
from lit_vlm.core.transfer import send_numbers

GIB = 2**30


class Planned(L.Callback):
    """Logs, where `lit-vlm run` planned the stage, each `log_every_n_steps`:

    - `planned/allocated`, `planned/reserved`: the plan's peaks of memory in GiB, beside `memory/allocated` and
      `memory/reserved`;
    - `planned/step_seconds` beside `throughput/step_seconds`: an optimizer step, waiting for data included.

    At the end it prints both. Without a plan it does nothing. In the list of callbacks it stands in front of `Memory`,
    which begins to count the peak anew each time it has logged it.
    """  # noqa: D415

    def __init__(self) -> None:
        self._plan: dict[str, Any] | None = None
        self._mark = 0.0
        self._since = 0
        self._seconds = 0.0
        self._steps = 0
        self._peak = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look for a plan."""
        file = Path(trainer.default_root_dir) / PLAN_FILE
        self._plan = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
        self._mark, self._since = time.perf_counter(), trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Log both, each `log_every_n_steps`."""
        steps = trainer.global_step - self._since
        every = int(getattr(trainer, "log_every_n_steps", 1))
        if self._plan is None or not steps or trainer.global_step % every:
            return
        now = time.perf_counter()
        seconds, self._mark, self._since = (now - self._mark) / steps, now, trainer.global_step
        self._seconds, self._steps = self._seconds + seconds * steps, self._steps + steps
        if pl_module.device.type == "cuda":
            self._peak = max(self._peak, torch.cuda.max_memory_allocated(pl_module.device))
        memory = self._plan["memory_gib"]
        values = {
            "planned/allocated": memory["peak"],
            "planned/reserved": memory["reserved"],
            "planned/step_seconds": self._plan["seconds"]["step"],
            "throughput/step_seconds": seconds,
        }
        sent = send_numbers(values.values(), pl_module.device)
        pl_module.log_dict(dict(zip(values, sent.unbind(), strict=True)))

    @rank_zero_only
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print both."""
        if self._plan is None or not self._steps:
            return
        memory, step = self._plan["memory_gib"], self._plan["seconds"]["step"]
        peak = f"peak {memory['peak']:.1f} GiB planned, {self._peak / GIB:.1f} met; " if self._peak else ""
        Console(highlight=False, soft_wrap=True).print(
            f"{peak}{step:.2f} s per step planned, {self._seconds / self._steps:.2f} met"
        )
