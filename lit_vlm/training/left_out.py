"""Checkpoints that hold what trains, and say where the frozen rest came from."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lit_vlm.checkpoints.folder import find_checkpoint
from lit_vlm.checkpoints.weights import BASES, PREFIX, is_published
from lit_vlm.core.lora import ADAPTED, has_adapters
from lit_vlm.model.bases import PRETRAINED, Base, base_of, left_out
from lit_vlm.model.vlm import VLM


def find_bases(model: VLM, only_trained: bool | None, start: str | None, folder: Path) -> dict[str, Base]:
    """The bases of slots whose frozen weights checkpoints leave out.

    A slot is left out where its weights can be read again: pretrained ones, or those of the checkpoint that the stage
    started from. Weights that were drawn at random are always saved, and so are heads.

    Args:
        model: with its whole weights on the CPU, after `Stage.freeze`.
        only_trained: whether checkpoints hold only what trains; None: where a slot has adapters.
        start: `model.stage.start_from`.
        folder: where checkpoints are written.
    """
    parts = {slot: model.slots()[slot][0] for slot in ADAPTED if slot in model.origins}
    if only_trained is None:
        only_trained = any(has_adapters(part) for part in parts.values())
    if not only_trained:
        return {}
    place, near = PRETRAINED, ""
    if start:
        place = start if is_published(start) else str(find_checkpoint(start).resolve())
        near = "" if is_published(start) else os.path.relpath(place, folder.resolve())
    found = {
        slot: base_of(part, *((place, near) if model.origins[slot] else (PRETRAINED, "")))
        for slot, part in parts.items()
    }
    return {slot: base for slot, base in found.items() if base is not None}


def check_base(slot: str, bases: Mapping[str, Base]) -> None:
    """Check that the weights of a slot that is quantised can be read again, as checkpoints never hold them.

    Raises:
        ValueError: where they cannot: they were drawn at random, or `only_trained` is false.
    """
    if slot not in bases:
        raise ValueError(
            f"model.quantize.{slot}: checkpoints leave quantised weights out, and these could not be read again. Give "
            "them a source (pretrained weights, or model.stage.start_from), freeze them or give them adapters, and "
            "leave checkpoint.only_trained at null or true"
        )


class LeftOut:
    """Keeps frozen weights out of the state dict of a module, and their bases in its checkpoints.

    Args:
        module: the LightningModule; its checkpoints then lack weights, so that it must not load them strictly.
        model: its model, after `Stage.freeze`.
        bases: slot → base.
    """

    def __init__(self, module: nn.Module, model: VLM, bases: Mapping[str, Base]) -> None:
        self.bases = dict(bases)
        gone = {f"{PREFIX}{slot}.{name}" for slot in bases for name in left_out(model.slots()[slot][0])}
        if gone:
            module.register_state_dict_post_hook(partial(_drop, gone))

    def record(self, checkpoint: dict[str, Any]) -> None:
        """Write the bases into a checkpoint."""
        if self.bases:
            checkpoint[BASES] = {slot: asdict(base) for slot, base in self.bases.items()}

    def check(self, checkpoint: Mapping[str, Any], expected: set[str]) -> None:
        """Check that a checkpoint, with the weights that were left out of it, is that of this model.

        Args:
            checkpoint: as Lightning loads it; a sharded one is loaded already and without weights.
            expected: keys of the module's state dict.

        Raises:
            ValueError: where the frozen weights that this run has are others, or weights are missing.
        """
        saved = {slot: Base(**record) for slot, record in checkpoint.get(BASES, {}).items()}
        for slot, base in saved.items():
            own = self.bases.get(slot)
            if own is not None and own.digest != base.digest:
                where = f"'{base.start}'" if base.start else "its pretrained weights"
                raise ValueError(
                    f"--ckpt_path: the checkpoint holds only what trained; the rest of the slot '{slot}' ({base.part}) "
                    f"came from {where}, and these are other weights now (digest {own.digest}, then {base.digest}): "
                    "give it back what it was trained on"
                )
        lacking = sorted(expected - checkpoint.get("state_dict", dict.fromkeys(expected)).keys())
        if lacking:
            left = f", as it holds only what trained: set checkpoint.only_trained to {'true' if saved else 'null'}"
            raise ValueError(f"--ckpt_path: the checkpoint lacks {len(lacking)} weights, first {lacking[0]}{left}")


def _drop(gone: Collection[str], _module: nn.Module, state: dict[str, Tensor], prefix: str, _metadata: Any) -> None:
    """Take names out of a state dict; a hook of `nn.Module`."""
    for name in gone:
        state.pop(f"{prefix}{name}", None)
