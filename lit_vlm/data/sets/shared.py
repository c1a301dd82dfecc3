"""Blocks that any number of tasks do together; all that the tasks share is the folder that the blocks are written to.

A task is a process of `srun` or `torchrun`, or one that was started by hand, on any machine that sees the folder. A
block belongs to whoever holds its claim: a file that is created exclusively and touched now and then (`core.lease`),
so that neither messages nor locks of the file system are needed. The claim of a dead process is taken over. A block is
written aside and renamed when it is whole, so that two processes that do one block, as one of them was thought dead, do
no harm.
"""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_vlm.core.lease import Lease
from lit_vlm.data.sets.engine import HERE, Engine, Place
from lit_vlm.data.sets.parallel import Block
from lit_vlm.data.sets.shards import BLOCKS, block_folder, finish_block, has_block, is_begun, keep_plan, put_away
from lit_vlm.data.sets.shown import shown

PATIENCE = 300.0
"""Seconds without a sign of life after which the claim of a process on another machine is taken over."""
POLL = 1.0
"""Seconds between two looks at the blocks of others."""

Work = Callable[[Block, Path], dict[str, Any]]
"""(block, an empty folder) → facts of the block, after its files were written to the folder; it pickles.

Facts have keys of the work's own. Progress shows `bytes`, what was written, and `bad`, a list of samples left out.
"""

OpenWork = Callable[[str], Work]
"""(device) → the work, with its model on the device; called once in each process that does blocks; it pickles."""


@dataclass(frozen=True)
class _Opened:
    """Work that is the same on all devices."""

    work: Work

    def __call__(self, device: str) -> Work:
        return self.work


def run_blocks(
    blocks: Sequence[Block], work: Work, out: Path, title: str, engine: Engine = HERE, needs: Sequence[str] = ()
) -> None:
    """Do the blocks of a folder that are not done, together with all others who do; returns when every one is whole.

    Args:
        blocks: all blocks of the work; the folder was claimed for it by `shards.claim`.
        work: does one block. It must write the same files whoever runs it.
        out: the folder.
        title: of the progress that is shown, over the blocks of all tasks.
        engine: starts the workers.
        needs: paths that all workers must see, besides the folder (`engine.paths_of`).

    Raises:
        ValueError: for a worker that cannot take part, saying why.
        Exception: what `work` raises; its block is free again then.
    """
    _run(_Task(tuple(blocks), _Opened(work), out), False, title, engine, needs)


def run_models(
    blocks: Sequence[Block], work: OpenWork, out: Path, title: str, engine: Engine = HERE, needs: Sequence[str] = ()
) -> None:
    """Do blocks by models, as `run_blocks`; there is one process for each device, with a model of its own.

    Args:
        blocks: as in `run_blocks`.
        work: opens the model on a device, and does one block with it.
        out: the folder.
        title: of the progress.
        engine: starts the workers.
        needs: as in `run_blocks`.

    Raises:
        ValueError: for a worker that cannot take part, saying why.
        Exception: what `work` raises; its block is free again then.
    """
    _run(_Task(tuple(blocks), work, out), True, title, engine, needs)


def _run(task: _Task, models: bool, title: str, engine: Engine, needs: Sequence[str]) -> None:
    # Workers start before the thread that shows progress: a fork copies the locks that a thread holds.
    wait = engine.start(task, models, needs)
    view = task.on("cpu")  # of its own: a thread may not look at a set that grows
    with shown(title, task.blocks, task.out, view.done, engine.place.number == 0):
        wait()


