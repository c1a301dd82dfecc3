from __future__ import annotations

import json
import os
import socket
from dataclasses import replace
from pathlib import Path

import lightning.pytorch as L
import pytest

from callbacks import Checkpoint, Memory, Progress, Throughput
from lit_vlm.checkpoints.progress import Progress as Written
from lit_vlm.core.launcher import PREEMPTED
from tests.callbacks.test_callbacks import data, lit, trainer


class Ends(L.Callback):
    """Raises an exception after a step."""

    def __init__(self, error: BaseException, step: int) -> None:
        self.error, self.step = error, step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == self.step:
            raise self.error


@pytest.fixture
def states(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What is written, as state and step."""
    found: list[tuple[str, int]] = []
    write = Written.write
    monkeypatch.setattr(Written, "write", lambda self, to: found.append((self.state, self.step)) or write(self, to))
    return found


def test_each_change_of_what_training_does_is_written(
    tmp_path: Path, states: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    callbacks = [Throughput(), Progress(), Checkpoint(every_n_steps=2)]
    module = lit()
    trainer(tmp_path, *callbacks, val_check_interval=2).fit(module, data())
    assert states == [
        ("training", 0),
        ("saving", 2), ("validating", 2), ("training", 3),
        ("saving", 4), ("validating", 4), ("finished", 4),
    ]  # fmt: skip
    written = Written.read(tmp_path)
    assert written is not None
    assert (written.step, written.steps, written.first_step) == (4, 4, 0)
    assert written.tokens_per_s is not None
    assert written.tokens_per_s > 0
    assert (written.host, written.pid) == (socket.gethostname(), os.getpid())
    assert (written.state, written.error, written.slurm_job) == ("finished", None, "7")
    projector = sum(weight.numel() for weight in module.vlm.projector.parameters())
    assert (written.devices, written.trained, written.peak_bytes) == (1, projector, None)
    assert tuple(written.slots["projector"]) == (projector, 0)
    assert tuple(written.slots["decoder"]) == (0, sum(weight.numel() for weight in module.vlm.decoder.parameters()))


def test_time_and_memory_of_all_processes_of_a_stage_are_written(tmp_path: Path) -> None:
    memory = Memory()
    half = trainer(tmp_path, memory, Progress(), max_steps=2, log_every_n_steps=1)
    half.fit(lit(), data())
    half.save_checkpoint(tmp_path / "half.ckpt")
    first = Written.read(tmp_path)
    assert first is not None
    assert first.peak_bytes == memory.peak
    replace(first, started="2026-01-01T00:00:00+00:00", time="2026-01-01T00:01:00+00:00").write(tmp_path)
    checkpoint = tmp_path / "half.ckpt"
    trainer(tmp_path, Progress()).fit(lit(), data(), ckpt_path=str(checkpoint))
    second = Written.read(tmp_path)
    assert second is not None
    assert (second.first_step, second.seconds_before) == (2, 60.0)
    assert second.seconds >= 60


def test_a_file_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    known = ("step", "steps", "first_step", "tokens_per_s", "time", "started", "host", "pid", "slurm_job", "state")
    (tmp_path / "progress.json").write_text(json.dumps(dict.fromkeys(known) | {"more": 1}))
    read = Written.read(tmp_path)
    assert read is not None
    assert (read.seconds_before, read.trained, read.slots) == (0, 0, {})


def test_between_changes_it_is_written_every_few_seconds(tmp_path: Path, states: list[tuple[str, int]]) -> None:
    trainer(tmp_path, Progress(every=0)).fit(lit(), data())
    assert states == [("training", step) for step in range(5)] + [("finished", 4)]
    states.clear()
    trainer(tmp_path, Progress(every=100)).fit(lit(), data())
    assert states == [("training", 0), ("finished", 4)]


def test_why_training_ended_early_is_written(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        trainer(tmp_path, Progress(), Ends(RuntimeError("no\nmore"), 2)).fit(lit(), data())
    written = Written.read(tmp_path)
    assert written is not None
    assert (written.state, written.step, written.error) == ("failed", 2, "RuntimeError: no more")
    with pytest.raises(SystemExit):
        trainer(tmp_path, Progress(), Ends(SystemExit(PREEMPTED), 3)).fit(lit(), data())
    written = Written.read(tmp_path)
    assert written is not None
    assert (written.state, written.step, written.error) == ("preempted", 3, None)


def test_a_file_that_cannot_be_written_is_warned_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "progress.json").mkdir()
    trainer(tmp_path, Progress(every=0)).fit(lit(), data())
    said = [record.message for record in caplog.records if record.name == "callbacks.progress"]
    assert len(said) == 1
    assert said[0].startswith("progress.json cannot be written, so lit-vlm status says nothing of it: ")
    assert [file.name for file in tmp_path.iterdir()] == ["progress.json"]


def test_the_file_is_read_whole_or_not_at_all(tmp_path: Path) -> None:
    written = Written(
        1, None, 0, None, "2030-01-01T00:00:00+00:00", "2030-01-01T00:00:00+00:00", 0, "n", 1, "7", "failed"
    )
    written.write(tmp_path)
    assert Written.read(tmp_path) == written
    (tmp_path / "progress.json").write_text('{"step": 1')
    assert Written.read(tmp_path) is None
