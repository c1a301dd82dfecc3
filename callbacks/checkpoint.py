"""Checkpoints that a killed run can be resumed from."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as L
from lightning.pytorch.callbacks import ModelCheckpoint


class Checkpoint(ModelCheckpoint):
    """Saves every so many steps and at the end, under `checkpoints/` of the run's folder.

    The old file is removed only when the new one is complete, so a run that is killed at any moment can be resumed.

    Args:
        every_n_steps: optimizer steps between two checkpoints.
        keep: 1 keeps the newest, -1 keeps all.
        weights_only: leave out the optimizer: smaller, but the run cannot be resumed from it.
    """

    def __init__(self, every_n_steps: int = 500, keep: int = 1, weights_only: bool = False) -> None:
        super().__init__(
            filename="{step:08d}",
            save_top_k=keep,
            every_n_train_steps=every_n_steps,
            save_weights_only=weights_only,
        )

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Put the files into the folder of the run, whatever the logger."""
        self.dirpath = str(Path(trainer.default_root_dir) / "checkpoints")
        super().setup(trainer, pl_module, stage)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the last checkpoint, which the next stage starts from."""
        super().on_train_end(trainer, pl_module)
        if self._last_global_step_saved != trainer.global_step and not getattr(trainer, "fast_dev_run", False):
            self._save_none_monitor_checkpoint(trainer, self._monitor_candidates(trainer))
