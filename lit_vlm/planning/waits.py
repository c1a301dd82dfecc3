"""Where a step waits for the device: places that PyTorch reports while it watches for synchronisation."""

from __future__ import annotations

import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import lit_vlm

ROOT = Path(lit_vlm.__file__).parent.parent
SIGN = "synchronizing CUDA"
"""What PyTorch's warning says."""


@contextmanager
def record_waits(found: Counter[str]) -> Iterator[None]:
    """A context that counts, by place, calls in which the host waits for the device.

    Args:
        found: place → number of waits: the innermost lines of the kit and of the library that it called there.
    """
    shown = warnings.showwarning

    def show(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
        if SIGN in str(message):
            found[_place()] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
            warnings.showwarning = shown


def _place() -> str:
    """Where the host waits: `FILE:LINE function`, the kit's innermost line first."""
    frames = [
        f for f in traceback.extract_stack()[:-2] if not f.filename.endswith(("/warnings.py", "planning/waits.py"))
    ]
    own = [frame for frame in frames if _kit(frame.filename)]
    inner = frames[-1]
    places = [own[-1], inner] if own and own[-1] is not inner else [inner]
    return " > ".join(f"{_short(frame.filename)}:{frame.lineno} {frame.name}" for frame in places)


def _kit(filename: str) -> bool:
    path = Path(filename)
    return path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in ("lit_vlm", "callbacks")


def _short(filename: str) -> str:
    path = Path(filename)
    if path.is_relative_to(ROOT) and "site-packages" not in filename:
        return str(path.relative_to(ROOT))
    return filename.partition("site-packages/")[2] or path.name
