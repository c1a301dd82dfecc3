"""Published weights in and out, one module per family."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lit_vlm.checkpoints import llava_hf
from lit_vlm.model import VLM

FAMILIES = {"llava-hf": llava_hf}


def load_published(
    family: str, source: str | Path | Mapping[str, Tensor], config: Mapping[str, Any] | None = None
) -> VLM:
    """A model from weights under published names.

    Args:
        family: `llava-hf`.
        source: a folder (or hub name) with config and weights, or a state dict under published names.
        config: the published configuration; needed with a state dict.

    Raises:
        ValueError: for a key that fits nowhere, or a weight of the model that no key gives.
    """
    if family not in FAMILIES:
        raise ValueError(f"there is no family '{family}'; families: {', '.join(FAMILIES)}")
    return FAMILIES[family].load(source, config)
