"""What watching costs a training step on two processes: `Watchdog` and `Stragglers` against neither of them.

Both processes train the same tiny model by DDP on gloo, in turns with and without, and count the time that all their
threads spend on a processor, as the clock of a shared machine tells little. A step of this model is as short as none of
a real one, so what counts is the difference per step, not the ratio.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L

from callbacks import Stragglers, Watchdog
from tests.benchmarks.measure import show

STEPS, ROUNDS, LOGS = 60, 9, 10
CASES: dict[str, Callable[[], list[L.Callback]]] = {
    "neither": list,
    "Watchdog": lambda: [Watchdog()],
    "Stragglers": lambda: [Stragglers()],
    "both": lambda: [Watchdog(), Stragglers()],
}


class Stopwatch(L.Callback):
    """Microseconds per step of each interval of `LOGS` steps but the first: of the main thread, and of the others."""

    def __init__(self) -> None:
        self.found: list[tuple[float, float]] = []
        self._before = (0.0, 0.0)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step % LOGS:
            return
        main = time.thread_time()
        now = (main, time.process_time() - main)
        if trainer.global_step > LOGS:
            self.found.append(tuple((a - b) / LOGS * 1e6 for a, b in zip(now, self._before, strict=True)))
        self._before = now


def measure(folder: str) -> dict[str, list[tuple[float, float]]]:
    """What `Stopwatch` finds, by what watches, in turns."""
    from tests.callbacks.test_callbacks import data, lit

    found: dict[str, list[tuple[float, float]]] = {name: [] for name in CASES}
    for turn in range(ROUNDS + 1):
        for name, watching in CASES.items():
            watch = Stopwatch()
            run = L.Trainer(
                accelerator="cpu", devices=1, num_nodes=2, strategy="ddp", default_root_dir=folder, logger=False,
                callbacks=[*watching(), watch], max_steps=STEPS, max_epochs=-1, log_every_n_steps=LOGS,
                limit_val_batches=0, enable_progress_bar=False, enable_model_summary=False,
                enable_checkpointing=False,
            )  # fmt: skip
            run.fit(lit(), data())
            if turn:  # the first round warms up
                found[name] += watch.found
    return found


def main() -> None:
    """Start both processes and print what the first one has measured."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        for rank in range(2):
            own = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": "0",
                   "GROUP_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "x",
                   "OMP_NUM_THREADS": "1"}  # fmt: skip
            command = [sys.executable, "-m", __spec__.name, folder, str(rank)]
            ranks.append(subprocess.Popen(command, env=os.environ | own, stderr=subprocess.DEVNULL))
        assert [process.wait() for process in ranks] == [0, 0]
        found = json.loads((Path(folder) / "0.json").read_text())
    sums = {name: statistics.median(map(sum, own)) for name, own in found.items()}
    base = sums["neither"]
    show("processor time of a step, all threads of a process", "µs", sums, 0)
    show("what watching adds", "µs per step", {name: one - base for name, one in sums.items()}, 0)
    show("the same as a ratio", "×", {name: one / base for name, one in sums.items()}, 3)
    for part, threads in enumerate(("main thread", "others")):
        show(threads, "µs", {name: statistics.median(one[part] for one in own) for name, own in found.items()}, 0)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        Path(sys.argv[1], f"{sys.argv[2]}.json").write_text(json.dumps(measure(sys.argv[1])))
