"""Checkpoints are there whole or not at all, and a disk that is full ends a run only when it must."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from callbacks import Checkpoint, HeldOut, Predictions, checkpoint
from lit_vlm.checkpoints.folder import checkpoints_in, is_complete, partial_of, settle
from lit_vlm.checkpoints.weights import read_state
from lit_vlm.training.saving import SaveFailed
from lit_vlm.training.tracking import MLflow
from lit_vlm.training.trainer import Trainer
from tests.callbacks.test_callbacks import data, lit
from tests.full_disk import FILLER, At, fill, small_disk


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", 10) as folder:
        yield folder


def fit(folder: Path, *callbacks: object, steps: int = 4, every: int = 1, keep: int = 1) -> None:
    Trainer(
        accelerator="cpu", devices=1, default_root_dir=folder, max_steps=steps, logger=False, precision="32-true",
        callbacks=[Checkpoint(every_n_steps=every, keep=keep), *callbacks], enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0,
    ).fit(lit(), data())  # fmt: skip


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_a_full_disk_in_the_middle_is_warned_of_and_the_next_checkpoint_is_tried(disk: Path, caplog) -> None:
    seen: dict[int, list[str]] = {}
    at = At(
        {
            2: lambda: fill(disk),
            3: lambda: (seen.update({2: names(disk / "run")}), (disk / FILLER).unlink()),
            4: lambda: seen.update({3: names(disk / "run")}),
        }
    )
    with caplog.at_level(logging.WARNING):
        fit(disk / "run", at)
    assert seen == {2: ["step=00000001.ckpt"], 3: ["step=00000003.ckpt"]}
    assert names(disk / "run") == ["step=00000004.ckpt"]
    (line,) = [record.getMessage() for record in caplog.records if "could not be written" in record.getMessage()]
    expected = (
        r".*run/checkpoints/step=00000002.ckpt could not be written: No space left on device \(0.0 GB free in "
        r".*run/checkpoints\). Training goes on. The last whole checkpoint is .*step=00000001.ckpt"
    )
    assert re.fullmatch(expected, line)


def test_the_third_failure_in_a_row_ends_the_run(disk: Path) -> None:
    message = r"step=00000005.ckpt could not be written: No space left .*, as 2 before it. The last .*=00000002.ckpt"
    with pytest.raises(SaveFailed, match=message):
        fit(disk / "run", At({3: lambda: fill(disk)}), steps=9)
    assert names(disk / "run") == ["step=00000002.ckpt"]


def test_failures_count_in_a_row_only(disk: Path) -> None:
    free = (disk / FILLER).unlink
    fit(disk / "run", At({2: lambda: fill(disk), 4: free, 5: lambda: fill(disk), 7: free}), steps=7)
    assert names(disk / "run") == ["step=00000007.ckpt"]


def test_the_last_checkpoint_is_tried_some_times_and_its_failure_ends_the_run(disk: Path, monkeypatch, caplog) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(checkpoint.time, "sleep", pauses.append)
    message = r"step=00000003.ckpt could not be written: No space left .*\). The last .*step=00000002.ckpt$"
    with pytest.raises(SaveFailed, match=message):
        fit(disk / "run", At({3: lambda: fill(disk)}), steps=3, every=2)
    assert pauses == [1, 3, 6]
    assert sum("It is tried again in" in record.getMessage() for record in caplog.records) == 3
    assert names(disk / "run") == ["step=00000002.ckpt"]

    def free(_: float) -> None:
        (disk / FILLER).unlink()

    monkeypatch.setattr(checkpoint.time, "sleep", free)
    fit(disk / "again", At({3: lambda: fill(disk)}), steps=3, every=2)
    assert names(disk / "again") == ["step=00000003.ckpt"]


def test_a_folder_that_vanishes_is_made_again_but_not_that_of_the_run(tmp_path: Path, caplog) -> None:
    run = tmp_path / "run"
    fit(run, At({2: lambda: shutil.rmtree(run / "checkpoints")}))
    assert names(run) == ["step=00000004.ckpt"]
    assert "could not" not in caplog.text
    gone = tmp_path / "gone"
    message = r"No such file or directory: '.*gone/checkpoints' .*, as 2 before it. There is no whole checkpoint yet"
    with pytest.raises(SaveFailed, match=message):
        fit(gone, At({2: lambda: shutil.rmtree(gone)}), steps=9)
    assert not gone.exists()


def test_a_folder_that_cannot_be_written_into_is_named(tmp_path: Path) -> None:
    def replace_folder() -> None:
        shutil.rmtree(tmp_path / "run" / "checkpoints")
        (tmp_path / "run" / "checkpoints").write_text("")

    with pytest.raises(SaveFailed, match=r"File exists: '.*run/checkpoints'"):
        fit(tmp_path / "run", At({2: replace_folder}), steps=9)


def test_what_a_killed_run_left_is_tidied(tmp_path: Path, caplog) -> None:
    folder = tmp_path / "checkpoints"
    fit(tmp_path, keep=-1)
    whole = folder / "step=00000004.ckpt"
    state = read_state(whole)
    whole.rename(partial_of(whole))  # it was killed before it could rename
    half = folder / ".step=00000003.ckpt.partial"
    half.mkdir()
    (half / "__0_0.distcp").write_bytes(b"0")
    replaced = partial_of(folder / "replaced-step=00000002.ckpt")
    replaced.write_bytes((folder / "step=00000002.ckpt").read_bytes())
    assert checkpoints_in(tmp_path)[-1].name == "step=00000003.ckpt"
    assert settle(folder) == [replaced, half]
    assert names(tmp_path) == [f"step=0000000{step}.ckpt" for step in (1, 2, 3, 4)]
    assert all(torch.equal(value, state[name]) for name, value in read_state(whole).items())
    partial_of(whole).write_bytes(b"PK")
    assert not is_complete(partial_of(whole))
    fit(tmp_path, steps=5)  # a run does it when it begins
    assert ".step=00000004.ckpt.partial was not written to its end, and is removed" in caplog.text
    assert names(tmp_path) == ["step=00000005.ckpt"]


def test_the_newest_alone_is_kept_also_of_what_was_there_before(tmp_path: Path) -> None:
    fit(tmp_path, keep=-1, steps=2)
    assert len(names(tmp_path)) == 2
    shutil.copy(tmp_path / "checkpoints" / "step=00000001.ckpt", tmp_path / "checkpoints" / "best-step=1.ckpt")
    fit(tmp_path, steps=3)
    assert names(tmp_path) == ["best-step=1.ckpt", "step=00000003.ckpt"]


def test_saving_now_saves_a_step_once(tmp_path: Path) -> None:
    saved: list[int] = []

    class Now(At):
        def on_train_batch_end(self, trainer, *_: object) -> None:
            callback = trainer.checkpoint_callback
            assert isinstance(callback, Checkpoint)
            callback.save_now(trainer)
            callback.save_now(trainer)
            saved.append(len(checkpoints_in(tmp_path)))

    fit(tmp_path, Now({}), every=100, keep=-1, steps=2)
    assert saved == [1, 2]
    assert names(tmp_path) == ["step=00000001.ckpt", "step=00000002.ckpt"]


def test_reports_that_cannot_be_written_end_no_run(disk: Path, tmp_path: Path, caplog) -> None:
    logger = MLflow(f"sqlite:///{disk}/mlflow.db")
    logger.belongs_to(disk / "run", go_on=False)
    (disk / "run").mkdir()

    class NoRoom(At):
        def on_train_end(self, trainer, *_: object) -> None:
            fill(disk)  # behind the last checkpoint, before what is written at the end

    with caplog.at_level(logging.WARNING):
        Trainer(
            accelerator="cpu", devices=1, default_root_dir=disk / "run", max_steps=6, logger=logger,
            precision="32-true", log_every_n_steps=1, enable_progress_bar=False, enable_model_summary=False,
            num_sanity_val_steps=0, limit_val_batches=0, enable_checkpointing=False,
            callbacks=[At({3: lambda: fill(disk), 5: (disk / FILLER).unlink}), NoRoom({}), HeldOut(), Predictions(2)],
        ).fit(lit(), data())  # fmt: skip
    assert f"MLflow: sqlite:///{disk}/mlflow.db does not answer (" in caplog.text
    for name in ("held_out.json", "answers.json", "answers.png"):
        assert f"{disk}/run/{name} could not be written and is left out: [Errno 28] No space left" in caplog.text
    assert not list((disk / "run").glob(".partial*"))
    assert not list((disk / "run").glob("answers*"))
    # What was known before the disk was full is still there: a file that is written anew is never lost.
    assert '"before"' in (disk / "run" / "held_out.json").read_text()
