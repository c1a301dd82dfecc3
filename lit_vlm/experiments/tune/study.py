"""The study of a search: which settings come next, and what earlier ones have found; Optuna keeps and chooses."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lit_vlm.core.plugins import nearest
from lit_vlm.core.written import write_whole
from lit_vlm.experiments.tune.file import Range, TuneFile
from lit_vlm.training.trial import STUDY, open_storage, pruner_of

if TYPE_CHECKING:
    from optuna import Study
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial, Trial

STUDY_FILE, KEPT_FILE = "study.db", "tune.yaml"
"""Names in the folder of a search: the study, and the file as it was when the search began."""
MAY_CHANGE = {"trials", "checkpoints"}
"""Keys of the file that may be others when a search goes on."""
AGAIN = "again"
"""What Optuna keeps of a trial that has the settings of one that failed, under this name: the number of that one."""
REASON = "reason"
"""What Optuna keeps of a trial that ended early, under this name."""


class Trials:
    """The trials of a search, kept in the file `study.db` of its folder.

    Args:
        file: what is searched.
        folder: folder of the search; a search that it holds goes on.
        parallel: whether several trials run at the same time.

    Attributes:
        to_try_again: trials that failed when an earlier process ran the search, and that no later one stands for.

    Raises:
        ValueError: when the folder holds the search of another file.
    """

    def __init__(self, file: TuneFile, folder: Path, parallel: bool) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        logging.getLogger("alembic").setLevel(logging.WARNING)
        self.file, self.parallel = file, parallel
        _keep(file, folder / KEPT_FILE)
        self.study: Study = optuna.create_study(
            storage=open_storage(folder / STUDY_FILE),
            study_name=STUDY,
            direction="minimize" if file.better == "lower" else "maximize",
            pruner=pruner_of(file.pruner, file.startup),
            load_if_exists=True,
        )
        if file.sampler == "grid":
            values = [one.values() for one in file.search.values()]
            for combination in product(*values):
                self.study.enqueue_trial(dict(zip(file.search, combination, strict=True)), skip_if_exists=True)
        from optuna.trial import TrialState

        failed = self.study.get_trials(deepcopy=False, states=(TrialState.FAIL,))
        stood_for = {one.user_attrs.get(AGAIN) for one in self.study.get_trials(deepcopy=False)}
        self._failed_before = {one.number for one in failed}
        self.to_try_again: list[FrozenTrial] = [one for one in failed if one.number not in stood_for]

    def under_way(self) -> list[Trial]:
        """Trials that an earlier process has begun; they go on, with the settings that they have."""
        from optuna.trial import Trial, TrialState

        begun = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return [self._chosen(Trial(self.study, one._trial_id)) for one in begun]

    def next(self) -> Trial:
        """A new trial: one that failed before with its settings, once in a process, and then what the sampler chooses.

        What the sampler draws depends on the seed and the number of the trial, so that a search that was interrupted
        does not draw again what it has drawn.
        """
        if self.to_try_again:
            return self._anew(self.to_try_again.pop(0))
        self.study.sampler = self._sampler(self.file.seed + len(self.study.get_trials(deepcopy=False)))
        return self._chosen(self.study.ask())

    def finished(self) -> list[FrozenTrial]:
        """Trials that have come to an end, whatever it was."""
        return [one for one in self.study.get_trials(deepcopy=False) if one.state.is_finished()]

    def counted(self) -> list[FrozenTrial]:
        """Trials that have come to an end, without those that failed in earlier processes: these are tried again."""
        return [one for one in self.finished() if one.number not in self._failed_before]

    def end(self, trial: Trial, value: float | None, reason: str = "", failed: bool = False) -> FrozenTrial:
        """Keep how a trial has ended.

        Args:
            trial: the trial.
            value: its score; None where it has not come to its end.
            reason: why it has not.
            failed: whether that says nothing of its settings; else the sampler keeps away from them.
        """
        from optuna.trial import TrialState

        if reason:
            trial.set_user_attr(REASON, reason)
        state = TrialState.FAIL if failed else TrialState.PRUNED if value is None else TrialState.COMPLETE
        return self.study.tell(trial, value, state=state)

    def _anew(self, failed: FrozenTrial) -> Trial:
        """A new trial with the settings of one that failed, which begins before those that wait in Optuna's queue."""
        from optuna.trial import Trial, TrialState, create_trial

        # As `enqueue_trial` does, but for the state. It notes at once whom it stands for, as a process may be killed.
        settings = {"fixed_params": failed.params}
        attributes = {AGAIN: failed.number}
        self.study.add_trial(create_trial(state=TrialState.RUNNING, system_attrs=settings, user_attrs=attributes))
        (one,) = [
            one
            for one in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
            if one.user_attrs.get(AGAIN) == failed.number
        ]
        return self._chosen(Trial(self.study, one._trial_id))

    def _chosen(self, trial: Trial) -> Trial:
        """Choose the values of a trial that are not chosen yet."""
        for name, one in self.file.search.items():
            _choose(trial, name, one)
        return trial

    def _sampler(self, seed: int) -> BaseSampler:
        from optuna import samplers

        if self.file.sampler == "tpe":
            return samplers.TPESampler(seed=seed, constant_liar=self.parallel)
        return samplers.RandomSampler(seed=seed)


def _choose(trial: Trial, name: str, one: Range) -> None:
    """Choose the value of a flag; one that is chosen already stays."""
    low: Any = one.low
    high: Any = one.high
    step: Any = one.step
    if one.choices is not None:
        trial.suggest_categorical(name, one.choices)
    elif one.whole:
        trial.suggest_int(name, low, high - (high - low) % (step or 1), step=step or 1, log=one.log)
    else:
        trial.suggest_float(name, low, high, step=step, log=one.log)


def best_of(finished: Sequence[FrozenTrial], better: str) -> FrozenTrial | None:
    """The best of the trials that came to their end; None where none has."""
    from optuna.trial import TrialState

    complete = [one for one in finished if one.state == TrialState.COMPLETE]
    sign = 1 if better == "lower" else -1
    return min(complete, key=lambda one: (sign * (one.value or 0.0), one.number), default=None)


def _keep(file: TuneFile, path: Path) -> None:
    """Keep the file in the folder of its search, or compare it with the one that is there."""
    now: dict[str, Any] = file.model_dump(mode="json")
    if path.is_file():
        then: Mapping[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
        if differ := [key for key in now if key not in MAY_CHANGE and then.get(key) != now[key]]:
            key = differ[0]
            raise ValueError(
                f"{path.parent} holds the search of another file: {key} was {then.get(key)!r}, and is {now[key]!r} "
                "now. Choose another --out"
            )
    write_whole(path, yaml.safe_dump(now, sort_keys=False))


def shown(value: object) -> str:
    """A value as a person reads it."""
    if isinstance(value, float):
        return f"{value:.3g}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def missing(name: str, names: Sequence[str]) -> str:
    """Words for a score that is not there."""
    return f"there is no '{name}'{nearest(name, names)}; there are {', '.join(names) or 'none'}"
