"""The callback that measures planned steps."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import lightning.pytorch as L
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lit_vlm.core.batch import ENCODER, Batch
from lit_vlm.data import VLMData
from lit_vlm.heads import Head
from lit_vlm.planning import no_gpu
from lit_vlm.planning.batches import Chosen
from lit_vlm.planning.job import RECORDED, Job, Measured, States
from lit_vlm.planning.operations import Recorder
from lit_vlm.planning.sizes import (
    batch_bytes_of,
    device_bytes,
    expected_states,
    loading_bytes,
    saved_bytes,
    weights_of,
    whole_bytes,
)
from lit_vlm.teachers import EncoderTeacher
from lit_vlm.training.module import LitVLM
from lit_vlm.training.sharding import FSDP2
from lit_vlm.training.step_flops import StepFlops
from lit_vlm.training.waits import Waits


class Settings(NamedTuple):
    """Settings of a stage, as `Measured` reports them."""

    batch_size: int
    accumulate: int
    epochs: int | None
    max_steps: int | None
    records: int | None
    workers: int

    @staticmethod
    def of(data: VLMData, trainer: L.Trainer, records: int | None) -> Settings:
        """Read them before the trainer is told to take a few steps."""
        steps = trainer.max_steps if trainer.max_steps >= 0 else None
        epochs = trainer.max_epochs if steps is None else None
        return Settings(data.batch_size, trainer.accumulate_grad_batches, epochs, steps, records, data.num_workers)


class Probe(L.Callback):
    """Measures the steps.

    Args:
        job: what is asked for.
        micro: micro-batches of a step.
    """

    def __init__(self, job: Job, micro: int) -> None:
        self.job, self.micro = job, micro
        self.recorder: Recorder | None = None
        self.waits = Waits()
        self.states = States()
        self.seconds: list[float] = []
        self._waiting = False
        self._start = 0.0

    def _ends(self, batch_idx: int, step: int) -> bool:
        return batch_idx == (step + 1) * self.micro - 1

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin to record, in the last micro-batch of the step that is recorded."""
        if batch_idx == self.micro:
            torch.cuda.reset_peak_memory_stats()
        if self.job.record and self._ends(batch_idx, RECORDED):
            self.recorder = Recorder(self.job.per_node)
            self.recorder.__enter__()
        if batch_idx % self.micro == 0:
            self._start = time.perf_counter()

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Look at the gradients."""
        if self.recorder is not None:
            self.recorder.stepping = True
        self.states.gradients = device_bytes(p.grad for p in pl_module.parameters() if p.grad is not None)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """End the recording; look at all that stays."""
        if self.job.record and self._ends(batch_idx, RECORDED) and self.recorder is not None:
            self.recorder.__exit__(None, None, None)
        if self._ends(batch_idx, RECORDED):
            self._stop_waits()
        if self._ends(batch_idx, 0) and self.job.waits:
            self._waiting = True
            self.waits.__enter__()
        if (batch_idx + 1) % self.micro == 0:
            torch.cuda.synchronize()
            self.seconds.append(time.perf_counter() - self._start)
        self.states.optimizer = device_bytes(_running_averages(trainer))
        self.states.weights = device_bytes(weights_of(pl_module))

    def _stop_waits(self) -> None:
        if self._waiting:
            self.waits.__exit__(None, None, None)
            self._waiting = False

    def measured(self, module: LitVLM, chosen: Chosen, settings: Settings) -> Measured:
        """All that was measured."""
        trainer, model = module.trainer, module.vlm
        sharded = isinstance(trainer.strategy, FSDP2)
        weights = whole_bytes(model.state_dict().values())
        blocks = [block for parts in model.slots().values() for part in parts for block in part.blocks()]
        recorder = self.recorder or Recorder(self.job.per_node)
        return Measured(
            states=self.states,
            expected_states=expected_states(module, self.job, sharded),
            peak=torch.cuda.max_memory_allocated(),
            reserved=torch.cuda.max_memory_reserved(),
            typical=chosen.typical.counts,
            heaviest=chosen.heaviest.counts,
            mean=chosen.mean,
            micro_batches=chosen.per_epoch,
            model_flops=StepFlops(model, module.slots, module.stage.losses)(chosen.typical),
            operations=recorder.operations,
            messages=recorder.messages,
            batch_size=settings.batch_size,
            accumulate=settings.accumulate,
            epochs=settings.epochs,
            max_steps=settings.max_steps,
            records=settings.records,
            strategy=type(trainer.strategy).__name__,
            recompute=bool(model.decoder.recompute),
            frozen_full=module.stage.frozen_dtype == "full" and module.trainer.precision != "32-true",
            preparable=_preparable(module, self.job),
            checkpoint=saved_bytes(trainer) if sharded else weights + whole_bytes(_running_averages(trainer)),
            weights_file=weights,
            host_loading=loading_bytes(model),
            batch_bytes=batch_bytes_of(chosen.heaviest),
            record_bytes=chosen.record_bytes,
            workers=settings.workers,
            slots=[(row.slot, row.part, row.trained, row.frozen) for row in module.stage.summary(model)],
            blocks=len(blocks) + 1 if sharded else 0,
            unsharded=[n for n, p in model.named_parameters() if not isinstance(p, DTensor)] if sharded else [],
            precision=str(trainer.precision),
            mixed=dict(recorder.mixed),
            waits=self.waits.unwanted(),
            seconds=[] if no_gpu.loaded() or self.job.record else self.seconds,
        )


def _running_averages(trainer: L.Trainer) -> list[Tensor]:
    """What optimizer and stage average, gradients and weights: one tensor for each of a parameter's."""
    states = trainer.optimizers[0].state.values()
    found = [value for state in states for value in state.values() if isinstance(value, Tensor)]
    module = trainer.lightning_module
    if isinstance(module, LitVLM) and module.average is not None:
        found += module.average.tensors
    return found


def _preparable(module: LitVLM, job: Job) -> list[str]:
    """Networks whose features could be prepared before training, and are not."""
    names = [ENCODER] if module.vlm.encoder.frozen() and any(True for _ in module.vlm.encoder.parameters()) else []
    for name, head in module.vlm.heads.items():
        if isinstance(head, Head) and isinstance(head.teacher, EncoderTeacher) and module.stage.losses.get(name):
            names.append(name)
    return [name for name in names if name not in job.prepared]
