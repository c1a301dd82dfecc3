"""A callback that ends a run once, named by its class path in the tests of loggers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as L


class FailsOnce(L.Callback):
    """Ends the first attempt of a run after a step, and no later one.

    Args:
        step: after which it ends.
    """

    def __init__(self, step: int = 3) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        mark = Path(trainer.default_root_dir, "failed-once")
        if trainer.global_step >= self.step and not mark.exists():
            mark.touch()
            raise RuntimeError("a cable was pulled")
