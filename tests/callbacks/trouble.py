"""Callbacks that make trouble on one rank of a run, named by their class paths in the tests of the watchdog."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as L

from lit_vlm.training.module import LitVLM


class Trouble(L.Callback):
    """Does something to one rank when a batch has ended.

    Args:
        rank: that it happens to.
        what: `kill`, `stop` (SIGSTOP), `sleep`, `fail`, `slow` (its first block takes longer in every
            forward pass), or `nothing`.
        step: after which it happens.
    """

    def __init__(self, rank: int = 1, what: str = "kill", step: int = 2) -> None:
        self.rank, self.what, self.step = rank, what, step

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.what == "slow" and trainer.global_rank == self.rank:
            assert isinstance(pl_module, LitVLM)
            block = next(iter(pl_module.vlm.encoder.blocks()))
            block.register_forward_pre_hook(lambda *_: time.sleep(0.2))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_rank != self.rank or trainer.global_step < self.step:
            return
        Path(trainer.default_root_dir, "trouble").write_text(str(os.getpid()))
        if self.what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.what == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif self.what == "sleep":
            time.sleep(600)  # far longer than the watchdog waits
        elif self.what == "fail":
            raise ValueError("the sample is broken")
