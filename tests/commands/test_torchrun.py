"""Runs that torchrun starts, and starts again."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from lit_vlm.checkpoints.folder import checkpoints_in
from lit_vlm.checkpoints.weights import read_state
from tests.runs import environment

RUN = ("run", "llava15", "--scale", "tiny", "--strategy", "ddp", "--stages", "2_sft", "--trainer.accelerator", "cpu",
       "--trainer.precision", "32-true", "--trainer.max_epochs", "-1", "--trainer.limit_val_batches", "0",
       "--checkpoint.every_n_steps", "5", "--trainer.max_steps", "40",
       "--trainer.callbacks+=tests.cluster.pause.Pause", "--trainer.callbacks.seconds", "0.1")  # fmt: skip


def start(folder: Path, *flags: str) -> subprocess.Popen[bytes]:
    agent = ("torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "2", "--master-port", "29577")
    command = [sys.executable, "-m", *agent, "-m", "lit_vlm", *RUN, *flags]
    with (folder / "said").open("w") as said:
        return subprocess.Popen(command, cwd=folder, env=environment(folder), stdout=said, stderr=said)


def stages(agent: int, rank: str) -> list[psutil.Process]:
    """Processes of stages below an agent, of one rank."""
    found = []
    for process in psutil.Process(agent).children(recursive=True):
        words = process.cmdline()
        if words[3:5] == ["lit_vlm", "fit"] and process.environ().get("RANK") == rank:
            found.append(process)
    return found


@pytest.mark.slow
def test_a_lost_process_is_started_again_and_the_run_goes_on(tmp_path: Path) -> None:
    whole = start(tmp_path, "--out", "whole")
    assert whole.wait(300) == 0, (tmp_path / "said").read_text()[-4000:]
    agent = start(tmp_path, "--out", "cut")
    while agent.poll() is None and not checkpoints_in(tmp_path / "cut" / "2_sft"):
        time.sleep(0.05)
    (process,) = stages(agent.pid, "1")
    process.send_signal(signal.SIGKILL)
    assert agent.wait(300) == 0, (tmp_path / "said").read_text()[-4000:]
    said = (tmp_path / "said").read_text()
    assert "going on: done nothing yet" in said
    expected, found = read_state(tmp_path / "whole" / "2_sft"), read_state(tmp_path / "cut" / "2_sft")
    assert [name for name, value in expected.items() if not torch.equal(value, found[name])] == []


@pytest.mark.slow
def test_a_run_without_a_name_gets_a_folder_that_all_processes_know(tmp_path: Path) -> None:
    agent = start(tmp_path, "--trainer.max_steps", "2")
    assert agent.wait(300) == 0, (tmp_path / "said").read_text()[-4000:]
    (folder,) = (one for one in (tmp_path / "runs").iterdir() if not one.name.startswith("."))
    assert folder.name.startswith("llava15-tiny-2")
    assert checkpoints_in(folder / "2_sft")
