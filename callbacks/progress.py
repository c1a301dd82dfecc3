"""Where training is, in a file that `lit-vlm status` reads."""

from __future__ import annotations

import logging
import math
import os
import socket
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as L

from callbacks.memory import Memory
from callbacks.throughput import Throughput
from lit_vlm.checkpoints.progress import PROGRESS_FILE, State, now
from lit_vlm.checkpoints.progress import Progress as Written
from lit_vlm.core.launcher import PREEMPTED
from lit_vlm.training.module import LitVLM

log = logging.getLogger(__name__)


class Progress(L.Callback):
    """Writes every few seconds how far training is into progress.json of the stage's folder, for `lit-vlm status`.

    Rank 0 writes what it knows without asking its device or other ranks. A file that cannot be written is warned of
    once and never ends training.

    Args:
        every: seconds between two times; a change of what training does is written at once.
    """

    def __init__(self, every: float = 10.0) -> None:
        self.every = every
        self._last = -math.inf
        self._state: State | None = None
        self._started = ""
        self._first_step = 0
        self._steps: int | None = None
        self._before = 0.0
        self._slots: dict[str, tuple[int, int]] = {}
        self._warned = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take down where training begins."""
        steps = trainer.estimated_stepping_batches
        self._steps = int(steps) if 0 <= steps < math.inf else None
        earlier = Written.read(Path(trainer.default_root_dir)) if trainer.global_step else None
        self._before = earlier.seconds if earlier is not None else 0.0
        if isinstance(pl_module, LitVLM):
            rows = pl_module.stage.summary(pl_module.vlm)
            self._slots = {row.slot: (row.trained, row.frozen) for row in rows}
        self._started, self._first_step, self._state = now(), trainer.global_step, None
        self._write(trainer, "training")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write, if it is time."""
        self._write(trainer, "training")

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Write, if it is time, while training validates."""
        if self._state is not None:
            self._write(trainer, "validating")

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Say that a checkpoint is being saved."""
        if self._state is not None:
            self._write(trainer, "saving")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say that training is over; what is saved after this ends it."""
        self._write(trainer, "finished")
        self._state = None

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Say why training ended early."""
        if not self._started:
            return
        if isinstance(exception, SystemExit) and exception.code == PREEMPTED:
            self._write(trainer, "preempted")
        else:
            text = " ".join(str(exception).split())
            self._write(trainer, "failed", f"{type(exception).__name__}: {text}"[:500].removesuffix(": "))
        self._state = None

    def _write(self, trainer: L.Trainer, state: State, error: str | None = None) -> None:
        clock = time.monotonic()
        if not trainer.is_global_zero or (state == self._state and clock - self._last < self.every):
            return
        if getattr(trainer, "fast_dev_run", False):
            return
        self._last, self._state = clock, state
        rates = [one.tokens_per_s for one in _callbacks(trainer) if isinstance(one, Throughput)]
        peaks = [one.peak for one in _callbacks(trainer) if isinstance(one, Memory) and one.peak is not None]
        written = Written(
            step=trainer.global_step,
            steps=self._steps,
            first_step=self._first_step,
            tokens_per_s=next(iter(rates), None),
            time=now(),
            started=self._started,
            host=socket.gethostname(),
            pid=os.getpid(),
            slurm_job=os.environ.get("SLURM_JOB_ID"),
            state=state,
            error=error,
            seconds_before=self._before,
            devices=int(getattr(trainer, "world_size", 1)),
            trained=sum(trained for trained, _ in self._slots.values()),
            slots=self._slots,
            peak_bytes=max(peaks, default=None),
        )
        try:
            written.write(Path(trainer.default_root_dir))
        except OSError as problem:
            if not self._warned:
                log.warning("%s cannot be written, so lit-vlm status says nothing of it: %s", PROGRESS_FILE, problem)
            self._warned = True


def _callbacks(trainer: L.Trainer) -> list[L.Callback]:
    return list(getattr(trainer, "callbacks", ()))
