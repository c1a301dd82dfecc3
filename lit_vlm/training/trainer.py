"""Lightning's Trainer, with a precision that is chosen for the device, and as many devices as were started for."""

from __future__ import annotations

import contextlib
from typing import Any, Literal

import lightning.pytorch as L
import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.precision.precision import _PRECISION_INPUT
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.plugins import _PLUGIN_INPUT
from lightning.pytorch.plugins import Precision as PrecisionPlugin
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lit_vlm.core.launcher import launch
from lit_vlm.core.precision import AUTO, Precision, choose
from lit_vlm.core.transfer import Fetched, send_numbers
from lit_vlm.training.launched import Devices, environment, spread

CUDA = ("auto", "gpu", "cuda")
"""Names of Lightning's accelerators that mean an NVIDIA GPU where there is one."""


class Trainer(L.Trainer):
    """Lightning's Trainer.

    Args:
        devices: number of devices of each machine, or their numbers. `auto`: as many as the processes that a launcher
            has started there, else all.
        num_nodes: number of machines. `auto`: as many as those that a launcher has started processes on, else 1.
        plugins: Lightning's; a cluster environment among them decides who starts the processes.
        precision: `auto` takes what the device does fast: bf16-mixed where it multiplies matrices faster in bf16 than
            in fp32, 16-mixed on cards without bf16 (not sharded), 32-true elsewhere. Any other value is Lightning's.

    Attributes:
        chosen: what `auto` has become, and why; None where a value was given.
    """

    chosen: Precision | None

    def __init__(
        self,
        *,
        devices: Devices = "auto",
        num_nodes: int | Literal["auto"] = "auto",
        plugins: _PLUGIN_INPUT | list[_PLUGIN_INPUT] | None = None,
        precision: Literal["auto"] | _PRECISION_INPUT | None = AUTO,
        **kwargs: Any,
    ) -> None:
        self.chosen = None
        started = launch()
        devices, nodes = spread(devices, num_nodes, started)
        given = list(plugins) if isinstance(plugins, list | tuple) else [plugins] if plugins is not None else []
        known = getattr(kwargs.get("strategy"), "cluster_environment", None)
        if known is None and not any(isinstance(plugin, ClusterEnvironment) for plugin in given):
            given.append(environment(started))
        if precision == "auto" and any(isinstance(plugin, PrecisionPlugin) for plugin in given):
            precision = None  # the plugin decides; Lightning refuses both
        elif precision == "auto":
            scaled = not isinstance(kwargs.get("strategy"), ModelParallelStrategy)
            self.chosen = choose(device_type(kwargs.get("accelerator", "auto")), scaled)
            precision = self.chosen.name
        super().__init__(devices=devices, num_nodes=nodes, plugins=given, precision=precision, **kwargs)
        self.fit_loop.epoch_loop = EpochLoop(self, self.fit_loop.min_steps, self.fit_loop.max_steps)


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


def device_type(accelerator: Any) -> str:
    """The type of torch device that an accelerator stands for."""
    if accelerator in CUDA and torch.cuda.is_available():
        return "cuda"
    if accelerator == "auto":
        return "mps" if torch.backends.mps.is_available() else "cpu"
    return str(accelerator)
