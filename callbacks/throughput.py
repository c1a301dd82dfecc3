"""Throughput of training, and the share of time that it waits for data."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from typing import Any, TypeVar

import lightning.pytorch as L
import torch

from lit_vlm.core.batch import Batch, Counts
from lit_vlm.core.devices import card_of
from lit_vlm.core.transfer import on_host
from lit_vlm.training.module import LitVLM
from lit_vlm.training.step_flops import StepFlops

T = TypeVar("T")
log = logging.getLogger(__name__)


class Throughput(L.Callback):
    """Logs, over all devices and each `log_every_n_steps`:

    - `throughput/tokens_per_s` (without padding), `samples_per_s`, `images_per_s`;
    - `throughput/supervised`: share of tokens that carry a loss;
    - `throughput/fill`: share of positions that are not padding;
    - `throughput/data_wait`: share of the time spent waiting for the loader;
    - `throughput/mfu`: model FLOPs (`lit_vlm.core.flops`) over the peak of the device, where that is known.

    Args:
        peak: peak FLOP/s of one device in the precision used; default: that of a known device.

    Attributes:
        tokens_per_s: what was logged last; None before.
    """  # noqa: D415

    tokens_per_s: float | None = None

    def __init__(self, peak: float | None = None) -> None:
        self.peak = peak
        self._counts = Counts()
        self._peak: float | None = None
        self._count: StepFlops | None = None
        self._flops = 0.0
        self._wait = 0.0
        self._mark = 0.0
        self._start = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prepare to count model FLOPs, if the peak of the device is known."""
        assert isinstance(pl_module, LitVLM)
        self._peak = self.peak or known_peak(pl_module.device)
        if self._peak:
            self._count = _attempt(lambda: StepFlops(pl_module.vlm, pl_module.slots, pl_module.stage.losses))

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._reset()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Add up the time that was spent waiting for this batch."""
        self._wait += time.perf_counter() - self._mark

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Count the batch, and log each `log_every_n_steps`."""
        assert isinstance(pl_module, LitVLM)
        self._counts = self._counts + batch.counts
        if (count := self._count) is not None:
            operations = _attempt(lambda: count(batch))
            self._flops += math.nan if operations is None else operations
            self._count = None if operations is None else count
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if stepped and trainer.global_step % int(getattr(trainer, "log_every_n_steps", 1)) == 0:
            self._log(trainer, pl_module)
            self._reset()
        self._mark = time.perf_counter()

    def _reset(self) -> None:
        self._counts, self._wait = Counts(), 0.0
        self._flops = 0.0 if self._count is not None else math.nan
        self._start = self._mark = time.perf_counter()

    def _log(self, trainer: L.Trainer, module: LitVLM) -> None:
        if module.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self._start
        local = torch.tensor([*self._counts, self._flops], dtype=torch.float32, device=module.device)
        *values, flops = trainer.strategy.reduce(local, reduce_op="sum").tolist()
        counts = dict(zip(Counts._fields, values, strict=True))
        metrics = {
            "tokens_per_s": counts["tokens"] / seconds,
            "samples_per_s": counts["samples"] / seconds,
            "images_per_s": counts["images"] / seconds,
            "supervised": counts["supervised"] / max(1.0, counts["tokens"]),
            "fill": counts["tokens"] / max(1.0, counts["positions"]),
            "data_wait": self._wait / seconds,
        }
        if self._peak and not math.isnan(flops):
            metrics["mfu"] = flops / seconds / (self._peak * trainer.world_size)
        self.tokens_per_s = metrics["tokens_per_s"]
        module.log_dict(on_host({f"throughput/{name}": value for name, value in metrics.items()}))


def _attempt(work: Callable[[], T]) -> T | None:
    """The result of `work`; None, with a warning, where it fails, as a mere report must not end training."""
    try:
        return work()
    except Exception as error:
        log.warning(
            "throughput/mfu is left out: a part does not run on the meta device, where its operations are counted "
            "(%s: %s)",
            type(error).__name__,
            str(error).partition("\n")[0],
        )
        return None


def known_peak(device: torch.device) -> float | None:
    """Peak FLOP/s of a device; None for unknown GPUs, slices of a GPU (MIG) and devices other than GPUs."""
    card = card_of(device)
    return card.flops if card is not None else None
