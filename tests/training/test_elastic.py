"""Stages that go on with another number of devices: the samples, rates, validations and weights of the whole run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.loops.progress import _BatchProgress
from torch import Tensor

from lit_vlm.checkpoints.weights import read_place, read_state
from lit_vlm.core.batch import Batch
from lit_vlm.data import ChatML, VLMData
from lit_vlm.data.feed.batching import GlobalBatch
from lit_vlm.data.feed.elastic import Moved
from lit_vlm.data.sample.transforms import Resize
from lit_vlm.training.elastic import keep_step, move
from tests.data.made import Count
from tests.runs import tiny_fit


class Seen(L.Callback):
    """Notes which samples each optimizer step takes, its learning rate, and after which steps validation begins."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int, Any]] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, *_: Any) -> None:
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        self.events += [("rate", trainer.global_step, rate)]
        self.events += [("sample", trainer.global_step, f"{one.source} {one.id}") for one in batch.samples]

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.events.append(("validation", trainer.global_step, trainer.global_rank))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        folder = Path(trainer.default_root_dir)
        (folder / f"seen-{trainer.global_rank}.json").write_text(json.dumps(self.events))


SOURCES = {
    "a": {"class_path": "lit_vlm.worlds.Shapes", "init_args": {"count": 40}},
    "b": {"class_path": "lit_vlm.worlds.Shapes", "init_args": {"count": 30, "seed": 5}},
}
FLAGS = {
    "Padded": ["--data.batching", "Padded"],
    "Packed": ["--data.batching", "Packed", "--data.batching.window", "40", "--data.max_length", "600"],
}
SAMPLES = {"Padded": 50, "Packed": 150}


def fit(folder: Path, out: str, strategy: str, batching: str, *flags: str) -> dict[str, Tensor]:
    """Two epochs of steps of twelve rows; the last step of an epoch is short."""
    mixture = {"weights": {"a": 0.7, "b": 0.3}, "samples": SAMPLES[batching]}
    words = ["--data.train", json.dumps(SOURCES), *FLAGS[batching], "--data.batch_size", "3"]
    words += ["--data.mixture", json.dumps({"class_path": "Weighted", "init_args": mixture})]
    words += ["--trainer.callbacks+", json.dumps([{"class_path": "tests.training.test_elastic.Seen"}])]
    words += ["--trainer.max_steps", "10", "--trainer.max_epochs", "2", "--trainer.val_check_interval", "2"]
    words += ["--trainer.limit_val_batches", "1", "--trainer.logger", "false"]
    words += ["--checkpoint.every_n_steps", "1", "--checkpoint.keep", "-1"]
    return tiny_fit(folder, out, "2_sft", *words, *flags, strategy=strategy)


def seen(folder: Path, kind: str) -> list[list[Any]]:
    """What all ranks noted of a kind, by optimizer step: sorted, from the first step that was taken to the last."""
    events = [event for file in folder.glob("seen-*.json") for event in json.loads(file.read_text())]
    steps: dict[int, list[Any]] = {}
    for _, step, value in filter(lambda event: event[0] == kind, events):
        steps.setdefault(step, []).append(value)
    return [[step, *sorted(steps[step])] for step in sorted(steps)]


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "batching"), [("ddp", "Packed"), ("fsdp", "Padded")])
def test_a_run_on_other_devices_is_the_whole_run(strategy: str, batching: str, tmp_path: Path) -> None:
    whole = fit(tmp_path, "whole", strategy, batching, "--trainer.devices", "4")
    checkpoints = tmp_path / "whole" / "checkpoints"
    assert len(seen(tmp_path / "whole", "sample")) == 10
    begun = read_state(checkpoints / "step=00000001.ckpt")
    assert max(float((value - begun[name]).abs().max()) for name, value in whole.items()) > 1e-5
    for devices, done, dealt in ((2, 3, [3, 2, 2]), (3, 7, [2, 3, 2])):
        out = f"{devices}-{done}"
        path = str(checkpoints / f"step={done:08d}.ckpt")
        found = fit(tmp_path, out, strategy, batching, "--trainer.devices", str(devices), "--ckpt_path", path)
        place = read_place(tmp_path / out)
        assert place is not None
        assert (place["dealt"], place["ordered_for"]) == (dealt, [3, 4, 1])
        assert seen(tmp_path / out, "sample") == seen(tmp_path / "whole", "sample")[done:]
        for kind in ("rate", "validation"):
            expected = [event[:2] for event in seen(tmp_path / "whole", kind) if event[0] >= done + (kind != "rate")]
            assert [event[:2] for event in seen(tmp_path / out, kind)] == expected
        for name, value in whole.items():
            torch.testing.assert_close(found[name], value, atol=1e-7, rtol=0, msg=name)


