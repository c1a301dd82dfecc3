"""Parts of a LitData set that are written one by one, and put together when all are there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from lit_vlm.data.files import visible

PARTS = "parts"
CHUNK_BYTES = 1 << 26


T = TypeVar("T")


def read_json(file: Path) -> Any:
    """A JSON file of a set.

    Raises:
        ValueError: naming the file, when it is damaged.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged ({error}): make the set again, or take the file from a copy") from error


def read_info(file: Path, kind: type[T], version: int) -> T:
    """What describes a set: a dataclass with the format's version.

    Raises:
        ValueError: naming the file, when it is damaged or of another format.
    """
    raw = read_json(file)
    if not isinstance(raw, dict):
        raise ValueError(f"{file} is damaged: it holds a {type(raw).__name__}, not an object")
    if raw.get("version") != version:
        raise ValueError(
            f"{file} is of format {raw.get('version')}; this lit-vlm reads format {version}: make it again"
        )
    try:
        return TypeAdapter(kind).validate_json(json.dumps(raw), strict=True)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:3])
        raise ValueError(f"{file} is damaged: {problems}") from error


def part_folder(out: Path, index: int) -> Path:
    """Where a part is written before the set is put together."""
    return out / PARTS / f"{index:06d}"


def finish_part(folder: Path, facts: dict[str, Any]) -> None:
    """Say that a part is whole, with what is to be known of it."""
    scratch = folder / "part.json.partial"
    scratch.write_text(json.dumps(facts), encoding="utf-8")
    scratch.replace(folder / "part.json")


def read_part(out: Path, index: int) -> dict[str, Any] | None:
    """What `finish_part` said; None while the part is not whole."""
    file = part_folder(out, index) / "part.json"
    return read_json(file) if file.is_file() else None


def claim(out: Path, plan: dict[str, Any], block: int) -> int:
    """Make a folder the place of this work, or see that it is.

    Args:
        out: the folder.
        plan: what the work is; a folder that was begun with another plan is refused.
        block: records of a part.

    Returns:
        the block size that the work began with.

    Raises:
        ValueError: when the folder holds something else.
    """
    file = out / PARTS / "plan.json"
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
    """One LitData set of several: chunks get a name in order and are linked, so that a stop in between does no harm.

    Returns:
        items in each chunk.
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
    """LitData's index of a part; there is none when it holds no item."""
    for file in visible(folder.glob("*.index.json")):
        yield read_json(file)
