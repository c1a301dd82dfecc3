"""A run that is asked to leave saves its state first, and goes on by the same command."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.trainer.states import TrainerFn

from callbacks.checkpoint import Checkpoint
from lit_vlm.core.launcher import ASKING, end_of_job
from lit_vlm.core.times import seconds_of
from lit_vlm.training.loggers import tell_end
from lit_vlm.training.trainer import Trainer


class Preemption(L.Callback):
    """Lets a run leave in order, by exit code 75, when a signal or the clock asks for it.

    SIGTERM, SIGUSR1 and SIGUSR2 are only noted. At the end of the optimizer step all processes agree, save into
    `checkpoints/`, report `PREEMPTED` and leave. A time limit does the same before it is reached: that of
    `max_time`, and the end of the SLURM job.

    Args:
        max_time: time from the start of training until the run leaves, as SLURM writes it: minutes, `HH:MM:SS` or
            `D-HH`; null: none.
        margin: seconds before the end of the SLURM job at which the run leaves, for a step, a validation and the save.

    Raises:
        ValueError: for a time that cannot be read, or a negative margin.
    """

    def __init__(self, max_time: str | None = None, margin: float = 120.0) -> None:
        self._seconds = None if max_time is None else seconds_of(max_time)
        if max_time is not None and self._seconds is None:
            raise ValueError(f"preemption.max_time is a time such as 04:00:00 or 1-12, not '{max_time}'")
        if margin < 0:
            raise ValueError(f"preemption.margin is a number of seconds, not {margin}")
        self.margin = margin
        self._before: dict[signal.Signals, Any] = {}
        self._pid = os.getpid()
        self._trainer: Trainer | None = None
        self._begun_at = 0
        self._ends: list[tuple[float, str]] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Take over the signals, before anything is loaded that takes long."""
        if stage != "fit" or not isinstance(trainer, Trainer):
            return
        self._trainer, self._pid = trainer, os.getpid()
        trainer.leaving.forget()
        trainer.leaving.late, trainer.leaving.go = self._late, self._save_and_report
        if threading.current_thread() is threading.main_thread():  # signals reach no other
            self._before = {one: signal.signal(one, self._note) for one in ASKING}
        self._ends = []
        if self._seconds is not None:
            self._ends.append((time.time() + self._seconds, "preemption.max_time is over"))
        if trainer.is_global_zero and (end := end_of_job()) is not None:  # one that leaves takes the others along
            self._ends.append((end - self.margin, "the SLURM job ends soon"))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note where training begins: without a step there is nothing to save."""
        self._begun_at = trainer.global_step

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Leave a validation that a training waits for; it is not taken up again.

        Raises:
            Preempted: on all processes at the same batch.
        """
        if self._trainer is None or trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        leaving, loop = self._trainer.leaving, trainer.fit_loop.epoch_loop
        if leaving.agreed(trainer.world_size, trainer.strategy.root_device):
            loop.val_loop.batch_progress.reset()  # a validation that was not begun: resuming trains on
            if not loop._should_accumulate():
                loop._batches_that_stepped += 1  # as behind a validation
            leaving.leave()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give the signals back."""
        self._give_back()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Give the signals back, but for one that comes again while the run leaves."""
        if not isinstance(exception, SystemExit):
            self._give_back()

    def _give_back(self) -> None:
        for one, handler in self._before.items():
            signal.signal(one, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        """Note a signal. A forked process, such as a loader's, ignores it: it ends with this one."""
        if os.getpid() == self._pid and self._trainer is not None:
            self._trainer.leaving.ask(signal.Signals(number).name)

    def _late(self) -> str | None:
        now = time.time()
        return next((reason for end, reason in self._ends if now >= end), None)

    def _save_and_report(self, reason: str) -> None:
        """Save, say so and report it; then all leave together, as a launcher kills those that are left over."""
        trainer = self._trainer
        assert trainer is not None
        saved = "nothing was trained, so nothing is saved"
        if trainer.global_step > self._begun_at:
            savers = [one for one in trainer.checkpoint_callbacks if isinstance(one, Checkpoint)]
            for saver in savers:
                saver.save_now(trainer)
            saved = f"saved step {trainer.global_step}" if savers else "no checkpoint callback, so nothing is saved"
        if trainer.is_global_zero:
            sys.stderr.write(f"\nasked to leave ({reason}): {saved}; the same command goes on\n")
            tell_end(trainer, lambda report: report.preempted(f"{reason} at step {trainer.global_step}"))
        trainer.strategy.barrier("preempted")
