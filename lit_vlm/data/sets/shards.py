"""Blocks of a LitData set, which are written one by one and merged when all are there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lit_vlm.data.records.files import visible
from lit_vlm.data.records.json_files import read_json

BLOCKS = "parts"
"""Folder of the blocks; its name is that of earlier versions, so that their unfinished work can go on."""
CHUNK_BYTES = 1 << 26


def block_folder(out: Path, index: int) -> Path:
    """Folder that a block is written to before the set is merged."""
    return out / BLOCKS / f"{index:06d}"


def finish_block(folder: Path, facts: dict[str, Any]) -> None:
    """Mark a block as whole, and keep its facts (counts, hash, bad records) in `part.json`."""
    scratch = folder / "part.json.partial"
    scratch.write_text(json.dumps(facts), encoding="utf-8")
    scratch.replace(folder / "part.json")


def read_block(out: Path, index: int) -> dict[str, Any] | None:
    """The facts that `finish_block` kept; None while the block is not whole.

    Raises:
        ValueError: for a damaged file.
    """
    file = block_folder(out, index) / "part.json"
    return read_json(file) if file.is_file() else None


def claim(out: Path, plan: dict[str, Any], block: int) -> int:
    """Claim a folder for some work, or check that it was begun for the same work.

    Args:
        out: the folder.
        plan: what decides the result of the work; a folder that was begun with another plan is refused.
        block: records per block, for work that begins now.

    Returns:
        records per block, as the work began.

    Raises:
        ValueError: when the folder holds something else.
    """
    file = out / BLOCKS / "plan.json"
    if file.is_file():
        begun = read_json(file)
        block = begun.pop("block")
        if begun != plan:
            changed = "; ".join(f"{key} {begun.get(key)} → {plan[key]}" for key in plan if begun.get(key) != plan[key])
            raise ValueError(
                f"{out} holds unfinished work on something else ({changed}): remove it, or name another folder"
            )
        return block
    if out.exists() and visible(out.iterdir()):
        raise ValueError(f"{out} is not empty: remove it, or name another folder")
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_suffix(".partial")
    scratch.write_text(json.dumps({**plan, "block": block}), encoding="utf-8")
    scratch.replace(file)
    return block


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
                (out / name).unlink(missing_ok=True)
                try:
                    os.link(folder / chunk["filename"], out / name)
                except OSError:  # not every file system has links
                    shutil.copyfile(folder / chunk["filename"], out / name)
                chunks.append({**chunk, "filename": name})
    scratch = out / "index.json.partial"
    scratch.write_text(json.dumps({"chunks": chunks, "config": config}), encoding="utf-8")
    scratch.replace(out / "index.json")
    return [chunk["chunk_size"] for chunk in chunks]


def _indices(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield LitData's index files of a block; a block without items has none."""
    for file in visible(folder.glob("*.index.json")):
        yield read_json(file)
