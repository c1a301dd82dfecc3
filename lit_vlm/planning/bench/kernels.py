"""What the kernels of a step say of the roofline: their time by kind, over what the device could do at best."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from torch._C._autograd import DeviceType
from torch.utils.flop_counter import flop_registry

from lit_vlm.core.devices import Card
from lit_vlm.planning.operations import Operation
from lit_vlm.planning.roofline import Assumptions, class_of, seconds

BEST = Assumptions(matrix=1.0, attention=1.0, bandwidth=1.0, kernel=0.0)
"""A device that reaches its peaks."""
SHARES = {"matrix": "matrix", "attention": "attention", "memory": "bandwidth"}
"""Kind of an operation → the assumption that it decides."""
MESSAGE = "nccl"
"""What names of kernels that communicate begin with, as far as a name tells."""
CONVOLUTION = "conv"
ATTENDS = ("attention", "attn", "sdpa", "fmha")
"""Parts of the names of attention's operations, of their nodes in the backward graph, or of their kernels."""


class Launch(NamedTuple):
    """A kernel that an operation launched.

    Attributes:
        operation: the innermost operation around it, as PyTorch calls it.
        kernel: name of the kernel.
        seconds: that it took.
    """

    operation: str
    kernel: str
    seconds: float


class Span(NamedTuple):
    """A kernel in the device's time.

    Attributes:
        kernel: its name.
        start: in seconds.
        end: in seconds.
    """

    kernel: str
    start: float
    end: float


@dataclass
class KernelTime:
    """Kernels of one kind in a step.

    Attributes:
        seconds: that they took.
        best: seconds of the same operations at the device's peaks; 0 where it is not known.
    """

    seconds: float = 0.0
    best: float = 0.0


@cache
def _matrix_names() -> frozenset[str]:
    return frozenset(packet.__name__ for packet in flop_registry)


def kind_of(launch: Launch) -> str:
    """`matrix`, `attention`, `message` or `memory`, which is all else."""
    if MESSAGE in launch.kernel.lower():
        return "message"
    name = launch.operation.rpartition("::")[2]
    if any(part in text.lower() for part in ATTENDS for text in (name, launch.kernel)):
        return "attention"
    return "matrix" if name in _matrix_names() or CONVOLUTION in name else "memory"


def kernel_times(
    launches: Iterable[Launch], operations: Iterable[Operation], card: Card | None
) -> dict[str, KernelTime]:
    """Time of kernels by kind; empty without kernels.

    Args:
        launches: of a micro-batch and its optimizer step.
        operations: recorded in the same.
        card: the device; None where its peaks are not known.
    """
    found: dict[str, KernelTime] = {}
    for launch in launches:
        found.setdefault(kind_of(launch), KernelTime()).seconds += launch.seconds
    if card is not None:
        for one in operations:
            if (kind := class_of(one)) in found:
                found[kind].best += one.calls * seconds(one, card, BEST)
    return found


def implied(times: Iterable[Mapping[str, KernelTime]]) -> dict[str, float]:
    """The shares of `Assumptions` that kernels of some steps imply, by the name of the assumption."""
    sums = {kind: KernelTime() for kind in SHARES}
    for step in times:
        for kind, one in step.items():
            if kind in sums and one.best:
                sums[kind].seconds += one.seconds
                sums[kind].best += one.best
    return {SHARES[kind]: one.best / one.seconds for kind, one in sums.items() if one.seconds}


def scaled(factor: float) -> dict[str, float]:
    """All shares times one factor, where kernels could not be told apart."""
    assumed = Assumptions()
    return {name: getattr(assumed, name) * factor for name in SHARES.values()}


def exposed(spans: Iterable[Span]) -> tuple[float, float]:
    """Seconds of messages between devices, and those of them beside which no other kernel runs."""
    given = list(spans)
    sent = _union([(one.start, one.end) for one in given if MESSAGE in one.kernel.lower()])
    busy = _union([(one.start, one.end) for one in given if MESSAGE not in one.kernel.lower()])
    return _length(sent), _length(sent) - _overlap(sent, busy)


Spans = list[tuple[float, float]]


def _union(spans: Spans) -> Spans:
    """The same moments as spans that do not overlap, in order."""
    merged: Spans = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _length(spans: Spans) -> float:
    return sum(end - start for start, end in spans)


def _overlap(left: Spans, right: Spans) -> float:
    """Seconds that two unions have in common."""
    total, i, j = 0.0, 0, 0
    while i < len(left) and j < len(right):
        total += max(0.0, min(left[i][1], right[j][1]) - max(left[i][0], right[j][0]))
        if left[i][1] < right[j][1]:
            i += 1
        else:
            j += 1
    return total


def recorded(events: Iterable[Any]) -> tuple[list[Launch], list[Span]]:
    """The kernels of a recording of `torch.profiler`, by operation and by time; both are empty where none ran.

    Args:
        events: `profile.events()`.
    """
    launches: list[Launch] = []
    spans: list[Span] = []
    events = list(events)
    stretches = {event.name for event in events if event.is_user_annotation}  # of the program; each spans many kernels
    for event in events:
        if event.name in stretches:  # also in the device's time, where not every version says that it is one
            continue
        if event.device_type == DeviceType.CUDA:
            spans.append(Span(event.name, event.time_range.start / 1e6, event.time_range.end / 1e6))
        else:
            kernels = (kernel for kernel in event.kernels if kernel.name not in stretches)
            launches += [Launch(event.name, kernel.name, kernel.duration / 1e6) for kernel in kernels]
    return launches, spans
