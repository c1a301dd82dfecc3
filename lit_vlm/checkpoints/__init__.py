"""Weights in and out: a run's own checkpoints, and published formats."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from lit_vlm.checkpoints.folder import checkpoints_in, find_checkpoint, is_complete, run_folder, step_of

if TYPE_CHECKING:
    from lit_vlm.checkpoints.published import load_published
    from lit_vlm.checkpoints.weights import find_start, read_slots, read_state

__all__ = [
    "checkpoints_in",
    "find_checkpoint",
    "find_start",
    "is_complete",
    "load_published",
    "read_slots",
    "read_state",
    "run_folder",
    "step_of",
]


def __getattr__(name: str) -> object:
    # Imported when asked for: looking into a folder needs no PyTorch, and reading a checkpoint no published family.
    if name in ("find_start", "read_slots", "read_state"):
        return getattr(importlib.import_module("lit_vlm.checkpoints.weights"), name)
    if name == "load_published":
        return importlib.import_module("lit_vlm.checkpoints.published").load_published
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
