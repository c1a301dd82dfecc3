"""The folder that a run leaves: which checkpoints are in it. Loads no PyTorch, so that it answers at once."""

from __future__ import annotations

import json
import re
import time
import zipfile
from pathlib import Path

SUFFIX = ".ckpt"
DONE_FILE = "done.json"
"""What training leaves in the folder of a stage when it has come to its end."""
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
    folder.mkdir(parents=True, exist_ok=True)
    scratch = folder / f".{DONE_FILE}"
    scratch.write_text(json.dumps({"step": step, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}), encoding="utf-8")
    scratch.replace(folder / DONE_FILE)


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
