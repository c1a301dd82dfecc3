"""Folders that hold a run, and which precision a run goes on in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lit_vlm.lightning_cli import _precision_of, _refuse_other_run


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
    for given in (str(file), "last", "best", "hpc"):
        _refuse_other_run(tmp_path / "a", given)
    # What Lightning saves when SLURM takes a job away: the same command goes on from it.
    (tmp_path / "a" / "hpc_ckpt_1.ckpt").touch()
    _refuse_other_run(tmp_path / "a", None)


@pytest.mark.parametrize(
    ("written", "found"),
    [("precision: bf16-mixed", "bf16-mixed"), ("precision: null", "32-true"), ("max_steps: 3", "32-true")],
)
def test_a_run_goes_on_in_its_precision(tmp_path: Path, written: str, found: str) -> None:
    (tmp_path / "config.yaml").write_text(f"trainer:\n  {written}\n")
    assert _precision_of(checkpoint(tmp_path)) == found
    assert _precision_of(tmp_path) == found
