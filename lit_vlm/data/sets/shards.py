"""Blocks of a LitData set, which are written one by one and merged when all are there."""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lit_vlm.core.written import write_whole
from lit_vlm.data.records.files import visible
from lit_vlm.data.records.json_files import read_json

BLOCKS = "parts"
"""Folder of the blocks; its name is that of earlier versions, so that their unfinished work can go on."""
PLAN = "plan.json"
"""File that says what the blocks are of; it lies with them, and later with the result."""
SCRATCH = re.compile(r"\..+-[0-9a-f]{32}")
"""Names of files and folders that are moved to their places when they are whole."""
CHUNK_BYTES = 1 << 26


def block_folder(out: Path, index: int) -> Path:
    """Folder that a block is written to before the set is merged."""
    return out / BLOCKS / f"{index:06d}"


def finish_block(folder: Path, facts: dict[str, Any]) -> None:
    """Mark a block as whole, and keep its facts (counts, hash, bad records) in `part.json`."""
    write_whole(folder / "part.json", json.dumps(facts))


def has_block(out: Path, index: int) -> bool:
    """Whether a block is whole."""
    return (block_folder(out, index) / "part.json").is_file()


def read_block(out: Path, index: int) -> dict[str, Any]:
    """The facts that `finish_block` kept of a block that is whole.

    Raises:
        ValueError: for a file that is damaged or absent.
    """
    return read_json(block_folder(out, index) / "part.json")


def claim(out: Path, plan: dict[str, Any], block: int) -> int:
    """Claim a folder for some work, or check that it was claimed for the same work, now or before.

    Any number of processes may do this at once; the first decides on the size of blocks.

    Args:
        out: the folder.
        plan: what decides the result of the work; a folder that was begun with another plan is refused.
        block: records per block, for work that begins now.

    Returns:
        records per block, as the work began.

    Raises:
        ValueError: when the folder holds something else.
    """
    for _ in range(2):  # what is there may be finished by another task while it is looked at
        for file in (out / PLAN, out / BLOCKS / PLAN):
            if file.is_file():
                return _same_plan(out, read_json(file), plan)
        if not is_used(out) and _begin(out, {**plan, "block": block}):
            return block
    raise ValueError(f"{out} is not empty: remove it, or name another folder")


def is_used(out: Path) -> bool:
    """Whether there is something in a folder that is to hold a result; raises ValueError for a file."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: name a folder for the result")
    return out.exists() and bool(visible(out.iterdir()))


def _begin(out: Path, plan: dict[str, Any]) -> bool:
    """Make the folder of blocks with the plan in it, at once; False when another process did so before."""
    scratch = out / f".{BLOCKS}-{uuid.uuid4().hex}"
    scratch.mkdir(parents=True)
    write_whole(scratch / PLAN, json.dumps(plan))
    try:
        scratch.rename(out / BLOCKS)
    except OSError:
        shutil.rmtree(scratch)
        return False
    return True


def _same_plan(out: Path, begun: dict[str, Any], plan: dict[str, Any]) -> int:
    """Records per block of the work that was begun, if its plan is the same; raises ValueError if it is not."""
    block: int = begun.pop("block")
    if begun != plan:
        keys = [key for key in {**begun, **plan} if begun.get(key) != plan.get(key)]
        changed = "; ".join(f"{key} {begun.get(key)} → {plan.get(key)}" for key in keys)
        state = "unfinished work on" if is_begun(out) else "the result of"
        raise ValueError(f"{out} holds {state} something else ({changed}): remove it, or name another folder")
    return block


def is_begun(out: Path) -> bool:
    """Whether a folder holds blocks that were not put together yet, or not put away."""
    return (out / BLOCKS / PLAN).is_file()


def keep_plan(out: Path) -> None:
    """Keep the plan with the result, so that the same command knows later that its work is done."""
    write_whole(out / PLAN, json.dumps(read_json(out / BLOCKS / PLAN)))


def put_away(out: Path) -> None:
    """Remove the blocks of a folder whose result is whole, all at once, so that nobody takes some of them for all."""
    with suppress(FileNotFoundError):
        (out / BLOCKS).rename(out / f".{BLOCKS}-{uuid.uuid4().hex}")
    places = (out, *(file for file in visible(out.iterdir()) if file.is_dir()))
    for scratch in [file for place in places for file in place.iterdir() if SCRATCH.fullmatch(file.name)]:
        # Also of tasks that died; others may still hold a file open there, or remove the same.
        if scratch.is_dir():
            shutil.rmtree(scratch, ignore_errors=True)
        else:
            scratch.unlink(missing_ok=True)


def merge(folders: Sequence[Path], out: Path) -> list[int]:
    """Merge LitData sets to one: chunks are named in order and linked, so that a stop in between does no harm.

    Args:
        folders: the sets, in order.
        out: folder of the merged set.

    Returns:
        number of items in each chunk.

    Raises:
        ValueError: for a set whose index is damaged.
    """
    out.mkdir(exist_ok=True)
    chunks: list[dict[str, Any]] = []
    config: dict[str, Any] | None = None
    for folder in folders:
        for index in _indices(folder):
            config = config or index["config"]
            for chunk in index["chunks"]:
                name = f"chunk-{len(chunks):06d}.bin"
                _put(folder / chunk["filename"], out / name)
                chunks.append({**chunk, "filename": name})
    write_whole(out / "index.json", json.dumps({"chunks": chunks, "config": config}))
    return [chunk["chunk_size"] for chunk in chunks]


def _put(file: Path, target: Path) -> None:
    """Link or copy a file to a place that never lacks one in between."""
    scratch = target.with_name(f".{target.name}-{uuid.uuid4().hex}")
    try:
        os.link(file, scratch)
    except OSError:  # not every file system has links
        shutil.copyfile(file, scratch)
    scratch.replace(target)
    scratch.unlink(missing_ok=True)  # nothing is moved where both are links to one file


def _indices(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield LitData's index files of a block; a block without items has none."""
    for file in visible(folder.glob("*.index.json")):
        yield read_json(file)
