"""The folder that a run leaves: which checkpoints are in it. Loads no PyTorch, so that it answers at once."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
import zipfile
from pathlib import Path

from lit_vlm.core.written import write_whole

SUFFIX = ".ckpt"
DONE_FILE = "done.json"
"""What training leaves in the folder of a stage when it has come to its end."""
PARTIAL = ".partial"
PLAN_FILE = "plan.json"
"""What `lit-vlm run` planned a stage on several GPUs to take, in the folder of the stage."""


def is_complete(path: Path) -> bool:
    """Whether a checkpoint was written to its end: a whole zip file, or a folder with both metadata files."""
    if path.is_dir():
        return (path / ".metadata").exists() and (path / "meta.pt").exists()
    return path.is_file() and zipfile.is_zipfile(path)


def is_done(folder: Path) -> bool:
    """Whether the training of a stage has come to its end; a process that ends says nothing about that."""
    return (folder / DONE_FILE).is_file()


def mark_done(folder: Path, step: int) -> None:
    """Note that the training of a stage has come to its end, whole or not at all.

    Args:
        folder: of the stage.
        step: optimizer steps that were taken.
    """
    write_whole(folder / DONE_FILE, json.dumps({"step": step, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}))


def partial_of(path: Path) -> Path:
    """The name beside a checkpoint under which it is written; it is renamed when it is whole."""
    return path.with_name(f".{path.name}{PARTIAL}")


def put_in_place(path: Path) -> None:
    """Give a checkpoint that was written to `partial_of(path)` its name; one that has this name goes afterwards.

    Raises:
        OSError: where it cannot be renamed.
    """
    replaced = partial_of(path.with_name(f"replaced-{path.name}"))
    if path.is_dir():  # a file is replaced in one go
        remove(replaced)
        path.rename(replaced)
    partial_of(path).replace(path)
    sync(path.parent)
    remove(replaced)


def sync(path: Path) -> None:
    """Have the system write a file, or the names in a folder, to the disk now.

    Raises:
        OSError: for a file that cannot be written.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():  # some cannot for a folder
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a checkpoint, whole or not, if it is there.

    Raises:
        OSError: where it cannot be removed.
    """
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def settle(folder: Path) -> list[Path]:
    """Tidy what a killed run left in its folder of checkpoints: a whole one gets its name, a half one is removed.

    Args:
        folder: the folder `checkpoints`; no process writes into it.

    Returns:
        the half ones that were removed.

    Raises:
        OSError: where one cannot be removed.
    """
    removed = []
    for partial in sorted(folder.glob(f".*{PARTIAL}")):
        path = partial.with_name(partial.name.removeprefix(".").removesuffix(PARTIAL).removeprefix("replaced-"))
        if is_complete(partial) and not path.exists():
            partial.replace(path)
        else:
            remove(partial)
            removed.append(partial)
    return removed


def checkpoints_in(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [path for path in (folder / "checkpoints").glob(f"*{SUFFIX}") if is_complete(path)]
    return sorted(found, key=lambda path: (step_of(path), path.stat().st_mtime))


def step_of(path: Path) -> int:
    """Optimizer steps of the stage when a checkpoint was written, from its file name; -1 if the name has no step."""
    match = re.search(r"step=(\d+)", path.name)
    return int(match.group(1)) if match else -1


def find_checkpoint(source: str | Path) -> Path:
    """A checkpoint from its own path, or the newest one in the folder of a run.

    Raises:
        ValueError: when there is no complete checkpoint, naming the path that was searched.
    """
    path = Path(source).expanduser()
    if path.suffix == SUFFIX:
        if not is_complete(path):
            raise ValueError(f"{path} {'is not a complete checkpoint' if path.exists() else 'does not exist'}")
        return path
    found = checkpoints_in(path)
    if not found:
        stages = [file.parents[1] for file in path.glob(f"*/checkpoints/*{SUFFIX}") if is_complete(file)]
        hint = f"; it is the folder of several stages: take one, {max(stages)}" if stages else ""
        raise ValueError(f"there is no complete checkpoint in {path / 'checkpoints'}{hint}")
    return found[-1]


def run_folder(source: str | Path) -> Path:
    """The folder of the run that a checkpoint belongs to: the one with config.yaml.

    Raises:
        ValueError: when neither `source` nor a folder above it has a config.yaml.
    """
    path = Path(source).expanduser().resolve()
    for folder in (path, *path.parents):
        if (folder / "config.yaml").is_file():
            return folder
    raise ValueError(f"there is no config.yaml in {source} or above it, so the model cannot be built again")
