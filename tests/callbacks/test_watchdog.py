"""Runs of two processes in which one is killed, stopped, stuck or fails; and one in which nothing is wrong."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from mlflow import MlflowClient

from callbacks import Watchdog
from lit_vlm.commands.recipe import find_recipe
from lit_vlm.core.launcher import HUNG, LOST
from lit_vlm.training.heartbeat import Peers
from tests.callbacks.test_callbacks import data, lit, trainer
from tests.forkserver import interpreter
from tests.runs import environment

SOON = 30.0
"""Seconds from the trouble of one process to the end of the others."""


class Ended(NamedTuple):
    codes: list[int]
    said: list[str]
    seconds: float


def two_ranks(folder: Path, trouble: dict[str, str], *flags: str) -> Ended:
    """Train a tiny stage on two processes, each on a machine of its own as far as it knows, with trouble in one."""
    configs = [
        word for path in find_recipe("llava15").configs("2_sft", "tiny", "ddp") for word in ("--config", path.resolve())
    ]
    words = ["fit", *map(str, configs), "--trainer.default_root_dir", "out", "--trainer.accelerator", "cpu",
             "--trainer.devices", "1", "--trainer.num_nodes", "2", "--trainer.precision", "32-true",
             "--data.batch_size", "4", "--trainer.max_steps", "6", "--trainer.enable_progress_bar", "false",
             "--trainer.callbacks+", "tests.callbacks.trouble.Trouble",
             *(word for key, value in trouble.items() for word in (f"--trainer.callbacks.{key}", value)),
             *flags]  # fmt: skip
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ranks = []
    for rank in range(2):
        own = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": "0",
               "GROUP_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "test",
               "SLURMD_NODENAME": f"n{rank}"}  # fmt: skip
        with (folder / f"rank-{rank}.log").open("w") as log:
            command = [interpreter(), "-m", "lit_vlm", *words]
            ranks.append(subprocess.Popen(command, cwd=folder, env=environment(folder) | own, stderr=log))
    stopped = int(trouble["rank"]) if trouble["what"] == "stop" else None
    for rank, process in enumerate(ranks):
        if rank != stopped:
            process.wait(timeout=300)
    mark = folder / "out" / "trouble"
    seconds = time.time() - mark.stat().st_mtime if mark.exists() else 0.0
    if stopped is not None:
        os.kill(int(mark.read_text()), signal.SIGKILL)
        ranks[stopped].wait(timeout=60)
    logs = [(folder / f"rank-{rank}.log").read_text() for rank in range(2)]
    return Ended([process.returncode for process in ranks], logs, seconds)


def run_of(folder: Path) -> tuple[str, str | None]:
    """Status of the MLflow run, and why it failed."""
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    (run,) = client.search_runs([one.experiment_id for one in client.search_experiments()])
    return run.info.status, run.data.tags.get("failure")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "what", "reason"),
    [
        pytest.param(1, "kill", "rank 1 on node n1 is gone: its process ended", id="killed"),
        pytest.param(0, "kill", "rank 0 on node n0 is gone: its process ended", id="first-killed"),
        pytest.param(1, "stop", "rank 1 on node n1 is gone: no sign of life for 5 s", id="stopped"),
        pytest.param(1, "fail", "rank 1 on node n1 failed: ValueError: the sample is broken", id="failed"),
    ],
)
def test_the_loss_of_a_process_ends_the_other_with_one_line(tmp_path: Path, rank: int, what: str, reason: str) -> None:
    ended = two_ranks(tmp_path, {"rank": str(rank), "what": what}, "--watchdog.lost_after", "5")
    other = 1 - rank
    assert ended.codes[other] == LOST, ended.said
    assert ended.codes[rank] == (1 if what == "fail" else -signal.SIGKILL), ended.said
    said = [line for line in ended.said[other].splitlines() if line.startswith("watchdog")]
    assert said == [f"watchdog: {reason}; this run ends with code {LOST}"], ended.said
    assert "Traceback" not in ended.said[other]
    assert ended.seconds < SOON
    assert run_of(tmp_path)[0] == "FAILED"
    assert run_of(tmp_path)[1] == reason


@pytest.mark.slow
def test_a_hang_ends_all_with_the_stacks_of_their_threads_and_workers(tmp_path: Path) -> None:
    flags = ["--watchdog.hang_after", "8", "--data.num_workers", "1"]
    ended = two_ranks(tmp_path, {"rank": "1", "what": "sleep"}, *flags)
    assert ended.codes == [HUNG, HUNG], ended.said
    reason = "no batch, save or forward pass has ended for 8 s, and rank 1 on node n1 is behind the others"
    for rank, said in enumerate(ended.said):
        assert f"watchdog: {reason}; this run ends with code {HUNG}" in said
        assert f"watchdog: rank {rank} on node n{rank}: stacks of all threads" in said
        worker = said.partition(f"watchdog: rank {rank} on node n{rank}: stacks of Process")[2]
        assert "_worker_loop" in worker
    assert "trouble.py" in ended.said[1]
    assert "trouble.py" not in ended.said[0]
    assert run_of(tmp_path) == ("FAILED", reason)


@pytest.mark.slow
def test_nothing_is_said_of_a_run_that_validates_and_saves(tmp_path: Path) -> None:
    flags = ["--checkpoint.every_n_steps", "2", "--trainer.val_check_interval", "3", "--watchdog.lost_after", "20"]
    ended = two_ranks(tmp_path, {"rank": "1", "what": "nothing"}, *flags)
    assert ended.codes == [0, 0], ended.said
    assert "watchdog" not in "".join(ended.said)
    assert run_of(tmp_path) == ("FINISHED", None)


def test_nothing_of_the_watchdog_is_left_behind_a_run(tmp_path: Path) -> None:
    module = lit()
    trainer(tmp_path, Watchdog()).fit(module, data())
    assert not [thread for thread in threading.enumerate() if thread.name == "watchdog"]
    assert not module.vlm.decoder._forward_hooks


def test_an_error_of_the_watchdog_itself_ends_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def look(*_: object) -> None:
        raise OSError("no more descriptors")

    monkeypatch.setattr(Peers, "look", look)
    run = trainer(tmp_path, Watchdog())
    run.fit(lit(), data())
    assert run.global_step == 4
    assert "the watchdog of rank 0 on node 0 has stopped; training goes on" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"hang_after": 0.0}, "watchdog.hang_after is above 0 s"), ({"lost_after": 1.0}, "lost_after is at least 5 s")],
)
def test_seconds_that_make_no_sense_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Watchdog(**settings)
