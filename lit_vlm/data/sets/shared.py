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
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lit_vlm.core.lease import Lease
from lit_vlm.core.progress import progress
from lit_vlm.data.sets.parallel import Block
from lit_vlm.data.sets.shards import BLOCKS, block_folder, finish_block, has_block, is_begun, keep_plan, put_away

PATIENCE = 300.0
"""Seconds without a sign of life after which the claim of a process on another machine is taken over."""
POLL = 1.0
"""Seconds between two looks at the blocks of others."""

Work = Callable[[Block, Path], dict[str, Any]]
"""(block, an empty folder) → facts of the block, after its files were written to the folder; it pickles."""


class Place(NamedTuple):
    """Which of the processes that share the work this is: `number` of `total`, from 0. The first shows progress."""

    number: int
    total: int


ALONE = Place(0, 1)


def run_blocks(
    blocks: Sequence[Block], work: Work, out: Path, title: str, workers: int = 0, place: Place = ALONE
) -> None:
    """Do the blocks of a folder that are not done, together with all others who do; returns when every one is whole.

    Args:
        blocks: all blocks of the work; the folder was claimed for it by `shards.claim`.
        work: does one block. It must write the same files whoever runs it.
        out: the folder.
        title: of the progress that is shown, over the blocks of all tasks.
        workers: number of processes of this task; 0 works in this one.
        place: of this task. It decides where among the blocks it begins, so that tasks seldom want the same one.

    Raises:
        Exception: what `work` raises; its block is free again then.
    """
    task = _Task(tuple(blocks), work, out, place)
    missing = len(blocks) - len(task.done())
    batches: Iterator[Any] = iter(())
    if workers and missing:
        # Workers start before the thread that shows progress: a fork copies the locks that a thread holds.
        batches = iter(DataLoader(_Worker(task), None, num_workers=min(workers, missing), in_order=False))
    with _shown(title, task):
        for _ in batches:
            pass
        while len(task.done()) < len(blocks):
            if not any(task.sweep(place)):
                time.sleep(POLL)


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
    """The view that one process has of the blocks.

    Attributes:
        blocks: all blocks.
        work: does one of them.
        out: the folder.
        place: of this task.
    """

    blocks: tuple[Block, ...]
    work: Work
    out: Path
    place: Place
    _whole: set[int] = field(default_factory=set)
    # A claim is stale when the same object has seen it untouched for long, so the objects are kept.
    _leases: dict[int, Lease] = field(default_factory=dict)

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
            elif self._attempt(block):
                yield block
        for block in taken:
            if self._attempt(block):
                yield block

    def _attempt(self, block: Block) -> bool:
        """Do a block, unless somebody else does it or it is done."""
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
        finish_block(scratch, self.work(block, scratch))
        target = block_folder(self.out, block.index)
        try:
            scratch.rename(target)
        except OSError:
            if has_block(self.out, block.index):  # somebody who took this process for dead was faster
                shutil.rmtree(scratch)
                return
            shutil.rmtree(target)  # an earlier version wrote in place, and was stopped
            scratch.rename(target)


class _Worker(IterableDataset[int]):
    """The blocks that one worker process of a task finds free, as they are done."""

    def __init__(self, task: _Task) -> None:
        self.task = task

    def __iter__(self) -> Iterator[int]:
        info = get_worker_info()
        assert info is not None
        number, total = self.task.place
        for block in self.task.sweep(Place(number * info.num_workers + info.id, total * info.num_workers)):
            yield block.index


@contextmanager
def _shown(title: str, task: _Task) -> Iterator[None]:
    """Show, in the first task, how many records of all blocks are done, whoever did them."""
    if task.place.number:
        yield
        return
    view = _Task(task.blocks, task.work, task.out, task.place)
    sizes = {block.index: block.end - block.start for block in task.blocks}
    before = sum(sizes[index] for index in view.done())
    ended = threading.Event()

    def tell() -> None:
        seen = before
        with progress(title, sum(sizes.values()), before) as advance:
            while True:
                last = ended.wait(POLL)
                now = sum(sizes[index] for index in view.done())
                advance(now - seen)
                seen = now
                if last:
                    return

    thread = threading.Thread(target=tell, name="progress of blocks", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
