"""A training as a trial of an Optuna study: its score after each validation, and an end where it is given up."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as L
from lightning.pytorch.trainer.states import TrainerFn

from lit_vlm.core.plugins import nearest
from lit_vlm.core.written import write_whole
from lit_vlm.training.trial import STUDY, TUNED_FILE, PrunerName, open_storage, pruner_of

if TYPE_CHECKING:
    from optuna.trial import Trial


class Pruning(L.Callback):
    """Reports a metric to the Optuna study of `lit-vlm tune`, and ends a training whose trial is not worth going on.

    A validation counts by the share of training that is behind it, in percent. So trials of different lengths can be
    compared, as their learning rates are at the same point of the schedule. Optuna's own callback counts epochs, of
    which most recipes have one.

    A training that is given up ends in order: its checkpoint is saved, and its run has not failed.

    Args:
        study: SQLite file of the study.
        trial: id of the trial in the file.
        score: name of a metric that training or validation logs.
        pruner: what decides: `median` of other trials at the same point, `hyperband`, or `none`.
        startup: for `median`: number of trials that must have come to their end before one is given up.

    Raises:
        ValueError: when a validation or training ends, if no such metric was logged.
    """

    def __init__(self, study: str, trial: int, score: str, pruner: PrunerName = "median", startup: int = 5) -> None:
        self.study, self.trial, self.score, self.pruner, self.startup = study, trial, score, pruner, startup
        self.pruned = False
        self._last: float | None = None
        self._steps = math.inf
        self._trial: Trial | None = None

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the last score, as a training that goes on may have no validation left."""
        return {"last": self._last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the last score."""
        self._last = state_dict["last"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take down how long the training is, and find the trial."""
        self._steps = trainer.estimated_stepping_batches
        if trainer.is_global_zero:
            from optuna import load_study
            from optuna.trial import Trial

            pruner = pruner_of(self.pruner, self.startup)
            study = load_study(study_name=STUDY, storage=open_storage(Path(self.study)), pruner=pruner)
            self._trial = Trial(study, self.trial)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Report the score; all processes end the training where the first one's study says so."""
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        value, given_up = self._value(trainer), False
        if self._trial is not None:
            self._trial.report(value, round(100 * trainer.global_step / self._steps))
            given_up = self._trial.should_prune()
        if trainer.strategy.broadcast(given_up):
            self.pruned = trainer.should_stop = True
            trainer.print(f"\nthis trial is given up at step {trainer.global_step}: {self.score} {value:.6g}")

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the last score in the folder of the stage; a training that went on may have had no step left."""
        value = self._value(trainer)
        if trainer.is_global_zero:
            found = {"score": self.score, "value": value, "pruned": self.pruned, "step": trainer.global_step}
            write_whole(Path(trainer.default_root_dir) / TUNED_FILE, json.dumps(found))

    def _value(self, trainer: L.Trainer) -> float:
        found = trainer.callback_metrics
        if self.score in found:
            self._last = float(found[self.score])
        if self._last is None:
            raise ValueError(
                f"score: this stage logs no '{self.score}'{nearest(self.score, found)}; it logs "
                f"{', '.join(sorted(found))}. Those of val/ need trainer.limit_val_batches above 0"
            )
        return self._last
