"""The measured steps of a stage: weights that are drawn on the device, and a clock at Lightning's hooks."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

import lightning.pytorch as L
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lit_vlm.core.batch import Batch, Counts
from lit_vlm.core.part import empty_parameters
from lit_vlm.heads import Head
from lit_vlm.model.vlm import VLM
from lit_vlm.planning.step import Weightless
from lit_vlm.teachers import EncoderTeacher
from lit_vlm.training.module import LitVLM
from lit_vlm.training.sharding import FSDP2
from lit_vlm.training.step_flops import StepFlops

PHASES = ("data", "copy", "forward", "backward", "optimizer", "other")
"""Parts of a step: waiting for the loader, moving the batch, the two passes, clipping and updating, all else."""
STD = 0.02
"""Standard deviation of drawn matrices."""


@torch.no_grad()
def draw(parameters: Iterable[Tensor]) -> None:
    """Give parameters values, where they are: small normals for matrices, ones for vectors, of this process's shards.

    A step takes the same time with any finite values. Quantised weights stay as they are.
    """
    torch.manual_seed(0)
    for parameter in parameters:
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if type(local) in (Tensor, nn.Parameter) and local.is_floating_point():
            local.normal_(std=STD) if parameter.ndim > 1 else local.fill_(1.0)


class Timed(Weightless):
    """The module of a stage with drawn weights, which tells a clock where a step is.

    Attributes:
        clock: set before training begins.
    """

    clock: Clock

    def build(self, only: Collection[str] | None = None) -> VLM:
        """The architecture; parameters stay on the meta device where sharding gives them memory."""
        model = super().build(only)
        if not isinstance(self.trainer.strategy, FSDP2):
            empty_parameters(model, self.trainer.strategy.root_device)
        return model

    def configure_model(self) -> None:
        """Build the model, once, and draw its weights; raises as `LitVLM.configure_model`."""
        if self.model is None:
            super().configure_model()
            draw(self.vlm.parameters())

    def load_teachers(self, model: VLM, names: Collection[str], dtype: torch.dtype | None) -> None:
        """Draw the teachers' weights on the device."""
        super().load_teachers(model, names, dtype)
        for name in names:
            head = model.heads[name]
            if isinstance(head, Head) and isinstance(head.teacher, EncoderTeacher):
                draw(head.teacher.encoder.to(self.trainer.strategy.root_device).parameters())

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """The loader has given a batch."""
        self.clock.mark("copy")
        return batch

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """The batch is on its way to the device."""
        self.clock.mark("other")
        return batch

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """A forward pass between two marks."""
        self.clock.mark("forward")
        loss = super().training_step(batch, batch_idx)
        self.clock.mark("other")
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """An optimizer step, whose closure is forward and backward pass, and a mark behind it."""
        super().optimizer_step(*args, **kwargs)
        self.clock.mark("other")

    def on_fit_end(self) -> None:
        """Let go of weights and optimizer states, which Lightning would copy to the host now."""
        self.model = None
        for optimizer in self.trainer.optimizers:
            optimizer.state.clear()


class Mark(NamedTuple):
    """A moment of a run.

    Attributes:
        phase: what begins.
        step: number of optimizer steps before it.
        time: on a GPU an event in its stream, else seconds.
    """

    phase: str
    step: int
    time: Any


class Clock(L.Callback):
    """Measures steps: those behind the warm-up, from a synchronised start to a synchronised end.

    On a GPU the marks are events in the stream of the computation, so a phase is the time that the device spends
    between two marks: it waits for the host or the loader only where it had nothing left to do.

    Args:
        warmup: steps that are not measured.
        steps: measured steps.
        tell: called with 1 for each step.

    Attributes:
        seconds: of all measured steps.
        counts: of all measured micro-batches of this process.
        flops: model FLOPs of them; not a number where they are not counted, as on a processor, whose time it would
            take.
        allocated: most bytes that the allocator gave out; 0 without a GPU.
        reserved: most bytes that it reserved.
        device_used: bytes of the device that are in use at the end, by all processes.
        device_bytes: its size.
    """

    def __init__(self, warmup: int, steps: int, tell: Callable[[int], None]) -> None:
        self.warmup, self.steps, self.tell = warmup, steps, tell
        self._count: Callable[[Batch], float] | None = None
        self.seconds = 0.0
        self.counts = Counts()
        self.flops = 0.0
        self.allocated = self.reserved = self.device_used = self.device_bytes = 0
        self._marks: list[Mark] = []
        self._step = 0
        self._measuring = False
        self._cuda = False
        self._start = 0.0

    def mark(self, phase: str) -> None:
        """A phase begins."""
        if self._measuring:
            self._marks.append(Mark(phase, self._step, self._now()))

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find out what device it is, and prepare to count model FLOPs."""
        assert isinstance(pl_module, LitVLM)
        self._cuda = pl_module.device.type == "cuda"
        if self._cuda:
            self._count = StepFlops(pl_module.vlm, pl_module.slots, pl_module.stage.losses)

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """The backward pass begins."""
        self.mark("backward")

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The backward pass has ended."""
        self.mark("other")

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Clipping and the optimizer begin."""
        self.mark("optimizer")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Count the batch; begin or end the measurement where a step has ended."""
        if self._measuring:
            self.counts = self.counts + batch.counts
            self.flops += self._count(batch) if self._count is not None else math.nan
        if self._step < trainer.global_step <= self.warmup + self.steps:
            self.tell(1)
        self._step = trainer.global_step
        if not self._measuring and self._step == self.warmup and not self._marks:
            self._begin()
        self.mark("data")
        if self._measuring and self._step == self.warmup + self.steps:
            self._end()

    def _begin(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self._start, self._measuring = time.perf_counter(), True

    def _end(self) -> None:
        self._measuring = False
        if self._cuda:
            torch.cuda.synchronize()
            self.allocated, self.reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
            free, total = torch.cuda.mem_get_info()
            self.device_used, self.device_bytes = total - free, total
        self.seconds = time.perf_counter() - self._start

    def phases(self) -> dict[str, list[float]]:
        """Phase → its seconds in each measured step."""
        found = {phase: [0.0] * self.steps for phase in PHASES}
        for mark, following in zip(self._marks, self._marks[1:], strict=False):
            found[mark.phase][mark.step - self.warmup] += _between(mark.time, following.time)
        return found


def _between(start: Any, end: Any) -> float:
    """Seconds between two marks."""
    return start.elapsed_time(end) / 1000 if isinstance(start, torch.cuda.Event) else end - start
