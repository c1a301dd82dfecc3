"""How long training stops for a checkpoint, with two sharded processes; and a single file against Lightning's way.

The model has 50 million parameters in fp32, so that weights and the two moments of AdamW are 600 MB.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lit_vlm.training.saving import WholeFiles, save_shards
from tests.benchmarks.measure import added_mib, ratios, show
from tests.runs import gathered, run_ranks

WIDTH, LAYERS, ROUNDS, STEPS = 1024, 48, 4, 4


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _layers() -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))


def _all(flag: bool) -> bool:
    """Whether both processes say so: they take steps together."""
    number = torch.tensor(float(flag))
    dist.all_reduce(number, op=dist.ReduceOp.MIN)
    return bool(number)


def _one_rank(rank: int, folder: Path) -> None:
    """A process: stops and steps of each round, the first of which warms up."""
    with gathered(str(folder), rank):
        group = dist.new_group(backend="gloo")
        model = _layers()
        for layer in model:
            fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        optimizer = torch.optim.AdamW(model.parameters())
        batch = torch.randn(16, WIDTH)

        def steps() -> None:
            for _ in range(STEPS):
                model(batch).sum().backward()
                optimizer.step()
                optimizer.zero_grad()

        def save(asynchronous: bool) -> None:
            nonlocal done
            state = {
                "state_dict": get_model_state_dict(model),
                "optimizer_0": get_optimizer_state_dict(model, optimizer),
            }
            done = save_shards(state, {}, folder / "step=00000001.ckpt", group, asynchronous)

        rounds = []
        done = Future[None]()
        for _ in range(ROUNDS + 1):
            dist.barrier()
            alone = _seconds(steps)
            waited = _seconds(lambda: save(False))
            dist.barrier()
            stopped = _seconds(lambda: save(True))
            beside, overlapped = 0.0, 0
            while not _all(done.done()):
                beside, overlapped = beside + _seconds(steps), overlapped + 1
            done.result()
            rounds.append([stopped / waited, beside / overlapped / alone if overlapped else 1.0, waited])
        if rank == 0:
            (folder / "rounds.json").write_text(json.dumps(rounds[1:]))


def main() -> None:
    """Print both tables."""
    with tempfile.TemporaryDirectory() as name:
        run_ranks(Path(name), "tests.benchmarks.saves", name)
        rounds = json.loads((Path(name) / "rounds.json").read_text())
    stopped, beside, waited = (statistics.median(column) for column in zip(*rounds, strict=True))
    title = f"a sharded checkpoint of {3 * 4 * LAYERS * WIDTH * (WIDTH + 1) / 1e6:,.0f} MB, two processes on a CPU"
    show(
        title,
        "×",
        {
            "time that training stops, asynchronous over waiting": stopped,
            "a step while files are written over one alone": beside,
            "(seconds of a checkpoint that is waited for)": waited,
        },
    )
    with tempfile.TemporaryDirectory() as name:
        state = {"state_dict": _layers().state_dict()}
        writers = {"Lightning's": TorchCheckpointIO(), "lit-vlm's": WholeFiles()}
        save = {key: lambda io=io: io.save_checkpoint(state, Path(name) / "a.ckpt") for key, io in writers.items()}
        show("a single file of 200 MB, time over Lightning's", "×", ratios(save))
        show("memory that it takes", "MiB", {key: added_mib(work) for key, work in save.items()}, digits=0)


if __name__ == "__main__":
    _one_rank(int(sys.argv[1]), Path(sys.argv[2]))
