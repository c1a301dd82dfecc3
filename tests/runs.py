"""Runs through the command line, shared by the tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from lit_vlm.checkpoints.weights import read_state
from lit_vlm.commands.cli import main
from lit_vlm.commands.recipe import find_recipe
from tests.tiny import ROOT


def environment(folder: Path) -> dict[str, str]:
    """Of a process whose runs are tracked in `folder`."""
    return os.environ | {
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }


def lit_vlm(folder: Path, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    result = subprocess.run(
        [sys.executable, "-m", "lit_vlm", *arguments],
        cwd=folder,
        env=environment(folder),
        capture_output=True,
        text=True,
    )
    assert not check or result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    return result


def tiny_fit(
    folder: Path, out: str, stage: str, *flags: str, strategy: str = "single", recipe: str = "llava15"
) -> dict[str, torch.Tensor]:
    """The weights that a stage leaves after four steps in fp32."""
    configs = find_recipe(recipe).configs(stage, "tiny", strategy)
    words = [word for path in configs for word in ("--config", str(path))]
    lit_vlm(folder, "fit", *words, "--trainer.default_root_dir", out, "--trainer.accelerator", "cpu",
            "--trainer.precision", "32-true", "--trainer.max_steps", "4", *flags)  # fmt: skip
    return read_state(folder / out)


def one_step(folder: Path, recipe: str, stage: str) -> Path:
    """A run of one step in this process; its folder."""
    words = [word for path in find_recipe(recipe).configs(stage, "tiny", "single") for word in ("--config", str(path))]
    flags = ["--trainer.max_steps", "1", "--trainer.limit_val_batches", "0", "--trainer.logger", "false"]
    main(["fit", *words, *flags, "--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(folder)])
    return folder
