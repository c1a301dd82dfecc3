"""Callbacks that time the steps of a tiny model, in the tests of interruptions."""

from __future__ import annotations

import os
import time
from pathlib import Path
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


class Meet(L.Callback):
    """Holds the first step of a run until as many runs are at theirs, so that no run ends before another starts.

    A run that goes on finds the marks of the others and does not wait.

    Args:
        folder: where each run leaves its mark.
        count: how many runs meet.

    Raises:
        TimeoutError: the others do not come within 5 minutes.
    """

    def __init__(self, folder: str, count: int) -> None:
        self.folder = Path(folder)
        self.count = count

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.folder.mkdir(exist_ok=True)
        (self.folder / str(os.getpid())).touch()
        end = time.monotonic() + 300
        while len(list(self.folder.iterdir())) < self.count:
            if time.monotonic() > end:
                raise TimeoutError(f"{self.folder}: {self.count} runs do not meet")
            time.sleep(0.05)
