"""What a step executes: operations, bytes and messages, counted as PyTorch dispatches them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from lit_vlm.core.flops import operations_of

Phase = Literal["forward", "backward", "recompute", "optimizer"]

MESSAGES = {
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "allgather_into_tensor_coalesced_": "all_gather",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "broadcast_": "broadcast",
    "allgather_": "all_gather",
    "reduce_scatter_": "reduce_scatter",
}
"""Operations of `torch.ops.c10d` that move data between devices, and the name of what they do."""
FREE = (
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_", "set_"),
    *("record_stream", "_unsafe_view"),
)
"""Operations that launch no kernel, besides views."""


class Operation(NamedTuple):
    """Operations of one kind and size in one phase of a step.

    Attributes:
        phase: where in the step.
        name: of the operation, as PyTorch calls it.
        dtype: of its first floating-point operand.
        flops: of one call: matrix products, convolutions and attention; 0 for all others.
        bytes: that one call reads and writes.
        calls: number of calls.
    """

    phase: Phase
    name: str
    dtype: str
    flops: float
    bytes: float
    calls: int


class Message(NamedTuple):
    """Messages of one kind and size between devices.

    Attributes:
        phase: where in the step.
        kind: `all_gather`, `reduce_scatter`, `all_reduce` or `broadcast`.
        bytes: of the whole tensor, which is gathered, reduced or sent.
        ranks: number of devices that take part.
        nodes: number of machines that they are on.
        calls: number of messages.
    """

    phase: Phase
    kind: str
    bytes: float
    ranks: int
    nodes: int
    calls: int


class Recorder(TorchDispatchMode):
    """Records what is executed inside its context, also by the backward pass and by sharded tensors.

    PyTorch's own counter keeps track of modules by hooks, which a gradient taken inside a forward pass, as in the
    chunked loss, leads astray; this one asks the autograd engine where it is instead.

    Args:
        per_node: devices of a node.

    Attributes:
        stepping: set while the optimizer runs.
        mixed: names of operations that took tensors of a device and of the host, scalars aside.
    """

    def __init__(self, per_node: int) -> None:
        super().__init__()
        self.per_node = per_node
        self.stepping = False
        self.mixed: Counter[str] = Counter()
        self._operations: Counter[tuple[Phase, str, str, float, float]] = Counter()
        self._messages: Counter[tuple[Phase, str, float, int, int]] = Counter()

    @property
    def operations(self) -> list[Operation]:
        """All operations, the equal ones together."""
        return [Operation(*key, calls) for key, calls in self._operations.items()]

    @property
    def messages(self) -> list[Message]:
        """All messages, the equal ones together."""
        return [Message(*key, calls) for key, calls in self._messages.items()]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and record it."""
        if any(issubclass(one, DTensor) for one in types):
            return NotImplemented  # it comes again with the local tensors
        out = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional"):
            self._message(func, args)
        elif not _launches_nothing(func):
            self._operation(func, args, kwargs or {}, out)
        return out

    def _phase(self) -> Phase:
        # A backward pass runs without gradients; with them, it is computing a forward pass again.
        if self.stepping:
            return "optimizer"
        if torch._C._current_graph_task_id() == -1:
            return "forward"
        return "recompute" if torch.is_grad_enabled() else "backward"

    def _operation(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        given = list(_tensors((args, kwargs)))
        made = list(_tensors(out))
        if not any(tensor.is_cuda for tensor in (*given, *made)):
            return
        name = func._overloadpacket.__name__
        if name not in ("_to_copy", "copy_") and any(not t.is_cuda and t.ndim for t in given):
            self.mixed[name] += 1
        flops = operations_of(func, args, kwargs, out)
        written = made if not _in_place(func) else []
        moved = float(sum(t.numel() * t.element_size() for t in (*given, *written)))
        dtype = next((str(t.dtype).removeprefix("torch.") for t in given if t.is_floating_point()), "")
        self._operations[self._phase(), name, dtype, flops, moved] += 1

    def _message(self, func: Any, args: Any) -> None:
        kind = MESSAGES.get(func._overloadpacket.__name__)
        if kind is None:
            return
        sizes = [float(sum(t.numel() * t.element_size() for t in _tensors(one))) for one in args[:2]]
        ranks = _ranks(args)
        nodes = len({rank // self.per_node for rank in ranks})
        self._messages[self._phase(), kind, max(sizes), len(ranks), nodes] += 1


def _ranks(args: Any) -> list[int]:
    """Ranks of the process group among the arguments of an operation."""
    for one in args:
        if isinstance(one, torch.ScriptObject):
            try:
                return dist.get_process_group_ranks(dist.ProcessGroup.unbox(one))
            except (RuntimeError, TypeError, ValueError):  # another object, such as a reduction
                continue
    return list(range(dist.get_world_size()))


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, list | tuple):
        for one in tree:
            yield from _tensors(one)
    elif isinstance(tree, dict):
        yield from _tensors(list(tree.values()))


@cache
def _launches_nothing(func: Any) -> bool:
    """Whether an operation returns a view, or memory without values."""
    if func._overloadpacket.__name__ in FREE or func.namespace in ("prim", "profiler"):
        return True
    infos = [value.alias_info for value in func._schema.returns]
    return any(info is not None and not info.is_write for info in infos)


@cache
def _in_place(func: Any) -> bool:
    return any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)
