"""Lightning's Trainer: precision and devices as the machine and the launcher have them, and an end in order."""

from __future__ import annotations

from typing import Any, Literal

import lightning.pytorch as L
import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.precision.precision import _PRECISION_INPUT
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.plugins import _PLUGIN_INPUT, CheckpointIO
from lightning.pytorch.plugins import Precision as PrecisionPlugin
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector

from lit_vlm.core.launcher import launch
from lit_vlm.core.precision import AUTO, Precision, choose
from lit_vlm.data import VLMData
from lit_vlm.training.elastic import move
from lit_vlm.training.launched import Devices, environment, spread
from lit_vlm.training.leaving import Leaving
from lit_vlm.training.module import LitVLM
from lit_vlm.training.saving import SaveFailed, WholeFiles

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
        leaving: whether the run was asked to leave.
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
        self.leaving = Leaving()
        self._signal_connector = NoSignals(self)
        fit_loop = FitLoop(self, self.fit_loop.min_epochs, self.fit_loop.max_epochs)
        fit_loop.epoch_loop = EpochLoop(self, self.fit_loop.min_steps, self.fit_loop.max_steps)
        self.fit_loop = fit_loop
        if not any(isinstance(plugin, CheckpointIO) for plugin in given):
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


class FitLoop(_FitLoop):
    """Lightning's loop over epochs, which also ends a run whose last step was saved, and whose end was then cut off.

    Lightning returns at once where all steps are taken, so that what callbacks do at the end, such as scoring, would
    never be done. Averages of weights begin when a checkpoint was read and nothing is trained, and are used before any
    callback acts on the end; no hook of a module is called at these times.
    """

    def run(self) -> None:
        """Train, or where the checkpoint holds the last step, do what comes behind it."""
        self.setup_data()
        if self.trainer.global_step and self.trainer.limit_train_batches and self.done:
            self.on_run_start()
            self.on_run_end()
        else:
            super().run()

    def on_run_start(self) -> None:
        """Begin to average weights, where the stage does so."""
        module = self.trainer.lightning_module
        if isinstance(module, LitVLM):
            module.begin_average()
        super().on_run_start()

    def on_run_end(self) -> None:
        """Give the model the averaged weights, where there are some, for scoring and the last checkpoint."""
        module = self.trainer.lightning_module
        if isinstance(module, LitVLM):
            module.end_average()
        super().on_run_end()


class EpochLoop(_TrainingEpochLoop):
    """Lightning's loop over the batches of an epoch, whose processes leave together between two optimizer steps.

    Lightning has rank 0 tell the others before each batch whether it was asked to terminate, and reads the answer at
    once, so that every process waits until its device has nothing left to do; and it saves wherever a signal finds it.
    """

    _batches_then: int | float | None = None

    def on_save_checkpoint(self) -> dict[str, Any]:
        """Lightning's state, and the micro-batches of an epoch, which its counters count."""
        return super().on_save_checkpoint() | {"num_training_batches": self.trainer.num_training_batches}

    def on_load_checkpoint(self, state_dict: dict[str, Any]) -> None:
        """Go on from the state of `on_save_checkpoint`."""
        super().on_load_checkpoint(state_dict)
        self._batches_then = state_dict.get("num_training_batches")

    def reset(self) -> None:
        """Begin an epoch; before the first of a run that goes on, its counters are translated (`move`).

        Raises:
            ValueError: as `move`.
        """
        data = getattr(self.trainer, "datamodule", None)
        if self._batches_then is not None and isinstance(data, VLMData) and data.moved is not None:
            move(self.batch_progress, data.moved, self._batches_then, self.trainer.num_training_batches)
        self._batches_then = None
        super().reset()

    def advance(self, data_fetcher: Any) -> None:
        """Train on a batch, or leave in front of it; with several processes, `_broadcast_sigterm_tensor` looks."""
        if _trainer(self).world_size == 1:
            self._leave_if_asked()
        super().advance(data_fetcher)

    def _broadcast_sigterm_tensor(self) -> None:
        """What Lightning calls in front of each batch with several processes, on all of them."""
        self._leave_if_asked()

    def _leave_if_asked(self) -> None:
        """Leave where no gradients wait for more micro-batches.

        Raises:
            Preempted: on all processes at the same batch.
        """
        trainer = _trainer(self)
        asked = trainer.leaving.agreed(trainer.world_size, trainer.strategy.root_device)
        if asked and self._accumulated_batches_reached():
            trainer.leaving.leave()


class NoSignals(_SignalConnector):
    """Lightning's handlers of signals, of which none is wanted: `callbacks.Preemption` handles them.

    Lightning's own save in the middle of a step, broadcast inside a handler, and go into loader processes.
    """

    def register_signal_handlers(self) -> None:
        """Register none."""


def _trainer(loop: EpochLoop) -> Trainer:
    trainer = loop.trainer
    assert isinstance(trainer, Trainer)
    return trainer


def device_type(accelerator: Any) -> str:
    """The type of torch device that an accelerator stands for."""
    if accelerator in CUDA and torch.cuda.is_available():
        return "cuda"
    if accelerator == "auto":
        return "mps" if torch.backends.mps.is_available() else "cpu"
    return str(accelerator)
