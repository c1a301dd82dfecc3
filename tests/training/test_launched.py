"""A trainer takes the processes that were started, or says how to start what it wants."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.plugins.environments import LightningEnvironment, TorchElasticEnvironment

from lit_vlm.commands.recipe import find_recipe
from lit_vlm.core.launcher import Launch, launch
from lit_vlm.training.launched import Launched, agree, environment, spread
from lit_vlm.training.trainer import Trainer
from tests.forkserver import FIXED
from tests.runs import lit_vlm
from tests.tiny import ROOT

ALONE, SHELL, SCRIPT = Launch("alone"), Launch("srun", id="7.0"), Launch("batch", id="7")
STEP = Launch("srun", 1, 4, 1, "n1", "7.0", nodes=2, per_node=2)
UNEVEN = Launch("srun", 1, 3, 1, "n1", "7.0", nodes=2, per_node=0)
AGENTS = Launch("torchrun", 1, 2, 1, nodes=1, per_node=2)
FILES = find_recipe("llava15").configs("2_sft", "tiny", "ddp")
WORDS = [word for file in FILES for word in ("--config", str(file.resolve()))]
QUIET: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "precision": "32-true"}


@pytest.mark.parametrize(
    ("devices", "num_nodes", "started", "expected"),
    [
        ("auto", "auto", ALONE, ("auto", 1)),
        (4, 2, ALONE, (4, 2)),
        ("auto", "auto", SCRIPT, ("auto", 1)),
        ("auto", "auto", STEP, (2, 2)),
        (-1, "auto", STEP, (2, 2)),
        ([0, 1], 2, STEP, ([0, 1], 2)),
        ("auto", "auto", AGENTS, (2, 1)),
        ("auto", "auto", UNEVEN, ("auto", 1)),
    ],
)
def test_auto_is_what_the_launcher_started(
    devices: Any, num_nodes: Any, started: Launch, expected: tuple[Any, int]
) -> None:
    assert spread(devices, num_nodes, started) == expected


@pytest.mark.parametrize(
    ("devices", "num_nodes", "started", "visible"),
    [
        ("auto", "auto", STEP, None),
        ("auto", "auto", STEP, 2),
        (2, 2, STEP, 8),
        ("0,1", "auto", STEP, None),
        ("2", "auto", STEP, None),
        ([3, 4], "auto", AGENTS, 8),
        (8, 1, SHELL, 8),
        ("auto", "auto", SHELL, 8),
        (4, 4, ALONE, None),
        (4, 1, SCRIPT, None),
    ],
)
def test_what_fits_the_launch_is_taken(devices: Any, num_nodes: Any, started: Launch, visible: int | None) -> None:
    agree(devices, num_nodes, started, (2, 2) if num_nodes == 1 else (1, 1), visible)


@pytest.mark.parametrize(
    ("devices", "num_nodes", "started", "visible", "message"),
    [
        (
            *(1, "auto", STEP, None),
            "srun started 4 processes on 2 nodes (2 on each), but trainer.num_nodes is auto and trainer.devices is 1: "
            "start `srun --nodes=2 --ntasks-per-node=1`, or add --trainer.num_nodes 2 --trainer.devices 2",
        ),
        (
            *("auto", 1, STEP, None),
            "but trainer.num_nodes is 1 and trainer.devices is auto: start `srun --nodes=1 --ntasks-per-node=2`, or",
        ),
        (
            *([0], 1, AGENTS, None),
            "torchrun started 2 processes on 1 node (2 on each), but trainer.num_nodes is 1 and trainer.devices is "
            "[0]: start `torchrun --nnodes=1 --nproc-per-node=1`, or add --trainer.num_nodes 1 --trainer.devices 2",
        ),
        (*("auto", "auto", AGENTS, 8), "trainer.devices is auto, of which there are 8: start `torchrun --nnodes=1 --n"),
        (
            *("auto", "auto", UNEVEN, None),
            "srun started 3 processes on 2 nodes, not as many on each: start `srun --nodes=2 --ntasks-per-node=2`",
        ),
        (
            *(2, 2, STEP, 1),
            "srun started 4 processes on 2 nodes (2 on each), but this one sees 1 GPU: if the node has more, ask for "
            "them by --gpus-per-node=2 --gpu-bind=none in place of --gpus-per-task; if not, start `srun --nodes=2 "
            "--ntasks-per-node=1`",
        ),
        (*("auto", "auto", AGENTS, 1), "(2 on each), but this one sees 1 GPU: start `torchrun --nnodes=1 --nproc-per"),
        (
            *(1, 2, SHELL, None),
            "trainer.num_nodes is 2, but the command was started by srun as one task: start it by `srun --nodes=2 "
            "--ntasks-per-node=DEVICES`, or add --trainer.num_nodes 1",
        ),
        (*("", "auto", AGENTS, 2), "trainer.devices is '': give a number, a list such as 0,1, or auto"),
        (*(" ,", "auto", AGENTS, 2), "trainer.devices is ' ,': give a number, a list such as 0,1, or auto"),
        (*(1, 2, SCRIPT, None), "trainer.num_nodes is 2, but the command was started without srun: start it by `srun"),
        (
            *("auto", "auto", SCRIPT, None),
            "this job has 4 tasks on 2 nodes, but the command was started without srun, as one process: put `srun` in "
            "front of it, or add --trainer.num_nodes 1 if one process is meant",
        ),
    ],
)
def test_what_does_not_fit_the_launch_is_refused_with_both_fixes(
    devices: Any, num_nodes: Any, started: Launch, visible: int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        agree(devices, num_nodes, started, (4, 2), visible)


def step(rank: int = 1, **others: str) -> dict[str, str]:
    """The variables of a task that srun started beside another one, in a job of two nodes."""
    job = {"SLURM_JOB_ID": "12", "SLURM_NTASKS": "2", "SLURM_JOB_NUM_NODES": "2", "SLURM_PROCID": str(rank)}
    own = {"SLURM_STEP_ID": "3", "SLURM_LOCALID": "0", "SLURM_NODEID": str(rank), "SLURM_STEP_NODELIST": "n[2-3]"}
    return job | own | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2"} | others


def test_who_starts_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    for started in (ALONE, SHELL, SCRIPT):
        assert isinstance(environment(started), LightningEnvironment)
    assert isinstance(environment(Launch("torchrun", 0, 1)), Launched)  # of another program
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "mine")
    assert isinstance(environment(AGENTS), TorchElasticEnvironment)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    for name, value in step().items():
        monkeypatch.setenv(name, value)
    found = environment(launch())
    assert isinstance(found, Launched)
    assert (found.global_rank(), found.world_size(), found.local_rank(), found.node_rank()) == (1, 2, 0, 1)
    assert found.main_address == "n2"
    assert found.main_port == 15000 + 12 * 101 + 3 * 13
    with pytest.raises(ValueError, match="srun started 2 processes on 2 nodes"):
        found.validate_settings(num_devices=1, num_nodes=1)


def test_the_trainer_takes_the_numbers_and_a_given_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in step().items():
        monkeypatch.setenv(name, value)
    trainer = Trainer(strategy="ddp", **QUIET)
    assert (trainer.num_nodes, trainer.num_devices, trainer.world_size, trainer.global_rank) == (2, 1, 2, 1)
    own = LightningEnvironment()
    alone = Trainer(plugins=own, num_nodes=1, **QUIET)
    assert alone._accelerator_connector.cluster_environment is own


@pytest.mark.parametrize(
    ("variables", "flags", "message"),
    [
        (step(), ["--trainer.num_nodes", "1"], "error: srun started 2 processes on 2 nodes (1 on each), but trainer"),
        ({"SLURM_JOB_ID": "12", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, [], "error: this job has 2 tasks on 1 node"),
    ],
    ids=["srun", "batch"],
)
def test_a_stage_says_so_before_it_reads_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], flags: list[str], message: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    result = lit_vlm(tmp_path, "fit", *WORDS, "--data.train", "nowhere.json", "--trainer.accelerator", "cpu", *flags,
                     check=False)  # fmt: skip
    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_job_script_of_several_tasks_trains_as_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SLURM_JOB_ID": "12", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}.items():
        monkeypatch.setenv(name, value)
    flags = ["--trainer.num_nodes", "1", "--trainer.devices", "1", "--trainer.max_steps", "1"]
    flags += ["--trainer.limit_val_batches", "0", "--trainer.logger", "false", "--trainer.accelerator", "cpu"]
    result = lit_vlm(tmp_path, "fit", *WORDS, *flags, "--trainer.default_root_dir", str(tmp_path / "out"))
    assert list((tmp_path / "out" / "checkpoints").iterdir()), result.stderr


@pytest.mark.slow
def test_processes_that_are_started_again_do_not_meet_those_that_are_gone() -> None:
    agent = ["torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1", "--rdzv-backend", "c10d"]
    words = [sys.executable, "-m", *agent, "--rdzv-endpoint", "localhost:0", "-m", "tests.training.restarted"]
    done = subprocess.run(words, cwd=ROOT, env=os.environ | FIXED, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    said = re.findall(r"rank \d: \d", done.stdout)  # two processes write line ends when they like
    assert sorted(said) == ["rank 0: 2", "rank 1: 2"]
