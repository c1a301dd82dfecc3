"""A look into a step behind the measured ones, which looking would slow down."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from torch.profiler import ProfilerActivity, profile

from lit_vlm.core.batch import Batch, Counts
from lit_vlm.planning import no_gpu
from lit_vlm.planning.bench.job import WARMUP, BenchJob
from lit_vlm.planning.operations import Recorder


class Look(L.Callback):
    """Looks into a step behind the measured ones: its kernels and operations; and traces another one if asked for.

    Args:
        job: what is asked for.
        trainer: the trainer. Without a GPU there are no kernels to look at, and a step is only traced.

    Attributes:
        steps: that this takes.
        recorder: operations of the last micro-batch of a step, and of its optimizer step.
        counts: what that micro-batch holds.
        events: what `torch.profiler` says of it.
    """

    def __init__(self, job: BenchJob, trainer: L.Trainer) -> None:
        self._cuda = trainer.strategy.root_device.type == "cuda"
        self._trace = Path(job.profile) if job.profile else None
        self._look_at = WARMUP + job.steps if self._cuda else -1
        self._trace_at = WARMUP + job.steps + int(self._cuda) if self._trace else -1
        self.steps = int(self._cuda) + int(self._trace is not None)
        self.recorder = Recorder(per_node(trainer))
        self.counts = Counts()
        self.events: list[Any] = []
        self._profile: profile | None = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Begin to look, in the last micro-batch of a step; to trace, in the first."""
        if trainer.global_step == self._look_at and _is_last(trainer, batch_idx):
            self.counts = batch.counts
            self._start()
            self.recorder.__enter__()
        elif trainer.global_step == self._trace_at and self._profile is None:
            self._start()

    def _start(self) -> None:
        kernels = self._cuda and not no_gpu.loaded()  # a simulated device runs none, and has nothing that reports them
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if kernels else [])]
        self._profile = profile(activities=activities)
        self._profile.__enter__()

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        """Tell the recorder."""
        self.recorder.stepping = True

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Stop where the step has ended."""
        if self._profile is None or not _is_last(trainer, batch_idx):
            return
        step = trainer.global_step - 1  # the one that has just ended
        if step == self._look_at:
            self.recorder.__exit__(None, None, None)
        if self._cuda:
            torch.cuda.synchronize()
        self._profile.__exit__(None, None, None)
        if step == self._look_at:
            self.events = list(self._profile.events() or ())
        elif self._trace is not None and trainer.global_rank == 0:
            self._trace.parent.mkdir(parents=True, exist_ok=True)
            self._profile.export_chrome_trace(str(self._trace))
        self._profile = None

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Stop looking: a process that ends while its kernels are still recorded crashes."""
        if self._profile is not None:
            self._profile.__exit__(None, None, None)
            self._profile = None


def _is_last(trainer: L.Trainer, batch_idx: int) -> bool:
    """Whether a micro-batch ends an optimizer step."""
    accumulate = trainer.accumulate_grad_batches
    return (batch_idx + 1) % accumulate == 0 or batch_idx + 1 == trainer.num_training_batches


def per_node(trainer: L.Trainer) -> int:
    """Processes of one machine."""
    return max(1, trainer.world_size // max(1, trainer.num_nodes))
