"""Gradient norms per slot, and an early end when they are not finite."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import lightning.pytorch as L
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from lit_vlm.core.batch import Batch
from lit_vlm.core.precision import SCALED
from lit_vlm.core.transfer import Fetched
from lit_vlm.training.module import LitVLM

log = logging.getLogger(__name__)


class _Step(NamedTuple):
    step: int
    norm: Fetched
    batches: list[tuple[Tensor, list[str]]]


class GradientMonitor(L.Callback):
    """Logs `grad_norm/SLOT` and `grad_norm/total`; stops on a non-finite gradient and names the samples of that step.

    A step is checked when the next one ends, or before a checkpoint is written. An immediate check would leave the
    device without work; by then a whole step is queued behind the norm that is asked for. In fp16 only a non-finite
    loss stops training, as loss scaling leaves out a step whose gradients overflow. Parameters that train but get no
    gradient are warned of once.

    Raises:
        ValueError: during training, for a non-finite loss or gradient.
    """

    def __init__(self) -> None:
        self._batches: list[tuple[Tensor, list[str]]] = []
        self._stepping: list[tuple[Tensor, list[str]]] | None = None
        self._pending: _Step | None = None
        self._warned = False

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Remember which samples a loss came from."""
        loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs
        entry = (loss.detach(), [f"{sample.source}/{sample.id}" for sample in batch.samples])
        if self._stepping is not None:
            # The optimizer has stepped within this batch, the last one of that step.
            self._stepping.append(entry)
            self._stepping = None
        else:
            self._batches.append(entry)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Log gradient norms, before clipping, and check the step before."""
        assert isinstance(pl_module, LitVLM)
        self._judge(trainer)
        if not self._warned:
            self._warn(pl_module)
        norms = {}
        for slot, parts in pl_module.vlm.slots().items():
            grads = [p.grad for part in parts for p in part.parameters() if p.grad is not None]
            if grads:
                norm = get_total_norm(grads)
                norms[slot] = norm.full_tensor() if isinstance(norm, DTensor) else norm
        total = torch.stack([norm.float() for norm in norms.values()]).norm()
        pl_module.log_dict({f"grad_norm/{slot}": norm for slot, norm in norms.items()} | {"grad_norm/total": total})
        self._pending = _Step(trainer.global_step, Fetched(total), self._batches)
        self._stepping, self._batches = self._batches, []

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Check the last step, so that no weights are saved after a non-finite gradient."""
        self._judge(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check the last step."""
        self._judge(trainer)

    def _judge(self, trainer: L.Trainer) -> None:
        pending, self._pending = self._pending, None
        if pending is None or bool(torch.isfinite(pending.norm.get())):
            return
        broken = [ids for loss, ids in pending.batches if not bool(torch.isfinite(loss))]
        if not broken and str(trainer.precision) == SCALED:
            return
        names = [name for ids in broken or [ids for _, ids in pending.batches] for name in ids]
        kind = "loss" if broken else "gradient (the losses were finite)"
        raise ValueError(
            f"non-finite {kind} at step {pending.step}; samples of that step on this rank: {', '.join(names[:32])}. "
            "Look at them with lit-vlm inspect, lower the learning rate, or clip with trainer.gradient_clip_val"
        )

    def _warn(self, module: LitVLM) -> None:
        idle = [name for name, p in module.vlm.named_parameters() if p.requires_grad and p.grad is None]
        if idle:
            log.warning("%d parameters train but got no gradient, first: %s", len(idle), ", ".join(idle[:5]))
        self._warned = True
