"""How a checkpoint reaches the disk: whole or not at all, sharded ones while training goes on.

Files are written under another name (`folder.partial_of`), and get that of the checkpoint when all of it is on disk. A
save that fails does so on all processes alike, so that none waits for another.
"""

from __future__ import annotations

import io
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_saver import async_save, save
from torch.distributed.checkpoint.storage import WriteResult
from torch.utils._pytree import tree_map_only

from lit_vlm.checkpoints.folder import partial_of, put_in_place, remove, sync

ASYNCHRONOUS = {"asynchronous": True}
"""`storage_options` of `Trainer.save_checkpoint`: write a sharded checkpoint while training goes on."""

log = logging.getLogger(__name__)


class SaveFailed(OSError):
    """A checkpoint could not be written; the message names it, the reason and the free space."""


@contextmanager
def told(path: Path) -> Iterator[None]:
    """A context in which whatever fails becomes a SaveFailed that says why; a process can send it to another."""
    try:
        yield
    except SaveFailed:
        raise
    except Exception as error:
        raise SaveFailed(_reason(error, path)) from error


def _reason(error: BaseException, path: Path) -> str:
    """Why something could not be written, in words: PyTorch's own errors hide that of the system below them."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, SaveFailed):
        return str(cause)
    if isinstance(cause, OSError) and cause.strerror:
        words = cause.strerror + (f": '{cause.filename}'" if cause.filename else "")
    else:
        words = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    place = next((folder for folder in (path, *path.parents) if folder.is_dir()), Path("/"))
    return f"{words} ({shutil.disk_usage(place).free / 1e9:,.1f} GB free in {place})"


def make_folder(folder: Path) -> None:
    """Make the folder of checkpoints, inside the folder of a run.

    Raises:
        FileNotFoundError: where that is gone: nothing is written below a mount that vanished.
    """
    folder.mkdir(exist_ok=True)


class WholeFiles(TorchCheckpointIO):
    """Checkpoints that are one file. `Trainer` tells all processes what went wrong on the one that writes.

    Attributes:
        failure: why the last save failed; None if it did not.
    """

    failure: str | None = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Write a file under another name, and rename it when it is on the disk."""
        whole, self.failure = Path(path), None
        partial = partial_of(whole)
        try:
            with told(whole):
                make_folder(whole.parent)
                with partial.open("wb") as file:
                    torch.save(checkpoint, file)
                sync(partial)
                put_in_place(whole)
        except SaveFailed as error:
            self.failure = f"{whole} could not be written: {error}"
            _clear(partial)


class ShardWriter(FileSystemWriter):
    """Writes the shards of all processes and what belongs to none, and gives the folder its name at the end.

    Args:
        path: the checkpoint.
        rest: what is not in shards, as bytes of `torch.save`; read on rank 0.
    """

    def __init__(self, path: Path, rest: bytes) -> None:
        super().__init__(partial_of(path))
        self._whole, self._rest = path, rest

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Copies on the host, which later steps do not change; each tensor is copied once, also from a device."""
        return tree_map_only(torch.Tensor, _copied, state_dict)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Make the folder."""
        with told(self._whole):
            make_folder(self._whole.parent)
            return super().prepare_local_plan(plan)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        """Write the shard of this process."""
        with told(self._whole):
            return super().write_data(plan, planner)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write what is not in shards; then the checkpoint is whole. Rank 0 only, after all others."""
        with told(self._whole):
            rest = partial_of(self._whole) / "meta.pt"
            rest.write_bytes(self._rest)
            sync(rest)
            super().finish(metadata, results)
            put_in_place(self._whole)


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True)


def save_shards(
    state: dict[str, Any], rest: Mapping[str, Any], path: Path, group: dist.ProcessGroup, asynchronous: bool
) -> Future[None]:
    """Write a sharded checkpoint; all processes of the group call this, and none has another save under way.

    Args:
        state: tensors, sharded or alike in all processes, and other values.
        rest: what rank 0 alone writes.
        path: the checkpoint.
        group: a group of processes that is used for nothing else meanwhile, over gloo.
        asynchronous: return when `state` is copied; else when all is written.

    Returns:
        what is done when the checkpoint is whole. It fails with SaveFailed, on all processes alike.
    """
    first = dist.get_rank(group) == 0
    buffer = io.BytesIO()
    if first:
        torch.save(dict(rest), buffer)
        _clear(partial_of(path))  # of a save that failed
    dist.barrier(group)
    writer = ShardWriter(path, buffer.getvalue())
    done = Future[None]()
    if asynchronous:
        writing: Any = async_save(state, storage_writer=writer, process_group=group)
        writing.add_done_callback(lambda written: _pass_on(written.result, path, first, done))
    else:
        _pass_on(lambda: save(state, storage_writer=writer, process_group=group), path, first, done)
    return done


def _pass_on(write: Callable[[], object], path: Path, first: bool, done: Future[None]) -> None:
    try:
        write()
    except (Exception, CheckpointException) as error:  # the latter is a BaseException
        # The error itself holds, by its traceback, the copies of all tensors.
        failure = SaveFailed(f"{path} could not be written: {_first_reason(error, path)}")
        if first:
            _clear(partial_of(path))
        done.set_exception(failure)
    else:
        done.set_result(None)


def _first_reason(error: BaseException, path: Path) -> str:
    """Why a save failed: what the first of the processes says that failed."""
    if not isinstance(error, CheckpointException) or not error.failures:
        return _reason(error, path)
    rank, (cause, _) = min(error.failures.items(), key=lambda one: one[0])
    return f"{_reason(cause, path)}, on rank {rank}"


def _clear(partial: Path) -> None:
    """Remove a half checkpoint; one that stays is warned of, and removed when the run goes on."""
    try:
        remove(partial)
    except OSError as error:
        log.warning("the half checkpoint %s could not be removed: %s", partial, error.strerror)