# ----- counters and settings of micro-batches -----

THEN, NOW = GlobalBatch(1, 4, 3), GlobalBatch(2, 3, 2)


def progress(total: int, current: int, open_: int = 0) -> _BatchProgress:
    """Counts behind a number of batches, of which the last `open_` is not completed."""
    counts = _BatchProgress()
    for tracker, done in ((counts.total, total), (counts.current, current)):
        tracker.increment_by(done)
        tracker.completed -= open_
    return counts


@pytest.mark.parametrize(
    ("total", "current", "expected"),
    [(6, 6, (4, 4)), (13, 13, (9, 9)), (13 + 3, 3, (9 + 2, 2)), (26, 13, (18, 9)), (13, 0, (9, 0))],
    ids=["inside", "at the end", "later epoch", "later end", "not begun"],
)
@pytest.mark.parametrize("open_", [0, 1])
def test_counters_go_on_at_the_same_step(total: int, current: int, expected: tuple[int, int], open_: int) -> None:
    counts = progress(total, current, open_)
    move(counts, Moved(THEN, NOW, 51), 13, 9)
    assert counts == progress(*expected, open_)


def test_an_epoch_of_another_number_of_steps_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"had 2 optimizer steps when .* has 3 now: trainer.limit_train_batches counts"
    ):
        move(progress(3, 3), Moved(THEN, NOW, 51), 6, 6)


def settings(accumulate: int, batch_size: int, **limits: int | float) -> tuple[L.Trainer, VLMData]:
    trainer = L.Trainer(accelerator="cpu", devices=2, accumulate_grad_batches=accumulate, logger=False, **limits)  # type: ignore[arg-type]
    return trainer, VLMData([Count("a", 99)], ChatML(), Resize(), batch_size=batch_size)


def place_of(dealt: GlobalBatch) -> dict[str, Any]:
    return {"dealt": list(dealt), "ordered_for": list(dealt)}


def test_settings_follow_the_number_of_devices() -> None:
    trainer, data = settings(1, 8, limit_train_batches=5, val_check_interval=3, limit_val_batches=0.5)
    lines = keep_step(trainer, data, place_of(GlobalBatch(8, 8)))
    assert (data.batch_size, trainer.accumulate_grad_batches) == (8, 4)
    assert (trainer.limit_train_batches, trainer.val_check_interval, trainer.limit_val_batches) == (20, 12, 0.5)
    assert lines[0].startswith("8 → 2 devices: 8 rows × 8 devices → 8 rows × 2 devices × 4 micro-batches = 64 rows")
    assert lines[1:] == [
        "trainer.limit_train_batches counts micro-batches: 5 → 20",
        "trainer.val_check_interval counts micro-batches: 3 → 12",
    ]


def test_settings_stay_where_nothing_changed_or_nothing_is_known() -> None:
    for place in (None, {"batches": 3}, place_of(GlobalBatch(8, 2, 3)), place_of(GlobalBatch(12, 4, 1))):
        trainer, data = settings(3, 8)
        assert keep_step(trainer, data, place) == []
        assert (data.batch_size, trainer.accumulate_grad_batches) == (8, 3)


def test_an_interval_that_does_not_divide_is_rounded_up_and_a_limit_of_training_refused() -> None:
    trainer, data = settings(4, 8, val_check_interval=6)
    lines = keep_step(trainer, data, place_of(GlobalBatch(8, 1, 4)))
    assert trainer.accumulate_grad_batches == 2
    assert lines[1:] == ["trainer.val_check_interval counts micro-batches: 6 → 3"]
    trainer, data = settings(4, 8, val_check_interval=5)
    keep_step(trainer, data, place_of(GlobalBatch(8, 1, 4)))
    assert trainer.val_check_interval == 3
    trainer, data = settings(4, 8, limit_train_batches=5)
    with pytest.raises(
        ValueError, match=r"limit_train_batches 5 .* no whole number .*2 in the place of 4.*multiple of"
    ):
        keep_step(trainer, data, place_of(GlobalBatch(8, 1, 4)))
