"""Folders that hold a run, and which precision a run goes on in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lit_vlm.commands.fit import REFUSED
from lit_vlm.commands.lightning_cli import _precision_begun, _refuse_other_run
from lit_vlm.commands.recipe import find_recipe
from tests.runs import lit_vlm, tiny_fit


def checkpoint(folder: Path) -> Path:
    file = folder / "checkpoints" / "step=00000002.ckpt"
    file.parent.mkdir(parents=True)
    torch.save({}, file)
    return file


def test_a_folder_with_a_run_is_refused_unless_that_run_goes_on(tmp_path: Path) -> None:
    _refuse_other_run(tmp_path / "new", None)
    file = checkpoint(tmp_path / "a")
    other = checkpoint(tmp_path / "b")
    for given in (None, str(other)):
        with pytest.raises(ValueError, match="a holds a run already, whose newest checkpoint is step=00000002.ckpt"):
            _refuse_other_run(tmp_path / "a", given)
    for given in (str(file), "last", "best"):
        _refuse_other_run(tmp_path / "a", given)


def test_a_checkpoint_that_lightning_would_take_before_any_other_is_refused(tmp_path: Path) -> None:
    (tmp_path / "hpc_ckpt_1.ckpt").touch()
    with pytest.raises(ValueError, match=r"hpc_ckpt_1.ckpt is a checkpoint that an earlier version left"):
        _refuse_other_run(tmp_path, "last")


@pytest.mark.parametrize(
    ("written", "found"),
    [
        ("trainer:\n  precision: bf16-mixed", "bf16-mixed"),
        ("trainer:\n  precision: null", "32-true"),
        ("trainer:\n  max_steps: 3", "32-true"),
        ("title: a config of something else", "auto"),
    ],
)
def test_a_run_goes_on_in_its_precision(tmp_path: Path, written: str, found: str) -> None:
    (tmp_path / "config.yaml").write_text(written)
    file = checkpoint(tmp_path)
    assert _precision_begun(tmp_path / "new", str(file)) == found
    assert _precision_begun(tmp_path, "last") == found
    assert _precision_begun(tmp_path, None) == "auto"  # begun anew


def test_a_checkpoint_far_from_its_run_goes_on_in_what_this_device_is_fast_in(tmp_path: Path) -> None:
    assert _precision_begun(tmp_path / "new", str(checkpoint(tmp_path))) == "auto"
    assert _precision_begun(tmp_path, "last") == "auto"


def test_last_is_the_newest_checkpoint_and_another_number_of_devices_must_divide(tmp_path: Path) -> None:
    flags = ["--trainer.logger", "false", "--trainer.limit_val_batches", "0", "--data.batch_size", "2"]
    result = refused(tmp_path, "run", *flags, "--ckpt_path", "last")
    assert "there is no complete checkpoint in run/checkpoints" in result
    tiny_fit(tmp_path, "run", "2_sft", *flags, "--trainer.max_steps", "1")
    tiny_fit(tmp_path, "run", "2_sft", *flags, "--trainer.max_steps", "2", "--ckpt_path", "last")
    resumed = (tmp_path / "run" / "config-resumed.yaml").read_text()
    assert "ckpt_path: run/checkpoints/step=00000001.ckpt" in resumed
    result = refused(tmp_path, "run", *flags, "--ckpt_path", "last", "--trainer.devices", "3")
    assert "error: 2 rows per optimizer step, as this run began with (2 rows × 1 device), do not divide by 3" in result


def refused(folder: Path, out: str, *flags: str) -> str:
    """What a stage of the tiny LLaVA that does not begin writes to standard error."""
    words = [
        word
        for path in find_recipe("llava15").configs("2_sft", "tiny", "ddp")
        for word in ("--config", str(path.resolve()))
    ]
    words += ["--trainer.accelerator", "cpu", "--trainer.default_root_dir", out, *flags]
    result = lit_vlm(folder, "fit", *words, check=False)
    assert result.returncode == REFUSED
    return result.stderr
