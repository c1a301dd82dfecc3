"""Checkpoints of two sharded processes give another number of them the same weights and optimizer, bit by bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from tests.runs import tiny_fit

SHARDS = '{"class_path": "lit_vlm.training.sharding.FSDP2", "init_args": {"replicas": %d}}'
WHOLE = "--trainer.strategy.init_args.save_distributed_checkpoint=false"


class SavesAgain(L.Callback):
    """Saves what was read from a checkpoint, before anything is trained."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "again.ckpt")


def fit(folder: Path, out: str, devices: int, replicas: int, *flags: str) -> None:
    callbacks = json.dumps([{"class_path": "tests.training.test_resharded.SavesAgain"}])
    tiny_fit(folder, out, "2_sft", "--trainer.logger", "false", "--model.stage.optimizer", "muon",
             "--trainer.limit_val_batches", "0", "--data.batch_size", "2", "--trainer.callbacks+", callbacks,
             "--trainer.strategy", SHARDS % replicas, "--trainer.devices", str(devices),
             "--trainer.max_steps", "2", *flags, strategy="fsdp")  # fmt: skip


def content(path: Path) -> dict[str, Tensor]:
    """All tensors of weights and optimizer, by name."""
    if path.is_dir():
        state: dict[str, Any] = {}
        _load_state_dict(state, FileSystemReader(path), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    else:
        whole = torch.load(path, map_location="cpu", weights_only=True)
        state = {key: whole[key] for key in ("state_dict", "optimizer_states", "raw_weights") if key in whole}
    found: dict[str, Tensor] = {}

    def gather(value: Any, name: str) -> None:
        if isinstance(value, Tensor):
            found[name] = value
        elif isinstance(value, dict | list):
            for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
                gather(entry, f"{name}.{key}")

    gather(state, "")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("form", ["sharded", "whole"])
def test_another_number_of_processes_reads_the_same_weights_and_optimizer(form: str, tmp_path: Path) -> None:
    flags = [WHOLE] if form == "whole" else []
    fit(tmp_path, "two", 2, 1, *flags)
    path = tmp_path / "two" / "checkpoints" / "step=00000002.ckpt"
    assert path.is_dir() == (form == "sharded")
    expected = content(path)
    names = list(expected)
    assert any("momentum_buffer" in name for name in names)
    assert any("exp_avg_sq" in name for name in names)
    for devices, replicas in ((1, 1), (4, 1), (4, 2)):
        out = f"{devices}-{replicas}"
        more = ("--trainer.max_steps", "3", "--ckpt_path", str(path))
        fit(tmp_path, out, devices, replicas, *flags, *more)
        found = content(tmp_path / out / "again.ckpt")
        assert found.keys() == expected.keys()
        assert [name for name in names if not torch.equal(found[name], expected[name])] == []
