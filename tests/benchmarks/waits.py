"""Waits for the device in a training step of every stage, at its tiny scale; needs a CUDA device.

    python -m tests.benchmarks.waits                 # a table of all stages
    python -m tests.benchmarks.waits llava15 2_sft   # the places of one stage

A step goes from the end of one to the end of the next: it holds the transfer of the batch, and all callbacks.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from typing import Any

import lightning.pytorch as L
from rich.console import Console
from rich.table import Table

from lit_vlm.commands.fit import lightning_cli
from lit_vlm.commands.recipe import find_recipe
from lit_vlm.training.waits import Waits

RECIPES = (
    "llava15", "vila", "vila15", "eve", "eve_v2", "hovle", "hovle_hd", "ola_vlm", "multi_encoder_feature",
    "multi_encoder_token", "mono_internvl",
)  # fmt: skip
STEPS, LOGS = 7, 5
FOUND: dict[int, Waits] = {}
"""Waits of each step behind the first."""


class Watch(L.Callback):
    """Counts the waits of each step."""

    def __init__(self) -> None:
        self._now: Waits | None = None

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Close a step and open the next."""
        if self._now is not None:
            self._now.__exit__(None, None, None)
            FOUND[trainer.global_step] = self._now
        self._now = Waits().__enter__() if trainer.global_step < STEPS else None


def measure(recipe: str, stage: str) -> dict[int, Waits]:
    """Train a tiny stage for some steps on the GPU, without what acts at the start and the end only."""
    with tempfile.TemporaryDirectory() as folder:
        files = find_recipe(recipe).configs(stage, "tiny", "single")
        words = [word for path in files for word in ("--config", str(path))]
        lightning_cli(
            ["fit", *words, "--trainer.default_root_dir", folder, "--trainer.logger", "false",
             "--trainer.accelerator", "cuda", "--trainer.devices", "1", "--trainer.precision", "bf16-mixed",
             "--trainer.max_steps", str(STEPS), "--trainer.max_epochs", "-1", "--trainer.limit_val_batches", "0",
             "--trainer.log_every_n_steps", str(LOGS), "--trainer.enable_progress_bar", "false",
             "--model.stage.start_from", "null", "--model.stage.fresh", "[]", "--checkpoint.every_n_steps", "100000",
             "--trainer.callbacks+", "tests.benchmarks.waits.Watch"]
        )  # fmt: skip
    return FOUND


def main() -> None:
    """Print a table of all stages, each measured in a process of its own."""
    table = Table(title=f"waits in a step, in one that logs, and their places that are not meant ({STEPS} steps)")
    for column in ("stage", "step", "logging step", "not meant"):
        table.add_column(column)
    for recipe in RECIPES:
        for stage in find_recipe(recipe).stages:
            command = [sys.executable, "-m", __spec__.name, recipe, stage]
            lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
            most, logging, unwanted = json.loads(lines[-1])
            table.add_row(f"{recipe} {stage}", str(most), str(logging), "\n".join(unwanted))
    Console(width=160).print(table)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        from tests.benchmarks import waits  # the module that the command line's class path finds, not `__main__`

        found = waits.measure(*sys.argv[1:])
        plain = {step: one for step, one in found.items() if step % LOGS}
        sums = [max(one.found.total() for one in plain.values()), found[LOGS].found.total()]
        places = {f"{number} {place}" for one in plain.values() for place, number in one.unwanted().items()}
        print(json.dumps([*sums, sorted(places)]))  # noqa: T201 - read by `main`
