"""Checkpoints that a killed run can be resumed from."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as L
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_vlm.training.module import LitVLM


class Checkpoint(ModelCheckpoint):
    """Saves every so many steps and at the end, under `checkpoints/` of the run's folder.

    The old file is removed only when the new one is complete, so a run that is killed at any moment can be resumed.

    Args:
        every_n_steps: optimizer steps between two checkpoints.
        keep: 1 keeps the newest, -1 keeps all.
        weights_only: leave out the optimizer: smaller, but the run cannot be resumed from it.
        only_trained: leave out frozen weights, which are read again from where they came from: pretrained ones, or the
            checkpoint that the stage started from, which must stay. Null: where a slot has adapters.
    """

    def __init__(
        self,
        every_n_steps: int = 500,
        keep: int = 1,
        weights_only: bool = False,
        only_trained: bool | None = None,
    ) -> None:
        self.only_trained = only_trained
        super().__init__(
            filename="{step:08d}",
            save_top_k=keep,
            every_n_train_steps=every_n_steps,
            save_weights_only=weights_only,
        )

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Put the files into the folder of the run, whatever the logger, and tell the module what goes into them."""
        if isinstance(pl_module, LitVLM):
            pl_module.only_trained = self.only_trained
        self.dirpath = str(Path(trainer.default_root_dir) / "checkpoints")
        super().setup(trainer, pl_module, stage)

    def save_now(self, trainer: L.Trainer) -> None:
        """Save the state between two steps, unless it is saved already; on all processes together."""
        if self._last_global_step_saved != trainer.global_step and not getattr(trainer, "fast_dev_run", False):
            self._save_none_monitor_checkpoint(trainer, self._monitor_candidates(trainer))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the last checkpoint, which the next stage starts from."""
        super().on_train_end(trainer, pl_module)
        self.save_now(trainer)
