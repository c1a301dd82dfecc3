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

STEPS, WARM, ROUNDS, LOGS = 60, 10, 7, 10
CASES: dict[str, Callable[[], list[L.Callback]]] = {
    "neither": list,
    "Watchdog": lambda: [Watchdog()],
    "Stragglers": lambda: [Stragglers()],
    "both": lambda: [Watchdog(), Stragglers()],
}


class Stopwatch(L.Callback):
    """Processor time and wall time of the steps behind the warm-up, of all threads of this process."""

    def __init__(self) -> None:
        self.start = (0.0, 0.0)
        self.seconds = (0.0, 0.0)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        now = (time.process_time(), time.perf_counter())
        if trainer.global_step == WARM:
            self.start = now
        elif trainer.global_step == STEPS:
            self.seconds = (now[0] - self.start[0], now[1] - self.start[1])


def measure(folder: str) -> dict[str, list[tuple[float, float]]]:
    """Seconds of the steps, by what watches, in turns."""
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
                found[name].append(watch.seconds)
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
    steps = STEPS - WARM
    base = found["neither"]
    for part, unit in enumerate(("processor", "wall")):
        more = {
            name: statistics.median(a[part] - b[part] for a, b in zip(own, base, strict=True)) / steps * 1e6
            for name, own in found.items()
        }
        step = statistics.median(one[part] for one in base) / steps * 1e3
        show(f"a step of {step:.1f} ms ({unit} time of a process): what watching adds", "µs per step", more, 0)
        ratio = {
            name: statistics.median(a[part] / b[part] for a, b in zip(own, base, strict=True))
            for name, own in found.items()
        }
        show(f"the same as a ratio ({unit} time)", "×", ratio, 3)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        Path(sys.argv[1], f"{sys.argv[2]}.json").write_text(json.dumps(measure(sys.argv[1])))
