"""A run that was stopped and resumed on a GPU has the weights of one that was not, bit by bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.gpu.systems import needs_values
from tests.runs import tiny_fit

ON_GPU = ("--trainer.accelerator", "gpu", "--trainer.devices", "1", "--trainer.deterministic", "warn",
          "--trainer.logger", "false", "--trainer.limit_val_batches", "0")  # fmt: skip


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_resumed_run_has_the_weights_of_an_uninterrupted_one(precision: str, tmp_path: Path) -> None:
    needs_values()
    flags = (*ON_GPU, "--trainer.precision", precision, "--model.stage.schedule", "constant")
    whole = tiny_fit(tmp_path, "whole", "2_sft", *flags, fresh=True)
    tiny_fit(tmp_path, "halves", "2_sft", *flags, "--trainer.max_steps", "2", fresh=True)
    resumed = tiny_fit(tmp_path, "halves", "2_sft", *flags, "--ckpt_path", "last", fresh=True)
    assert resumed.keys() == whole.keys()
    assert [name for name, value in whole.items() if not torch.equal(value, resumed[name])] == []
