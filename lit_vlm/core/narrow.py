"""Weights in a narrower type than fp32, where this changes no number that a run computes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

ROUNDING = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv1D)
"""Layers all of whose weights `torch.autocast` rounds before each use. Norms, word tables and positions it does not.

Subclasses are left out, as they may do more with a weight than multiply.
"""
GLANCE = 4096
"""Values that are looked at before a whole tensor is."""


def operands(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The frozen parameters that nothing but layers of `ROUNDING` holds, each under one of its names."""
    elsewhere = {
        id(parameter)
        for layer in module.modules()
        for name, parameter in layer.named_parameters(recurse=False, remove_duplicate=False)
        if type(layer) not in ROUNDING or name not in ("weight", "bias")
    }
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad and id(parameter) not in elsewhere:
            yield name, parameter


def wider(named: Iterable[tuple[str, nn.Parameter]], dtype: torch.dtype) -> list[tuple[str, nn.Parameter]]:
    """Those parameters of floating point that `dtype` is narrower than."""
    return [(name, p) for name, p in named if p.is_floating_point() and p.dtype.itemsize > dtype.itemsize]


def narrow_operands(module: nn.Module, dtype: torch.dtype, name: str) -> None:
    """Round the parameters of `operands` in place; under autocast to `dtype` the module computes what it did before.

    Args:
        module: with its weights.
        dtype: bf16 or fp16.
        name: what the module is, for messages.

    Raises:
        ValueError: as `rounded`.
    """
    for key, parameter in wider(operands(module), dtype):
        parameter.data = rounded(parameter.data, dtype, f"{name}.{key}")


def rounded(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """The tensor in `dtype`.

    Raises:
        ValueError: naming the tensor, for finite values beyond the range of fp16.
    """
    low = tensor.to(dtype)
    if dtype == torch.float16 and not low.isfinite().all() and tensor.isfinite().all():
        raise ValueError(
            f"{name} has values up to {float(tensor.abs().max()):.3g}, and trainer.precision 16-mixed computes with "
            "infinity in place of those above 65504: set it to bf16-mixed or 32-true"
        )
    return low


def narrowest(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The same values in a narrower type that has them all exactly, `dtype`, bf16 or fp16; else the tensor itself."""
    for narrow in dict.fromkeys((dtype, torch.bfloat16, torch.float16)):
        if tensor.itemsize <= narrow.itemsize or _exact(tensor.flatten()[:GLANCE], narrow) is None:
            continue
        if (low := _exact(tensor, narrow)) is not None:
            return low
    return tensor


def _exact(tensor: Tensor, dtype: torch.dtype) -> Tensor | None:
    low = tensor.to(dtype)
    return low if torch.equal(low.to(tensor.dtype), tensor) else None
