"""Disks that are full or slow, in runs of the tests."""

from __future__ import annotations

import resource
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from lit_vlm.training.sharding import FSDP2

FILLER = "filler"


@contextmanager
def small_disk(folder: Path, mib: int) -> Iterator[Path]:
    """A file system of its own, which a test can fill. Skips the test where none can be mounted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount, so no small file system")
    if mounted.returncode:
        pytest.skip(f"no small file system can be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path) -> None:
    """Use all that is left of a small disk."""
    with (disk / FILLER).open("wb", buffering=0) as file:
        while True:
            try:
                file.write(b"0" * 4096)
            except OSError:
                return


class At(L.Callback):
    """Does something when steps begin, before checkpoints of their end are written."""

    def __init__(self, what: dict[int, Callable[[], object]]) -> None:
        self.what = what

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if act := self.what.get(trainer.global_step + 1):
            act()


class FullDisk(L.Callback):
    """One rank cannot write a byte to any file from one step on, until another begins."""

    def __init__(self, rank: int, first: int, until: int = 10**9) -> None:
        self.rank, self.first, self.until = rank, first, until

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if isinstance(trainer.strategy, FSDP2):
            trainer.strategy.wait_for_save()  # the one of the step before is not meant
        if trainer.global_rank == self.rank:
            full = self.first <= trainer.global_step + 1 < self.until
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (0 if full else hard, hard))


class SlowDisk(L.Callback):
    """Writing a shard takes much longer than a step."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        write = FileSystemWriter.write_data

        def slowly(*arguments: Any) -> Any:
            written = write(*arguments)
            time.sleep(0.3)
            return written

        FileSystemWriter.write_data = slowly  # type: ignore[method-assign]
