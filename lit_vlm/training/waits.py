"""Finding the places of a training step in which the host waits for the device.

A step that never waits lets the host run ahead, so that the device always has work queued; each wait ends that lead.
"""

from __future__ import annotations

import traceback
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[2]
KIT = (str(ROOT / "lit_vlm"), str(ROOT / "callbacks"))
OWN = (
    "/training/waits.py",
    "/warnings.py",
    "/_python_dispatch.py",
    "/torch/_ops.py",
    "/_dynamo/eval_frame.py",
    "/torch/_compile.py",
)
"""Ends of the paths of what stands between a wait and this module."""
SIGN = "synchronizing CUDA operation"
"""What PyTorch's warning of a wait says."""

MEANT = {
    "callbacks/throughput.py _log": "each log_every_n_steps: the time that the steps took, and counts of all ranks",
    "callbacks/sources.py _gather": "each log_every_n_steps and before a checkpoint: counts of all ranks",
    "lightning/pytorch/trainer/connectors/logger_connector": "each log_every_n_steps: values go to the loggers",
    "lit_vlm/core/losses.py _of_each_rank": "contrastive losses on several ranks: how many pictures each of them has",
    "torch/amp/grad_scaler.py": "16-mixed: whether a gradient has overflowed decides whether the optimizer steps",
}
"""Beginnings of places whose waits are meant → why. Any other wait inside a step is a mistake."""


class Waits(AbstractContextManager["Waits"]):
    """Counts the operations by which the host waits for a CUDA device, by where in the code they are.

    A place is the innermost function of the kit and, where that called a library, the innermost function of it:
    `lit_vlm/model/vlm.py see < torch/nn/modules/module.py _call_impl`. Copies from memory that is not pinned count
    too: PyTorch does not warn of them where they are asked not to block, yet the driver may wait in them. Waits in
    autograd's own threads are found under the call of the backward pass.

    Attributes:
        found: place → number of waits.
    """

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()
        self._contexts = ExitStack()

    def __enter__(self) -> Waits:
        """Begin to count."""
        self._contexts.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("always", message=f".*{SIGN}")
        self._show, warnings.showwarning = warnings.showwarning, self._keep
        self._contexts.callback(torch.cuda.set_sync_debug_mode, torch.cuda.get_sync_debug_mode())
        torch.cuda.set_sync_debug_mode("warn")
        self._contexts.enter_context(_PageableCopies(self.found))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop counting."""
        self._contexts.close()

    def unwanted(self) -> dict[str, int]:
        """Those of `found` that are not in `MEANT`."""
        meant = tuple(MEANT)
        return {
            place: number
            for place, number in self.found.items()
            if not any(part.startswith(meant) for part in place.split(" < "))
        }

    def _keep(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if SIGN in str(message):
            self.found[_place()] += 1
        else:
            self._show(message, category, filename, lineno, file, line)


class _PageableCopies(TorchDispatchMode):
    """Counts copies to the device that are asked not to block, from memory of the host that is not pinned."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation; count it where it is such a copy."""
        out = func(*args, **(kwargs or {}))
        source = _source_without_blocking(func._overloadpacket, args, kwargs or {})
        pageable = source is not None and source.device.type == "cpu" and source.numel() and not source.is_pinned()
        if pageable and out.is_cuda:
            self._found[f"{_place()} (not pinned)"] += 1
        return out


def _source_without_blocking(name: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """What an operation copies from, if it is a copy that is asked not to block."""
    if name is torch.ops.aten._to_copy and kwargs.get("non_blocking"):
        return cast(Tensor, args[0])
    if name is torch.ops.aten.copy_ and (kwargs.get("non_blocking") or args[2:3] == (True,)):
        return cast(Tensor, args[1])
    return None


def _place() -> str:
    """Where the operation is that warned: `KIT'S FILE FUNCTION < LIBRARY'S FILE FUNCTION`, one of which may lack."""
    frames = [frame for frame in traceback.extract_stack() if not frame.filename.endswith(OWN)]
    own = [frame for frame in frames if frame.filename.startswith(KIT)][-1:]
    library = [] if own == frames[-1:] else frames[-1:]
    return " < ".join(_named(frame) for frame in own + library)


def _named(frame: traceback.FrameSummary) -> str:
    path = Path(frame.filename)
    short = path.relative_to(ROOT) if path.is_relative_to(ROOT) else None
    if short is None:
        parts = path.parts
        after = parts.index("site-packages") + 1 if "site-packages" in parts else max(0, len(parts) - 2)
        short = Path(*parts[after:])
    return f"{short} {frame.name}"
