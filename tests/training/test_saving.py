"""Sharded checkpoints that are written while training goes on: exact, whole or absent, and alike on all ranks."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import load
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lit_vlm.checkpoints.folder import checkpoints_in, is_complete, partial_of
from lit_vlm.checkpoints.weights import read_state
from lit_vlm.commands.recipe import find_recipe
from lit_vlm.training.saving import SaveFailed, save_shards
from tests.forkserver import interpreter
from tests.runs import environment, gathered, lit_vlm, run_ranks, tiny_fit

SEED = 20_230
KILLS = 10
STEPS = 40
FLAGS = [
    "--trainer.logger", "false", "--trainer.limit_val_batches", "0", "--data.batch_size", "1",
    "--trainer.devices", "2", "--checkpoint.every_n_steps", "1",
]  # fmt: skip


def model_and_optimizer() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 400), nn.BatchNorm1d(400), nn.Linear(400, 1))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    return model, optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.ones(4, 300)).sum().backward()
    optimizer.step()


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, object]:
    moments = {str(index): optimizer.state[p] for index, p in enumerate(model.parameters())}
    return {"state_dict": model.state_dict(), "optimizer_0": {"state": moments, "lr": optimizer.param_groups[0]["lr"]}}


def flat(value: object, name: str = "") -> dict[str, object]:
    """Copies of all leaves, by path; of sharded tensors the own shard."""
    if isinstance(value, dict):
        return {key: leaf for part, inner in value.items() for key, leaf in flat(inner, f"{name}/{part}").items()}
    if isinstance(value, torch.Tensor):
        local = value.to_local() if hasattr(value, "to_local") else value
        return {name: local.detach().clone()}
    return {name: value}


def _one_rank(rank: int, folder: str) -> None:
    """A process of the tests below; each part leaves what the test looks at."""
    with gathered(folder, rank):
        group = dist.new_group(backend="gloo")
        model, optimizer = model_and_optimizer()
        step(model, optimizer)
        rest = {"epoch": 3, "list": [1]}
        path = Path(folder) / "step=00000001.ckpt"

        # What is saved are the values of now, whatever becomes of them before the files are written.
        expected, state = flat(state_of(model, optimizer)), state_of(model, optimizer)
        done = save_shards(state, rest, path, group, asynchronous=True)
        rest["list"].append(2)
        for _ in range(3):
            step(model, optimizer)
        now = flat(state)
        assert not all(torch.equal(torch.as_tensor(now[key]), torch.as_tensor(expected[key])) for key in expected)
        assert done.result() is None
        assert not partial_of(path).exists()
        load(state, checkpoint_id=path)
        loaded = flat(state)
        assert loaded.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(torch.as_tensor(loaded[key]), torch.as_tensor(value)), key
        assert torch.load(path / "meta.pt") == {"epoch": 3, "list": [1]}

        # One rank has no room: both are told, and nothing half is left. It works again when there is room.
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        for bad in (0, 1):
            for asynchronous in (True, False):
                path = Path(folder) / f"step=0000001{bad}.ckpt"
                if rank == bad:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
                failed = save_shards(state_of(model, optimizer), rest, path, group, asynchronous)
                with pytest.raises(SaveFailed, match=rf"{path} could not .*: File too large \(.*\), on rank {bad}$"):
                    failed.result(60)
                resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
                dist.barrier()
                assert not path.exists()
                assert not partial_of(path).exists()
        assert save_shards(state_of(model, optimizer), rest, path, group, asynchronous=True).result(60) is None

        # The same name once more: the old one goes when the new one is there.
        step(model, optimizer)
        assert save_shards(state_of(model, optimizer), {"epoch": 4}, path, group, asynchronous=True).result(60) is None
        assert torch.load(path / "meta.pt") == {"epoch": 4}
        dist.barrier()
        if rank == 0:
            assert sorted(one.name for one in Path(folder).glob("*.ckpt")) == ["step=00000001.ckpt", path.name]


if __name__ == "__main__":
    _one_rank(int(sys.argv[1]), sys.argv[2])


def test_shards_are_copied_written_whole_and_fail_alike(tmp_path: Path) -> None:
    run_ranks(tmp_path, "tests.training.test_saving", str(tmp_path))
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
def test_a_run_from_an_asynchronous_checkpoint_is_the_undisturbed_one(tmp_path: Path) -> None:
    slow = ["--trainer.callbacks+", "tests.full_disk.SlowDisk"]
    straight = tiny_fit(tmp_path, "straight", "2_sft", *FLAGS, "--checkpoint.asynchronous", "false", strategy="fsdp")
    kept = tiny_fit(tmp_path, "kept", "2_sft", *FLAGS, *slow, "--checkpoint.keep", "-1", strategy="fsdp")
    middle = str(tmp_path / "kept" / "checkpoints" / "step=00000002.ckpt")
    resumed = tiny_fit(tmp_path, "resumed", "2_sft", *FLAGS, "--ckpt_path", middle, strategy="fsdp")
    assert [path.name for path in checkpoints_in(tmp_path / "straight")] == ["step=00000004.ckpt"]
    assert len(checkpoints_in(tmp_path / "kept")) == 4
    for name, value in straight.items():
        assert torch.equal(kept[name], value), name
        assert torch.equal(resumed[name], value), name


def words(folder: Path, out: str, strategy: str, *flags: str) -> list[str]:
    files = find_recipe("llava15").configs("2_sft", "tiny", strategy)
    configs = [word for path in files for word in ("--config", str(path.resolve()))]
    return ["fit", *configs, "--trainer.default_root_dir", str(folder / out), "--trainer.accelerator", "cpu",
            "--trainer.precision", "32-true", *FLAGS, *flags]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "rank"), [("fsdp", 0), ("fsdp", 1), ("ddp", 0)])
def test_a_rank_without_room_costs_checkpoints_and_then_the_run(strategy: str, rank: int, tmp_path: Path) -> None:
    full = ["--trainer.callbacks+", "tests.full_disk.FullDisk", "--trainer.callbacks.rank", str(rank),
            "--trainer.callbacks.first", "2"]  # fmt: skip
    start = time.monotonic()
    command = words(tmp_path, "once", strategy, "--trainer.max_steps", "5", *full, "--trainer.callbacks.until", "4")
    once = lit_vlm(tmp_path, *command)
    assert once.stderr.count("could not be written: File too large") == 2
    assert "The last whole checkpoint is " in once.stderr
    assert [path.name for path in (tmp_path / "once" / "checkpoints").iterdir()] == ["step=00000005.ckpt"]
    ended = lit_vlm(tmp_path, *words(tmp_path, "end", strategy, "--trainer.max_steps", "9", *full), check=False)
    assert time.monotonic() - start < 300  # nobody waited for a process that had failed
    assert ended.returncode != 0
    assert "Traceback" not in ended.stderr
    (line,) = {line for line in ended.stderr.splitlines() if line.startswith("error: ")}
    assert ", as 2 before it. The last whole checkpoint is " in line
    assert [path.name for path in (tmp_path / "end" / "checkpoints").iterdir()] == ["step=00000001.ckpt"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [SEED])
def test_a_run_that_is_killed_again_and_again_has_a_whole_checkpoint_and_ends_exactly(
    seed: int, tmp_path: Path, record_property
) -> None:
    drawn = random.Random(seed)
    end = ["--trainer.max_steps", str(STEPS), "--trainer.max_epochs", "-1"]
    slow = [*end, "--trainer.callbacks+", "tests.full_disk.SlowDisk"]
    out, found = tmp_path / "cut", Counter[str]()
    newest = ""
    for _ in range(KILLS):
        go_on = ["--ckpt_path", newest] if newest else []
        before = taken(out)
        process = subprocess.Popen(
            [interpreter(), "-m", "lit_vlm", *words(tmp_path, "cut", "fsdp", *slow, *go_on)],
            cwd=tmp_path, env=environment(tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        while taken(out) == before:  # it has not begun to save
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(drawn.uniform(0.3, 2))
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        half = [path for path in (out / "checkpoints").glob(".*") if not is_complete(path)]
        found["in a save" if half else "between saves"] += 1
        whole = checkpoints_in(out)
        assert whole or not newest, "nothing to go on from"
        assert not newest or whole[-1].name >= Path(newest).name
        newest = str(whole[-1]) if whole else ""
    record_property("kills", dict(found))
    assert found["in a save"] > 1, found
    assert newest
    end += ["--checkpoint.every_n_steps", "1000"]
    lit_vlm(tmp_path, *words(tmp_path, "cut", "fsdp", *end, "--ckpt_path", newest))
    assert [path.name for path in (out / "checkpoints").iterdir()] == [f"step={STEPS:08d}.ckpt"]
    lit_vlm(tmp_path, *words(tmp_path, "straight", "fsdp", *end))
    straight, cut = read_state(tmp_path / "straight"), read_state(out)
    for name, value in straight.items():
        assert torch.equal(cut[name], value), name


def taken(out: Path) -> set[str]:
    """Names in the folder of checkpoints of a run."""
    folder = out / "checkpoints"
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()
