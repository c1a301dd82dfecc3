"""Checkpoints that a killed run can be resumed from."""

from __future__ import annotations

import logging
import re
import time
from concurrent.futures import Future
from functools import partial
from pathlib import Path

import lightning.pytorch as L
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lit_vlm.checkpoints.folder import checkpoints_in, remove, settle, step_of
from lit_vlm.core.progress import slowly
from lit_vlm.training.module import LitVLM
from lit_vlm.training.saving import ASYNCHRONOUS, SaveFailed
from lit_vlm.training.sharding import FSDP2

MOST_FAILURES = 3
"""A run ends when so many checkpoints in a row could not be written."""
PAUSES = (1.0, 3.0, 6.0)
"""Seconds between the attempts to write the last checkpoint of a run."""

OWN_NAME = re.compile(r"step=\d+(-v\d+)?\.ckpt")
"""Files that nobody renamed or added."""

log = logging.getLogger(__name__)


class Checkpoint(ModelCheckpoint):
    """Saves every so many steps and at the end, under `checkpoints/` of the run's folder.

    A checkpoint is there whole or not at all, and the old one is removed when the new one is whole, so a run that is
    killed at any moment can be resumed. One that cannot be written, as the disk is full, is warned of and tried again
    when the next is due; the third in a row ends the run, and so does the last one, after some attempts.

    Args:
        every_n_steps: optimizer steps between two checkpoints.
        keep: 1 keeps the newest, -1 keeps all.
        weights_only: leave out the optimizer: smaller, but the run cannot be resumed from it.
        only_trained: leave out frozen weights, which are read again from where they came from: pretrained ones, or the
            checkpoint that the stage started from, which must stay. Null: where a slot has adapters.
        asynchronous: write sharded checkpoints while training goes on, from a copy that each process takes of its
            shards in the host's memory. Training stops for single files.
    """

    def __init__(
        self,
        every_n_steps: int = 500,
        keep: int = 1,
        weights_only: bool = False,
        only_trained: bool | None = None,
        asynchronous: bool = True,
    ) -> None:
        self.only_trained, self.asynchronous = only_trained, asynchronous
        super().__init__(
            filename="{step:08d}",
            save_top_k=keep,
            every_n_train_steps=every_n_steps,
            save_weights_only=weights_only,
        )
        self._under_way: tuple[Future[SaveFailed | None], str] | None = None
        self._failures = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Put the files into the folder of the run, whatever the logger, and tell the module what goes into them."""
        if isinstance(pl_module, LitVLM):
            pl_module.only_trained = self.only_trained
        self.dirpath = str(Path(trainer.default_root_dir) / "checkpoints")
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and trainer.is_global_zero:
            Path(self.dirpath).mkdir(parents=True, exist_ok=True)
            for half in settle(Path(self.dirpath)):
                log.warning("%s was not written to its end, and is removed", half)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the last checkpoint, which the next stage starts from.

        Raises:
            SaveFailed: as `save_now`.
        """
        super().on_train_end(trainer, pl_module)
        if not getattr(trainer, "fast_dev_run", False):
            with slowly("saving the last checkpoint", trainer.is_global_zero):
                self.save_now(trainer)

    def save_now(self, trainer: L.Trainer) -> None:
        """Save this step, unless it is saved, and return when that is whole; all processes call this.

        Raises:
            SaveFailed: where it cannot be written, after some attempts.
        """
        self._finish(trainer)
        for pause in (*PAUSES, None):
            if self._last_global_step_saved == trainer.global_step:
                return
            then = f"It is tried again in {pause:g} s" if pause is not None else None
            failure = self._attempt(trainer, self._monitor_candidates(trainer), wait=True, then=then)
            if failure is not None and pause is None:
                raise SaveFailed(f"{failure}. {self._what_stays()}")
            if failure is not None and pause is not None:
                time.sleep(pause)

    def _save_none_monitor_checkpoint(self, trainer: L.Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        """Save the step of a checkpoint that is due; Lightning calls this.

        Raises:
            SaveFailed: for the last of some checkpoints in a row that could not be written.
        """
        self._finish(trainer)
        last = self._failures == MOST_FAILURES - 1
        # After a failure the run waits for the outcome, to go on or to end with it.
        wait = not self.asynchronous or self._failures > 0
        failure = self._attempt(trainer, monitor_candidates, wait, then=None if last else "Training goes on")
        if failure is not None and last:
            raise SaveFailed(f"{failure}, as {MOST_FAILURES - 1} before it. {self._what_stays()}")

    def _attempt(
        self, trainer: L.Trainer, metrics: dict[str, Tensor], wait: bool, then: str | None
    ) -> SaveFailed | None:
        """Save this step.

        Args:
            trainer: the trainer.
            metrics: what the file's name may hold.
            wait: return when it is written.
            then: what happens after a failure, for the warning; None does without one.

        Returns:
            why it failed, as far as that is known, alike on all processes.
        """
        path = self._get_metric_interpolated_filepath_name(metrics, trainer, self.best_model_path)
        strategy = trainer.strategy
        goes_on = isinstance(strategy, FSDP2) and strategy.saves_shards and not wait
        # The path is in the state that is saved.
        before, self.best_model_path = self.best_model_path, path
        done = Future[None]()
        try:
            trainer.save_checkpoint(path, self.save_weights_only, ASYNCHRONOUS if goes_on else None)
        except SaveFailed as error:
            done.set_exception(error)
        else:
            if goes_on:
                assert isinstance(strategy, FSDP2)
                assert strategy.under_way is not None
                done = strategy.under_way
            else:
                done.set_result(None)
        self._last_global_step_saved, self._last_checkpoint_saved = trainer.global_step, path
        outcome = Future[SaveFailed | None]()
        self._under_way = outcome, before
        done.add_done_callback(partial(self._tell, trainer.is_global_zero, Path(path), then, outcome))
        return None if goes_on else self._finish(trainer)

    def _tell(
        self, first: bool, path: Path, then: str | None, outcome: Future[SaveFailed | None], done: Future[None]
    ) -> None:
        """Warn of a failure, or remove what is older, as soon as either is known; it may be in another thread."""
        failure = done.exception()
        assert failure is None or isinstance(failure, SaveFailed)
        try:
            if first and failure is not None and then is not None:
                log.warning("%s. %s. %s", failure, then, self._what_stays())
            elif first and failure is None and self.save_top_k == 1:
                self._remove_older(path)
        finally:
            outcome.set_result(failure)

    def _remove_older(self, path: Path) -> None:
        for old in checkpoints_in(path.parents[1]):
            if OWN_NAME.fullmatch(old.name) and step_of(old) < step_of(path):
                try:
                    remove(old)
                except OSError as error:
                    log.warning("the old checkpoint %s could not be removed: %s", old, error.strerror)

    def _finish(self, trainer: L.Trainer) -> SaveFailed | None:
        """Wait for the save that is under way, and count it; returns why it failed."""
        if self._under_way is None:
            return None
        (outcome, before), self._under_way = self._under_way, None
        failure = outcome.result()
        if failure is not None:
            self._failures += 1
            self._last_global_step_saved, self.best_model_path = 0, before
            return failure
        self._failures = 0
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(self)
        return None

    def _what_stays(self) -> str:
        assert self.dirpath is not None
        found = checkpoints_in(Path(self.dirpath).parent)
        return f"The last whole checkpoint is {found[-1]}" if found else "There is no whole checkpoint yet"
