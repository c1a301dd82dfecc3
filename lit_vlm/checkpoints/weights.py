"""Weights by slot, read from the checkpoint of a run, whole or sharded, or from a folder of published weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from lit_vlm.checkpoints.folder import find_checkpoint, is_complete
from lit_vlm.core.lora import split_state
from lit_vlm.core.part import StateDict
from lit_vlm.core.pretrained import is_hub_name, resolve
from lit_vlm.data import VLMData
from lit_vlm.model.bases import Base, Found, SavedSlots

PREFIX = "model."
"""The model's attribute name in the LightningModule, in front of every key of a checkpoint."""
BASES = "bases"
"""Key of a checkpoint that holds the bases of slots, where frozen weights were left out."""
EMA, RAW = "ema", "raw_weights"
"""Keys of a checkpoint whose weights are averages: their decay, and the weights that training goes on with."""


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


def read_bases(source: str | Path) -> dict[str, Base]:
    """Slot → base, of the slots whose frozen weights a checkpoint left out; empty for one that holds all weights.

    Raises:
        ValueError: when there is no complete checkpoint.
    """
    return {name: Base(**record) for name, record in _read_rest(source).get(BASES, {}).items()}


def read_place(source: str | Path) -> dict[str, Any] | None:
    """The place in the training data that a checkpoint was saved at, as `Loader.state_dict`; None where it has none.

    Raises:
        ValueError: when there is no complete checkpoint.
    """
    place: dict[str, Any] | None = _read_rest(source).get(VLMData.__qualname__, {}).get("train")
    return place


def _read_rest(source: str | Path) -> dict[str, Any]:
    """What a checkpoint holds besides weights and optimizer; of a whole one, these stay on the disk."""
    path = find_checkpoint(source)
    file = path / "meta.pt" if path.is_dir() else path
    rest: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True, mmap=not path.is_dir())
    return rest


def _published(source: str | Path) -> tuple[str, str] | None:
    """Family and place of `FAMILY:PLACE`; None for a path."""
    family, colon, place = str(source).partition(":")
    return (family, place) if colon and "/" not in family and not Path(source).exists() else None


def is_published(source: str | Path) -> bool:
    """Whether a source is `FAMILY:PLACE`, and no path."""
    return _published(source) is not None


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
            if not is_hub_name(place):  # the hub would be asked for the weights themselves
                resolve(place)
        else:
            _starts_below(find_checkpoint(source))
    except ValueError as error:
        raise ValueError(f"model.stage.start_from: {error}") from error


def read_slots(source: str | Path) -> SavedSlots:
    """The weights of a checkpoint by slot: encoder, projector, embedder, decoder, `heads.NAME`.

    Frozen weights that the checkpoint left out are read from the one that its stage started from; those that its stage
    took from a part's pretrained weights stay out, and `build` adds them.

    Args:
        source: a checkpoint, the folder of a run, or published weights as `FAMILY:FOLDER` or `FAMILY:HUB_NAME`.

    Raises:
        ValueError: when there is no complete checkpoint, or none that left-out weights came from; for published
            weights, as `read_published`.
    """
    if found := _published(source):
        # Imported when asked for: most runs read no published weights, and the families load every slot.
        from lit_vlm.checkpoints.published import read_published

        return SavedSlots(read_published(*found))
    path = find_checkpoint(source)
    return _with_bases(path, by_slot(read_state(path)), read_slots)


def read_shapes(source: str | Path) -> SavedSlots | None:
    """The tensors of `read_slots` on the meta device, without reading values; None for published weights.

    Raises:
        ValueError: when there is no complete checkpoint, or none that left-out weights came from.
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
    own = by_slot({key.removeprefix(PREFIX): value for key, value in state.items()})
    return _with_bases(path, own, read_shapes)


def _with_bases(path: Path, own: dict[str, StateDict], read: Callable[[str], SavedSlots | None]) -> SavedSlots:
    """Weights of a checkpoint, with those that it left out as far as an earlier checkpoint has them."""
    below = {start: read(start) for start in _starts_below(path)}
    bases: dict[str, Found] = {}
    states = dict(own)
    for name, base in read_bases(path).items():
        saved = below.get(_start_of(path, name, base)) if base.start else None
        kept = frozenset(split_state(own.get(name, {}))[0])
        if saved is not None:
            states[name] = saved.get(name, {}) | own.get(name, {})
        # Of published weights no shapes are read, so these stay out as pretrained ones do.
        missing = saved is None or (name in saved.bases and saved.bases[name].pretrained)
        bases[name] = Found(base, kept, missing, str(path))
    return SavedSlots(states, bases)


def _starts_below(path: Path) -> set[str]:
    """The checkpoints or published weights that a checkpoint's left-out weights came from; checks that they are there.

    Raises:
        ValueError: where one is not.
    """
    return {_start_of(path, name, base) for name, base in read_bases(path).items() if base.start}


def _start_of(path: Path, slot: str, base: Base) -> str:
    """Where the left-out weights of a slot are now: in their old place, or moved together with this checkpoint."""
    if _published(base.start):
        return base.start
    for place in (Path(base.start), path.parent / base.near):
        if is_complete(place):
            return str(place)
    raise ValueError(
        f"{path} holds only what trained, and the rest of the slot '{slot}' ({base.part}) is in {base.start}, which is "
        "gone: put it back there"
    )


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
