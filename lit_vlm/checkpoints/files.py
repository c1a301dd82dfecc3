"""Reading the files that a run leaves: checkpoints, whole or sharded, and the folder around them."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from lit_vlm.pretrained import resolve

SUFFIX = ".ckpt"
PREFIX = "model."
"""The model's attribute name in the LightningModule, in front of every key of a checkpoint."""


def is_complete(path: Path) -> bool:
    """Whether a checkpoint was written to its end: a whole zip file, or a folder with both metadata files."""
    if path.is_dir():
        return (path / ".metadata").exists() and (path / "meta.pt").exists()
    return path.is_file() and zipfile.is_zipfile(path)


def checkpoints_in(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [path for path in (folder / "checkpoints").glob(f"*{SUFFIX}") if is_complete(path)]
    return sorted(found, key=lambda path: (step_of(path), path.stat().st_mtime))


def step_of(path: Path) -> int:
    """Optimizer steps of the stage when a checkpoint was written, from its name; -1 if it does not tell."""
    match = re.search(r"step=(\d+)", path.name)
    return int(match.group(1)) if match else -1


def find_checkpoint(source: str | Path) -> Path:
    """A checkpoint from its own path, or the newest one in the folder of a run.

    Raises:
        ValueError: when there is none, naming what was looked at.
    """
    path = Path(source).expanduser()
    if path.suffix == SUFFIX:
        if not is_complete(path):
            raise ValueError(f"{path} {'is not a complete checkpoint' if path.exists() else 'does not exist'}")
        return path
    found = checkpoints_in(path)
    if not found:
        raise ValueError(f"there is no complete checkpoint in {path / 'checkpoints'}")
    return found[-1]


def run_folder(source: str | Path) -> Path:
    """The folder of the run that a checkpoint belongs to: the one with config.yaml.

    Raises:
        ValueError: when no folder above has one.
    """
    path = Path(source).expanduser().resolve()
    for folder in (path, *path.parents):
        if (folder / "config.yaml").is_file():
            return folder
    raise ValueError(f"there is no config.yaml in {source} or above it, so the model cannot be built again")


def read_state(source: str | Path) -> dict[str, Tensor]:
    """All model weights of a checkpoint on the CPU, whole or sharded, under the names of `VLM`."""
    path = find_checkpoint(source)
    if path.is_dir():
        loaded: dict[str, Any] = {}
        _load_state_dict(
            loaded,
            storage_reader=FileSystemReader(path),
            planner=_EmptyStateDictLoadPlanner(keys={"state_dict"}),
            no_dist=True,
        )
        state = loaded["state_dict"]
    else:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
    return {key.removeprefix(PREFIX): value for key, value in state.items()}


def _published(source: str | Path) -> tuple[str, str] | None:
    """Family and place of `FAMILY:PLACE`; None for a path."""
    family, colon, place = str(source).partition(":")
    return (family, place) if colon and "/" not in family and not Path(source).exists() else None


def find_start(source: str | Path) -> None:
    """Look whether `read_slots` could begin: a complete checkpoint is there, or a known family and its folder.

    Raises:
        ValueError: saying what is missing.
    """
    if not (found := _published(source)):
        find_checkpoint(source)
        return
    from lit_vlm.checkpoints.published import FAMILIES

    family, place = found
    if family not in FAMILIES:
        raise ValueError(f"model.stage.start_from: there is no family '{family}'; families: {', '.join(FAMILIES)}")
    resolve(place)


def read_slots(source: str | Path) -> dict[str, dict[str, Tensor]]:
    """The weights of a checkpoint by slot: encoder, projector, embedder, decoder, `heads.NAME`.

    Args:
        source: a checkpoint, the folder of a run, or published weights as `FAMILY:FOLDER` or `FAMILY:HUB_NAME`.
    """
    if found := _published(source):
        # Imported when asked for: published formats build models, and building one reads checkpoint files.
        from lit_vlm.checkpoints.published import read_published

        return read_published(*found)
    slots: dict[str, dict[str, Tensor]] = {}
    for key, value in read_state(source).items():
        slot, rest = key.split(".", 1)
        if slot == "heads":
            name, rest = rest.split(".", 1)
            slot = f"heads.{name}"
        slots.setdefault(slot, {})[rest] = value
    return slots
