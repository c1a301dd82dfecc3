"""The memory that training needs at its peak."""

from __future__ import annotations

import resource
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch

from lit_vlm.core.batch import Batch
from lit_vlm.core.metric_names import ALLOCATED, HOST, RESERVED
from lit_vlm.core.transfer import send_numbers

GIB = 2**30


class Memory(L.Callback):
    """Logs the peaks of memory since the last time, in GiB, of the rank that has most, each `log_every_n_steps`:

    - on a GPU `memory/allocated` (tensors) and `memory/reserved` (what PyTorch holds for them);
    - without one `memory/host`, the resident memory of the process, without its loader workers.

    Peaks count from the first step: what loading the model took before is not in them. They travel to rank 0 on the
    device, together with what else is logged, so no process waits for them.

    Attributes:
        peak: bytes at this process's own highest peak so far; None before.
    """  # noqa: D415

    peak: int | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin to count."""
        _reset(pl_module.device)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Log each `log_every_n_steps`."""
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if not stepped or trainer.global_step % int(getattr(trainer, "log_every_n_steps", 1)):
            return
        peaks = _peaks(pl_module.device)
        self.peak = max(self.peak or 0, *peaks.values())
        values = send_numbers([size / GIB for size in peaks.values()], pl_module.device)
        values = trainer.strategy.reduce(values, reduce_op="max")
        pl_module.log_dict(dict(zip(peaks, values.unbind(), strict=True)))
        _reset(pl_module.device)


def _peaks(device: torch.device) -> dict[str, int]:
    """Bytes at the peak since `_reset`, by name of the metric."""
    if device.type == "cuda":
        return {
            ALLOCATED: torch.cuda.max_memory_allocated(device),
            RESERVED: torch.cuda.max_memory_reserved(device),
        }
    return {HOST: _resident()}


def _resident() -> int:
    """Bytes of resident memory at the peak; elsewhere than on Linux since the start of the process."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _reset(device: torch.device) -> None:
    """Let peaks count from here."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):  # not Linux, or not allowed: the peak counts from the start of the process
        Path("/proc/self/clear_refs").write_text("5")