def finish_once(out: Path, manifest: str, finish: Callable[[], object]) -> None:
    """Finish a folder whose blocks are whole; of all tasks that call this, one does it, and the others wait.

    Args:
        out: the folder.
        manifest: name of the file that `finish` writes last; a folder that has it is finished.
        finish: merges the blocks. It is called again by another task if the first one dies.

    Raises:
        Exception: what `finish` raises.
    """
    lease = _lease(out, "finish")
    while not (out / manifest).is_file():
        try:
            if not lease.take():
                time.sleep(POLL / 4)
                continue
            try:
                if not (out / manifest).is_file():
                    keep_plan(out)
                    finish()
            finally:
                lease.release()
        except Exception:
            # A process that was taken for dead, or is late, finds the blocks gone, and nothing wrong.
            if not (out / manifest).is_file():
                raise
    put_away(out)


def _lease(out: Path, name: str) -> Lease:
    return Lease(out / BLOCKS / "claims" / name, PATIENCE)


@dataclass
class _Task:
    """The view that one process has of the blocks (`engine.Shared`).

    Attributes:
        blocks: all blocks.
        work: opens what does one of them.
        out: the folder.
        device: that models are on.
    """

    blocks: tuple[Block, ...]
    work: OpenWork
    out: Path
    device: str = "cpu"
    _opened: Work | None = None
    _whole: set[int] = field(default_factory=set)
    # A claim is stale when the same object has seen it untouched for long, so the objects are kept.
    _leases: dict[int, Lease] = field(default_factory=dict)

    def on(self, device: str) -> _Task:
        return _Task(self.blocks, self.work, self.out, device)

    @contextmanager
    def witness(self) -> Iterator[str]:
        file = (self.out / BLOCKS / f"seen-{uuid.uuid4().hex}").absolute()
        file.touch()
        try:
            yield str(file)
        finally:
            file.unlink(missing_ok=True)

    def done(self) -> set[int]:
        """Indices of the blocks that are whole; all of them once a task has finished the folder."""
        if not is_begun(self.out):
            return {block.index for block in self.blocks}
        try:
            # One question to the file system, not one for each block.
            indices = {int(name) for name in os.listdir(self.out / BLOCKS) if name.isdecimal()}
        except FileNotFoundError:
            return self.done()
        self._whole |= {index for index in indices - self._whole if has_block(self.out, index)}
        return self._whole

    def missing(self) -> list[Block]:
        whole = self.done()
        return [block for block in self.blocks if block.index not in whole]

    def finish(self, place: Place) -> None:
        while self.missing():
            if not any(self.sweep(place)):
                time.sleep(POLL)

    def sweep(self, place: Place) -> Iterator[Block]:
        """Do the blocks that are free, then those whose claims are stale; yields each that was done here.

        Args:
            place: of the process, which decides on the first block that is looked at.
        """
        start = place.number * len(self.blocks) // place.total
        taken = []
        for block in (*self.blocks[start:], *self.blocks[:start]):
            if has_block(self.out, block.index):
                continue
            if (self.out / BLOCKS / "claims" / f"{block.index:06d}").exists():
                taken.append(block)
            elif self.attempt(block):
                yield block
        for block in taken:
            if self.attempt(block):
                yield block

    def attempt(self, block: Block) -> bool:
        """Do a block, unless somebody else does it or it is done; whether it was done here."""
        if not is_begun(self.out):
            return False
        lease = self._leases.setdefault(block.index, _lease(self.out, f"{block.index:06d}"))
        if not lease.take():
            return False
        try:
            if block.index in self.done():
                return False
            self._write(block)
            return True
        finally:
            lease.release()

    def _write(self, block: Block) -> None:
        scratch = self.out / BLOCKS / f"{block.index:06d}-{uuid.uuid4().hex}.partial"
        scratch.mkdir()
        self._opened = self._opened or self.work(self.device)
        finish_block(scratch, self._opened(block, scratch))
        target = block_folder(self.out, block.index)
        try:
            scratch.rename(target)
        except OSError:
            if has_block(self.out, block.index):  # somebody who took this process for dead was faster
                shutil.rmtree(scratch)
                return
            shutil.rmtree(target)  # an earlier version wrote in place, and was stopped
            scratch.rename(target)
