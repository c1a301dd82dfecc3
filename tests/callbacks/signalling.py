"""A callback that sends signals at chosen moments, in the tests of preemption."""

from __future__ import annotations

import os
import signal
from typing import Any

import lightning.pytorch as L


class SignalAt(L.Callback):
    """Sends this process a signal at a hook, once the step is reached.

    Args:
        step: optimizer steps that were taken.
        hook: name of the hook.
        name: of the signal.
        rank: the process that does so.
    """

    def __init__(self, step: int, hook: str, name: str = "SIGUSR1", rank: int = 0) -> None:
        self.step, self.name, self.rank, self.sent = step, name, rank, False
        setattr(self, hook, self._send)

    def _send(self, trainer: L.Trainer, *_: Any) -> None:
        if not self.sent and trainer.global_step == self.step and trainer.global_rank == self.rank:
            self.sent = True
            os.kill(os.getpid(), getattr(signal, self.name))
