"""Runs through the command line, shared by the tests."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from lit_vlm.checkpoints.weights import read_state
from lit_vlm.commands.cli import main
from lit_vlm.commands.recipe import find_recipe
from tests.forkserver import FIXED, interpreter


def environment(folder: Path) -> dict[str, str]:
    """Environment variables of a process whose MLflow runs are stored in `folder`."""
    return os.environ | FIXED | {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}


def lit_vlm(folder: Path, *arguments: str, check: bool = True, fresh: bool = False) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process: a fork (`forkserver`), or a fresh one that imports everything anew."""
    result = subprocess.run(
        [sys.executable if fresh else interpreter(), "-m", "lit_vlm", *arguments],
        cwd=folder,
        env=environment(folder),
        capture_output=True,
        text=True,
    )
    assert not check or result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    return result


def tiny_fit(
    folder: Path,
    out: str,
    stage: str,
    *flags: str,
    strategy: str = "single",
    recipe: str = "llava15",
    fresh: bool = False,
) -> dict[str, torch.Tensor]:
    """Train a tiny stage for four steps in fp32; returns its weights by name."""
    configs = find_recipe(recipe).configs(stage, "tiny", strategy)
    words = [word for path in configs for word in ("--config", str(path.resolve()))]
    lit_vlm(folder, "fit", *words, "--trainer.default_root_dir", out, "--trainer.accelerator", "cpu",
            "--trainer.precision", "32-true", "--trainer.max_steps", "4", *flags, fresh=fresh)  # fmt: skip
    return read_state(folder / out)


def run_ranks(folder: Path, module: str, *arguments: str, world: int = 2) -> None:
    """Run `python -m MODULE RANK ARGUMENTS` for all ranks at the same time; if one fails, the others are killed."""
    logs = [folder / f"rank-{rank}.log" for rank in range(world)]
    ranks = []
    for rank, log in enumerate(logs):
        command = [interpreter(), "-m", module, str(rank), *arguments]
        with log.open("w") as file:
            ranks.append(subprocess.Popen(command, cwd=folder, env=environment(folder), stderr=file))
    while None in (codes := [process.poll() for process in ranks]) and not any(codes):
        time.sleep(0.02)
    for process in ranks:
        process.kill()
        process.wait()
    assert not any(codes), "\n".join(log.read_text()[-3000:] for log in logs)


@contextmanager
def gathered(folder: str, rank: int, world: int = 2) -> Iterator[None]:
    """A process group over the ranks of `run_ranks`, which all leave together."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    yield
    dist.barrier()
    dist.destroy_process_group()


def one_step(folder: Path, recipe: str, stage: str, *own: str) -> Path:
    """Train a tiny stage for one step in this process, with further flags; returns the folder of the run."""
    words = [word for path in find_recipe(recipe).configs(stage, "tiny", "single") for word in ("--config", str(path))]
    flags = ["--trainer.max_steps", "1", "--trainer.limit_val_batches", "0", "--trainer.logger", "false"]
    main(["fit", *words, *flags, "--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(folder), *own])
    return folder
