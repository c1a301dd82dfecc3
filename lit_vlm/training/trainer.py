"""Lightning's Trainer, with a precision that is chosen for the device."""

from __future__ import annotations

import contextlib
from typing import Any, Literal

import lightning.pytorch as L
import torch
from lightning.fabric.plugins.precision.precision import _PRECISION_INPUT
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.plugins import Precision as PrecisionPlugin
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lit_vlm.core.precision import AUTO, Precision, choose
from lit_vlm.core.transfer import Fetched, send_numbers
from lit_vlm.training.saving import SaveFailed, WholeFiles

CUDA = ("auto", "gpu", "cuda")
"""Names of Lightning's accelerators that mean an NVIDIA GPU where there is one."""


class Trainer(L.Trainer):
    """Lightning's Trainer.

    Args:
        precision: `auto` takes what the device does fast: bf16-mixed where it multiplies matrices faster in bf16 than
            in fp32, 16-mixed on cards without bf16 (not sharded), 32-true elsewhere. Any other value is Lightning's.

    Attributes:
        chosen: what `auto` has become, and why; None where a value was given.
    """

    chosen: Precision | None

    def __init__(self, *, precision: Literal["auto"] | _PRECISION_INPUT | None = AUTO, **kwargs: Any) -> None:
        self.chosen = None
        plugins = kwargs.get("plugins") or ()
        plugins = plugins if isinstance(plugins, list | tuple) else [plugins]
        if precision == "auto" and any(isinstance(plugin, PrecisionPlugin) for plugin in plugins):
            super().__init__(**kwargs)  # the plugin decides; Lightning refuses both
        elif precision == "auto":
            scaled = not isinstance(kwargs.get("strategy"), ModelParallelStrategy)
            self.chosen = choose(_device_type(kwargs.get("accelerator", "auto")), scaled)
            super().__init__(precision=self.chosen.name, **kwargs)
        else:
            super().__init__(precision=precision, **kwargs)
        self.fit_loop.epoch_loop = EpochLoop(self, self.fit_loop.min_steps, self.fit_loop.max_steps)
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            self.strategy.checkpoint_io = WholeFiles()

    def save_checkpoint(
        self, filepath: _PATH, weights_only: bool | None = None, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint, whole or not at all; all processes call this.

        Args:
            filepath: where, inside a folder that is there or whose parent is there.
            weights_only: leave out the optimizer and all that a run goes on with.
            storage_options: `saving.ASYNCHRONOUS`, which `FSDP2.save_checkpoint` explains; for single files nothing.

        Raises:
            SaveFailed: where it cannot be written, on all processes alike.
        """
        super().save_checkpoint(filepath, weights_only, storage_options)
        writer = self.strategy.checkpoint_io
        if isinstance(writer, WholeFiles):
            failure = self.strategy.broadcast(writer.failure)
            if failure is not None:
                raise SaveFailed(failure)


class EpochLoop(_TrainingEpochLoop):
    """Lightning's loop over the batches of an epoch, in which processes agree on the end without waiting.

    Before each batch rank 0 tells the others whether it was asked to terminate. Lightning reads the answer at once, so
    that every process waits until its device has nothing left to do; here it is read one batch later.
    """

    _told: Fetched | None = None

    def _broadcast_sigterm_tensor(self) -> None:
        """Exchange the flag of this batch and act on that of the batch before.

        Raises:
            SIGTERMException: on all processes at the same batch, once rank 0 was asked to terminate.
        """
        asked = float(getattr(self.trainer, "received_sigterm", False))
        flag = send_numbers([asked], self.trainer.strategy.root_device)
        torch.distributed.broadcast(flag, src=0)
        before, self._told = self._told, Fetched(flag)
        if before is not None and bool(before.get()):
            self._told = None
            with contextlib.suppress(Exception):
                torch.distributed.barrier()  # none leaves while another is still in a collective
            raise SIGTERMException


def _device_type(accelerator: Any) -> str:
    """The type of torch device that an accelerator stands for."""
    if accelerator in CUDA and torch.cuda.is_available():
        return "cuda"
    if accelerator == "auto":
        return "mps" if torch.backends.mps.is_available() else "cpu"
    return str(accelerator)
