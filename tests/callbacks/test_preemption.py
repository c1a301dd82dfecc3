"""A run that was asked to leave at any moment ends, when it goes on, with the weights of one that was not."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

from callbacks.preemption import Preemption
from lit_vlm.checkpoints.folder import checkpoints_in, is_done
from lit_vlm.checkpoints.weights import read_state
from lit_vlm.commands.recipe import find_recipe
from lit_vlm.core.launcher import PREEMPTED
from tests.runs import lit_vlm

FLAGS = ("--trainer.accelerator", "cpu", "--trainer.precision", "32-true", "--trainer.logger", "false",
         "--trainer.max_epochs", "-1", "--trainer.max_steps", "9", "--data.batch_size", "4",
         "--checkpoint.every_n_steps", "1000")  # fmt: skip
SIGNALLING = "tests.callbacks.signalling.SignalAt"


def fit(folder: Path, out: str, *flags: str, strategy: str = "single") -> subprocess.CompletedProcess[str]:
    configs = find_recipe("llava15").configs("2_sft", "tiny", strategy)
    words = [word for path in configs for word in ("--config", str(path.resolve()))]
    return lit_vlm(folder, "fit", *words, "--trainer.default_root_dir", out, *FLAGS, *flags, check=False)


def at(hook: str, step: int, name: str = "SIGUSR1", rank: int = 0) -> tuple[str, ...]:
    given = {"step": step, "hook": hook, "name": name, "rank": rank}
    callback = {"class_path": SIGNALLING, "init_args": given}
    return ("--trainer.callbacks+", json.dumps(callback))


def leave_and_go_on(folder: Path, out: str, *flags: str, sent: tuple[str, ...], strategy: str = "single") -> None:
    """A run that leaves in order, and goes on."""
    left = fit(folder, out, *flags, *sent, strategy=strategy)
    assert left.returncode == PREEMPTED, left.stderr[-3000:]
    assert "Traceback" not in left.stderr
    assert left.stderr.count("asked to leave (") == 1
    assert not is_done(folder / out)
    found = checkpoints_in(folder / out)
    on = ("--ckpt_path", str(found[-1])) if found else ()
    done = fit(folder, out, *flags, *on, strategy=strategy)
    assert done.returncode == 0, done.stderr[-3000:]
    assert is_done(folder / out)


EPOCHS = ("--trainer.limit_train_batches", "5")
WINDOWS = ("--trainer.accumulate_grad_batches", "2", "--data.num_workers", "2", *EPOCHS)
VALIDATED = ("--trainer.val_check_interval", "3", "--trainer.check_val_every_n_epoch", "null")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "moments"),
    [
        (EPOCHS, [("on_train_start", 0), ("on_after_backward", 3), ("on_train_batch_end", 5)]),
        (EPOCHS, [("on_train_epoch_end", 5)]),
        (WINDOWS, [("on_train_batch_start", 1), ("on_before_optimizer_step", 3)]),
        (VALIDATED, [("on_validation_batch_end", 6)]),
    ],
    ids=["epochs", "their end", "windows and workers", "validated"],
)
def test_one_process(flags: tuple[str, ...], moments: list[tuple[str, int]], tmp_path: Path) -> None:
    assert fit(tmp_path, "whole", *flags).returncode == 0
    whole = read_state(tmp_path / "whole")
    for name, (hook, step) in zip(("SIGUSR1", "SIGUSR2", "SIGTERM", "SIGUSR1"), moments, strict=False):
        leave_and_go_on(tmp_path, hook, *flags, sent=at(hook, step, name))
        found = read_state(tmp_path / hook)
        assert [key for key, value in whole.items() if not torch.equal(value, found[key])] == [], hook


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_of_which_one_is_asked(strategy: str, tmp_path: Path) -> None:
    flags = ("--trainer.devices", "2", "--data.batch_size", "2")
    assert fit(tmp_path, "whole", *flags, strategy=strategy).returncode == 0
    sent = at("on_after_backward", 3, rank=1)
    leave_and_go_on(tmp_path, "left", *flags, sent=sent, strategy=strategy)
    whole, found = read_state(tmp_path / "whole"), read_state(tmp_path / "left")
    assert [key for key, value in whole.items() if not torch.equal(value, found[key])] == []


def test_the_clock_asks_as_a_signal_does(tmp_path: Path) -> None:
    left = fit(tmp_path, "left", "--preemption.max_time", "00:00:00")
    assert left.returncode == PREEMPTED
    assert "asked to leave (preemption.max_time is over): nothing was trained" in left.stderr
    with pytest.raises(ValueError, match=r"preemption\.max_time is a time such as 04:00:00 or 1-12, not '4 h'"):
        Preemption(max_time="4 h")
    with pytest.raises(ValueError, match=r"preemption\.margin is a number of seconds, not -1"):
        Preemption(margin=-1)
