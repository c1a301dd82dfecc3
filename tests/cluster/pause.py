"""A callback that makes steps of a tiny model as long as those of a large one, in the tests of interruptions."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as L


class Pause(L.Callback):
    """Sleeps in each batch, inside the step: between its backward pass and the optimizer.

    Args:
        seconds: how long.
    """

    def __init__(self, seconds: float = 0.25) -> None:
        self.seconds = seconds

    def on_after_backward(self, trainer: L.Trainer, *_: Any) -> None:
        time.sleep(self.seconds)
