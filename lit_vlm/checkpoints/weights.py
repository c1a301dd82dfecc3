"""Weights by slot, read from the checkpoint of a run, whole or sharded, or from a folder of published weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from lit_vlm.checkpoints.folder import find_checkpoint
from lit_vlm.core.pretrained import resolve

PREFIX = "model."
"""The model's attribute name in the LightningModule, in front of every key of a checkpoint."""


def read_state(source: str | Path) -> dict[str, Tensor]:
    """All model weights of a checkpoint, whole or sharded, on the CPU, under the names of `VLM`, at least in fp32.

    Frozen weights may be saved in a narrower type that has their values exactly.

    Raises:
        ValueError: when there is no complete checkpoint.
    """
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
    return {key.removeprefix(PREFIX): _widened(value) for key, value in state.items()}


def _widened(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() and value.itemsize < torch.float32.itemsize else value


def _published(source: str | Path) -> tuple[str, str] | None:
    """Family and place of `FAMILY:PLACE`; None for a path."""
    family, colon, place = str(source).partition(":")
    return (family, place) if colon and "/" not in family and not Path(source).exists() else None


def find_start(source: str | Path) -> None:
    """Check that `read_slots` could begin: a complete checkpoint exists, or a known family and its folder.

    Raises:
        ValueError: naming `model.stage.start_from`, and what is missing.
    """
    try:
        if found := _published(source):
            from lit_vlm.checkpoints.published import find_family

            family, place = found
            find_family(family)
            resolve(place)
        else:
            find_checkpoint(source)
    except ValueError as error:
        raise ValueError(f"model.stage.start_from: {error}") from error


def read_slots(source: str | Path) -> dict[str, dict[str, Tensor]]:
    """The weights of a checkpoint by slot: encoder, projector, embedder, decoder, `heads.NAME`.

    Args:
        source: a checkpoint, the folder of a run, or published weights as `FAMILY:FOLDER` or `FAMILY:HUB_NAME`.

    Raises:
        ValueError: when there is no complete checkpoint; for published weights, as `read_published`.
    """
    if found := _published(source):
        # Imported when asked for: most runs read no published weights, and the families load every slot.
        from lit_vlm.checkpoints.published import read_published

        return read_published(*found)
    return by_slot(read_state(source))


def read_shapes(source: str | Path) -> dict[str, dict[str, Tensor]] | None:
    """The tensors of `read_slots` on the meta device, without reading values; None for published weights.

    Raises:
        ValueError: when there is no complete checkpoint.
    """
    if _published(source):
        return None
    path = find_checkpoint(source)
    if path.is_dir():
        found = FileSystemReader(path).read_metadata().state_dict_metadata
        state = {
            key.removeprefix("state_dict."): torch.empty(value.size, dtype=value.properties.dtype, device="meta")
            for key, value in found.items()
            if key.startswith("state_dict.") and isinstance(value, TensorStorageMetadata)
        }
    else:
        state = torch.load(path, map_location="meta", weights_only=True)["state_dict"]
    return by_slot({key.removeprefix(PREFIX): value for key, value in state.items()})


def by_slot(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Weights under the names of `VLM`, by slot: encoder, projector, embedder, decoder, `heads.NAME`."""
    slots: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        slot, rest = key.split(".", 1)
        if slot == "heads":
            name, rest = rest.split(".", 1)
            slot = f"heads.{name}"
        slots.setdefault(slot, {})[rest] = value
    return slots
