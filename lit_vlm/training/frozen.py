"""Frozen weights in the type that a run computes in, and their own values for its checkpoints.

Autocast rounds a weight to the compute type before each matrix product, and FSDP2 gathers all weights in it. So a
weight that does not train can be stored rounded, and no number changes. A checkpoint must not hold the rounded one: a
later stage may train it. Where rounding loses something, the value is kept on the host, whole or by shard.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor

from lit_vlm.core.narrow import narrowest, operands, rounded, wider


class Originals:
    """Own values of frozen weights that are stored rounded: they take the place of these in the model's state dict.

    They are in the narrowest type that has them exactly: published bf16 weights need none, fp16 ones two bytes each.

    Args:
        model: its state dict, also as a part of a larger one, gets the values.
        dtype: type that the weights are stored in.
        names: all names in the state dict of weights that are stored rounded.
        values: own values by name, of those that rounding changed; on the CPU, sharded as the weights are.
    """

    def __init__(
        self, model: nn.Module, dtype: torch.dtype, names: Collection[str], values: Mapping[str, Tensor]
    ) -> None:
        self._dtype, self._names, self.values = dtype, frozenset(names), dict(values)
        model.register_state_dict_post_hook(partial(self._give))  # PyTorch marks the hook, and a method takes no mark
        model.register_load_state_dict_pre_hook(self._take)

    def _give(self, _model: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
        for name, value in self.values.items():
            if prefix + name in state:
                state[prefix + name] = value

    def _take(self, _model: nn.Module, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
        """Keep the values that are loaded; shards are read into the own values themselves, which the state dict has."""
        for name in self._names:
            value = state.get(prefix + name)
            if value is None or isinstance(value, DTensor):
                continue
            exact = narrowest(value, self._dtype)
            self.values.pop(name, None)
            if exact.dtype != self._dtype:
                self.values[name] = exact.cpu()


def narrow_whole(model: nn.Module, dtype: torch.dtype, keep: bool) -> Originals | None:
    """Round the frozen weights that autocast rounds before each use, in place, on a model that is not sharded.

    Args:
        model: after `Stage.freeze`.
        dtype: the type of autocast.
        keep: whether this process writes checkpoints of a training run, so that own values must be kept.

    Raises:
        ValueError: for weights beyond the range of `dtype`.
    """
    narrow = wider(operands(model), dtype)
    names = _names(model, narrow)
    values: dict[str, Tensor] = {}
    for name, parameter in narrow:
        own = parameter.data
        parameter.data = rounded(own, dtype, name)
        if keep and (exact := narrowest(own, dtype)).dtype != dtype:
            values |= dict.fromkeys(names[name], exact.cpu())
    return Originals(model, dtype, [n for group in names.values() for n in group], values) if keep else None


def narrow_meta(model: nn.Module, dtype: torch.dtype) -> dict[str, list[str]]:
    """Give all frozen parameters, which are on the meta device, another type; returns their names, as `_names`."""
    narrow = wider(((name, p) for name, p in model.named_parameters() if not p.requires_grad), dtype)
    names = _names(model, narrow)
    for _, parameter in narrow:
        parameter.data = parameter.data.to(dtype)
    return names


def pack(state: dict[str, Tensor], names: Mapping[str, list[str]], dtype: torch.dtype) -> None:
    """Put whole weights into the narrowest types that have them exactly, in place.

    Args:
        state: all weights by name.
        names: from `narrow_meta`.
        dtype: type that the weights will be stored in.
    """
    for name, group in names.items():
        if name in state:
            state |= dict.fromkeys((one for one in group if one in state), narrowest(state[name], dtype))


def scatter_originals(
    model: nn.Module, state: Mapping[str, Tensor], names: Mapping[str, list[str]], dtype: torch.dtype
) -> Originals:
    """Keep on each process its shards of the own values that rounding changed; all processes call this.

    Args:
        model: sharded.
        state: after `pack`, on rank 0; empty on the others.
        names: from `narrow_meta`.
        dtype: type that the weights are stored in.
    """
    lossy: list[Any] = [[(n, state[n].dtype) for n in names if n in state and state[n].dtype != dtype]]
    dist.broadcast_object_list(lossy, src=0)
    parameters = dict(model.named_parameters())
    values: dict[str, Tensor] = {}
    for name, own in lossy[0]:
        shard = parameters[name]
        assert isinstance(shard, DTensor)
        mesh: DeviceMesh = shard.device_mesh
        device = shard.to_local().device
        whole = state[name].to(device) if name in state else torch.empty(shard.shape, dtype=own, device=device)
        # A shard is a piece of memory of its own on the host: the whole tensor is freed.
        values |= dict.fromkeys(names[name], distribute_tensor(whole, mesh, shard.placements).cpu())
    return Originals(model, dtype, [n for group in names.values() for n in group], values)


def stored_in(model: nn.Module) -> str:
    """In words, the bytes of frozen weights that this process has on its device, by type; empty without any."""
    sizes: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            own = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            sizes[own.dtype] = sizes.get(own.dtype, 0) + own.nbytes
    parts = [f"{size / 2**20:,.1f} MiB in {str(dtype).removeprefix('torch.')}" for dtype, size in sizes.items() if size]
    return f"frozen weights per device: {', '.join(sorted(parts))}" if parts else ""


def _names(model: nn.Module, narrow: list[tuple[str, nn.Parameter]]) -> dict[str, list[str]]:
    """All names in the state dict of each of some parameters: modules and parameters may have several."""
    groups: dict[int, list[str]] = {id(parameter): [] for _, parameter in narrow}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in groups:
            groups[id(parameter)].append(name)
    return {name: groups[id(parameter)] for name, parameter in narrow}
