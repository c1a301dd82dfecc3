"""A training as a trial of a study: what it reports, when it is given up, and what it leaves."""

from __future__ import annotations

import json
from pathlib import Path

import optuna
import pytest

from callbacks import Pruning
from lit_vlm.training.trial import STUDY, TUNED_FILE, open_storage, pruner_of
from tests.callbacks.test_callbacks import data, lit, trainer


def study_with(folder: Path, curves: list[dict[int, float]]) -> tuple[optuna.Study, str, int]:
    """A study with finished trials of these losses, its file, and the id of a trial that runs."""
    file = folder / "study.db"
    study = optuna.create_study(study_name=STUDY, storage=open_storage(file))
    for losses in curves:
        study.add_trial(optuna.create_trial(value=losses[100], intermediate_values=losses))
    return study, str(file), study.ask()._trial_id


def train(folder: Path, callback: Pruning, **changes: object) -> int:
    """Train for 8 steps with a validation after every second; returns the number of steps."""
    loop = trainer(folder, callback, **{"max_steps": 8, "val_check_interval": 2, "limit_val_batches": 1} | changes)
    loop.fit(lit(), data())
    return loop.global_step


def left(folder: Path) -> dict[str, object]:
    return json.loads((folder / TUNED_FILE).read_text())


@pytest.mark.parametrize(
    ("others", "startup", "steps"),
    [(1.0, 2, 2), (1.0, 3, 8), (100.0, 2, 8)],
    ids=["worse than the others", "too few others", "better than the others"],
)
def test_a_trial_that_is_worse_than_the_others_is_given_up(
    tmp_path: Path, others: float, startup: int, steps: int
) -> None:
    curve = dict.fromkeys((25, 50, 75, 100), others)
    study, file, trial = study_with(tmp_path, [curve, curve])
    taken = train(tmp_path, Pruning(file, trial, "val/loss", "median", startup))
    assert taken == steps
    reported = study.trials[2].intermediate_values
    assert list(reported) == [25, 50, 75, 100][: steps // 2]  # percent of training
    found = left(tmp_path)
    assert found == {"score": "val/loss", "value": found["value"], "pruned": steps == 2, "step": steps}
    assert found["value"] == pytest.approx(list(reported.values())[-1])


def test_nothing_is_given_up_in_the_first_tenth(tmp_path: Path) -> None:
    curve = dict.fromkeys(range(0, 101), 1.0)
    study, file, trial = study_with(tmp_path, [curve, curve])
    train(tmp_path, Pruning(file, trial, "val/loss", "median", 2), max_steps=40, val_check_interval=1, max_epochs=-1)
    assert list(study.trials[2].intermediate_values) == [2, 5, 8, 10]


def test_without_a_pruner_all_is_reported_and_nothing_given_up(tmp_path: Path) -> None:
    curve = dict.fromkeys((25, 50, 75, 100), 1.0)
    study, file, trial = study_with(tmp_path, [curve] * 6)
    assert train(tmp_path, Pruning(file, trial, "val/loss", "none")) == 8
    assert len(study.trials[-1].intermediate_values) == 4


@pytest.mark.parametrize("steps", [4, 5])
def test_a_training_that_goes_on_with_no_validation_left_keeps_its_score(tmp_path: Path, steps: int) -> None:
    _, file, trial = study_with(tmp_path, [])
    changes = {"max_steps": 4, "val_check_interval": 2, "limit_val_batches": 1}
    loop = trainer(tmp_path, Pruning(file, trial, "val/loss"), **changes)
    loop.fit(lit(), data())
    loop.save_checkpoint(tmp_path / "last.ckpt")
    before = left(tmp_path)
    (tmp_path / TUNED_FILE).unlink()
    loop = trainer(tmp_path, Pruning(file, trial, "val/loss"), **changes | {"max_steps": steps})
    loop.fit(lit(), data(), ckpt_path=str(tmp_path / "last.ckpt"), weights_only=False)
    assert left(tmp_path) == before | {"step": steps}


def test_hyperband_lets_the_best_of_three_go_on() -> None:
    study = optuna.create_study(pruner=pruner_of("hyperband", 5), sampler=optuna.samplers.RandomSampler(seed=0))
    steps = {}
    for number in range(12):
        trial = study.ask()
        for step in (10, 30, 60, 100):
            trial.report(1.0 + number, step)
            steps[number] = step
            if trial.should_prune():
                break
        study.tell(trial, 1.0 + number)
    assert steps[0] == 100
    assert min(steps.values()) < 100


def test_a_score_that_nothing_logs_is_named(tmp_path: Path) -> None:
    _, file, trial = study_with(tmp_path, [])
    match = r"score: this stage logs no 'val/los' \(did you mean 'val/loss'.*it logs .*train/loss"
    with pytest.raises(ValueError, match=match):
        train(tmp_path, Pruning(file, trial, "val/los"))
    match = r"logs no 'val/loss'.*need trainer.limit_val_batches above 0"
    with pytest.raises(ValueError, match=match):
        train(tmp_path, Pruning(file, trial, "val/loss"), limit_val_batches=0, max_steps=2)
