"""Frozen linear layers whose weight is stored in 4 or 8 bits (QLoRA, Dettmers 2023); torchao packs nf4.

The bits are ordinary parameters of integer types, so that they are sharded, gathered and moved as any others, and no
cast to a floating type touches them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_vlm.core.bits import Kind
from lit_vlm.core.lora import ADAPTED, is_adapter, linear_layers
from lit_vlm.core.part import Part

FP8 = torch.float8_e4m3fn
LARGEST = {"int8": 127.0, "fp8": torch.finfo(FP8).max}
"""The number that the largest weight of a row becomes."""
BLOCK = 64
"""Weights that share a scale in nf4, as in QLoRA."""
SCALES = 256
"""Scales that share a scale of their own, at most."""


@dataclass(frozen=True)
class Quantize:
    """The type in which the frozen weights of a slot's blocks are stored; null: as they are.

    Attributes:
        encoder: `nf4`, `int8` or `fp8`, of the encoder.
        projector: `nf4`, `int8` or `fp8`, of the projector.
        embedder: `nf4`, `int8` or `fp8`, of the embedder.
        decoder: `nf4`, `int8` or `fp8`, of the decoder.
    """

    encoder: Kind | None = None
    projector: Kind | None = None
    embedder: Kind | None = None
    decoder: Kind | None = None

    def kinds(self) -> dict[str, Kind]:
        """Slot → type, of the slots that have one."""
        return {slot: kind for slot in ADAPTED if (kind := getattr(self, slot)) is not None}


UNQUANTISED = Quantize()


class _Linear(torch.autograd.Function):
    """A product with a frozen weight that is unpacked for the forward pass, and again for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantisedLinear, bias: Tensor | None, *bits: Tensor) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        ctx.save_for_backward(*bits)
        return F.linear(x, layer.unpacked(bits, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        bits = ctx.saved_tensors  # read once, as blocks that are recomputed allow
        weight = ctx.layer.unpacked(bits, grads[0].dtype)
        return ((grads[0] @ weight).to(ctx.dtype), None, None, *[None] * len(bits))


class QuantisedLinear(nn.Module):
    """A linear layer with a frozen weight in 4 or 8 bits.

    Args:
        linear: the layer; on the meta device only shapes are made. Its bias is taken over.
        kind: `nf4`: blocks of 64 weights share a scale, and scales are stored in 8 bits; `int8` and `fp8`: a scale per
            row.
        device: where the weight is packed, which a GPU does far faster; default: where it is. It stays where it is.
    """

    def __init__(self, linear: nn.Linear, kind: Kind, device: torch.device | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features, self.kind = linear.in_features, linear.out_features, kind
        self.bias = linear.bias
        weight = linear.weight.detach()
        bits = _shapes(weight, kind) if weight.is_meta else _packed(weight.to(device).float(), kind)
        self._names = tuple(bits)
        for name, value in bits.items():
            self.register_parameter(name, nn.Parameter(value.to(weight.device), requires_grad=False))

    def weight_of_now(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that the layer computes with: `[out, in]`."""
        return self.unpacked([self.get_parameter(name) for name in self._names], dtype)

    def unpacked(self, bits: Any, dtype: torch.dtype) -> Tensor:
        """A weight from its parameters, in the order in which they were registered: `[out, in]`."""
        if self.kind != "nf4":
            data, scale = bits
            numbers = data.view(FP8).float() if self.kind == "fp8" else data
            return (numbers * scale.view(torch.float32)[:, None]).to(dtype)
        return _nf4(dict(zip(self._names, bits, strict=True)), (self.out_features, self.in_features)).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` → `[..., out]`."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return _Linear.apply(x, self, self.bias, *(self.get_parameter(name) for name in self._names))

    def extra_repr(self) -> str:
        """Widths and type."""
        return f"{self.in_features}, {self.out_features}, {self.kind}"


def _scale_block(numel: int) -> int:
    """Number of scales that share one: the largest power of two that divides their number, at most `SCALES`."""
    blocks = numel // BLOCK
    return min(SCALES, blocks & -blocks)


def _packed(weight: Tensor, kind: Kind) -> dict[str, Tensor]:
    """The parameters of a weight `[out, in]` in fp32; numbers in fp32 are stored as their bits, in int32."""
    if kind != "nf4":
        scale = weight.abs().amax(1).clamp(min=1e-12) / LARGEST[kind]
        rows = weight / scale[:, None]
        data = rows.round().to(torch.int8) if kind == "int8" else rows.to(FP8).view(torch.int8)
        return {"data": data, "scale": scale.view(torch.int32)}
    from torchao.quantization import NF4Tensor

    packed: Any = NF4Tensor.from_tensor(weight.contiguous(), BLOCK, _scale_block(weight.numel()))
    return {
        "data": packed.quantized_data.view(weight.shape[0], -1),
        "scales": packed.quantized_scalers,
        "factors": packed.quantization_factor.view(torch.int32),
        "mean": packed.scaler_mean.view(1).view(torch.int32),
    }


def _shapes(weight: Tensor, kind: Kind) -> dict[str, Tensor]:
    """`_packed` without values."""

    def empty(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    rows, columns = weight.shape
    if kind != "nf4":
        return {"data": empty(torch.int8, rows, columns), "scale": empty(torch.int32, rows)}
    blocks = weight.numel() // BLOCK
    return {
        "data": empty(torch.uint8, rows, columns // 2),
        "scales": empty(torch.int8, blocks),
        "factors": empty(torch.int32, blocks // _scale_block(weight.numel())),
        "mean": empty(torch.int32, 1),
    }


def _nf4(bits: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
    """The weight of a packed one, in fp32."""
    from torchao.quantization import NF4Tensor
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import SubclassTensorArgs

    data, numel = bits["data"], shape[0] * shape[1]
    meta = SubclassTensorArgs(torch.Size(shape), (shape[1], 1), 0, torch.float32, data.device, False)
    packed: Any = NF4Tensor(
        meta, BLOCK, numel // BLOCK, _scale_block(numel), bits["scales"], bits["factors"].view(torch.float32),
        bits["mean"].view(torch.float32)[0], data.flatten(), torch.tensor(LEVELS, device=data.device),
    )  # fmt: skip
    weight: Tensor = packed.get_original_weight()
    return weight.view(shape)


LEVELS = (-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0,
          0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0)  # fmt: skip
"""The values of nf4, as torchao has them."""


def quantise(part: Part, kind: Kind, slot: str, device: torch.device | None = None) -> None:
    """Store the frozen weights of linear layers in a part's blocks in 4 or 8 bits, in place.

    Args:
        part: after `Stage.freeze`, with adapters if it has some; whole on the CPU, or on the meta device.
        kind: the type.
        slot: the slot, for messages.
        device: where weights are packed; default: where they are.

    Raises:
        ValueError: for a part whose own weights train; and as `layers_to_quantise`.
    """
    layers = layers_to_quantise(part, kind, slot)
    if any(layer.weight.requires_grad for _, layer in layers):
        raise ValueError(
            f"model.quantize.{slot}: the stage trains the weights of {type(part).__name__}, and quantised ones stay as "
            f"they are: give it adapters (model.lora.{slot}), take {slot} out of model.stage.train, or set "
            f"model.quantize.{slot} to null"
        )
    for name, layer in layers:
        part.set_submodule(name, QuantisedLinear(layer, kind, device))


def round_to(part: Part, kind: Kind, slot: str) -> None:
    """Round the weights that `quantise` stores in fewer bits to what they become there, and leave them as they are.

    A model that was trained on a quantised base is asked, scored and exported with the weights that it was trained on.

    Raises:
        ValueError: as `layers_to_quantise`.
    """
    for _, layer in layers_to_quantise(part, kind, slot):
        with torch.no_grad():
            layer.weight.copy_(QuantisedLinear(layer, kind).weight_of_now(layer.weight.dtype))


def layers_to_quantise(part: Part, kind: Kind, slot: str) -> list[tuple[str, nn.Linear]]:
    """Name and module of each linear layer in a part's blocks; those of adapters are left out.

    Raises:
        ValueError: for a part without such layers, or nf4 without torchao.
    """
    key = f"model.quantize.{slot}"
    check_kind(kind, key)
    if not (found := _layers(part, kind)):
        raise ValueError(f"{key}: {type(part).__name__} has no linear layers in blocks: set {key} to null")
    return found


def _layers(part: Part, kind: Kind) -> list[tuple[str, nn.Linear]]:
    """Name and module of each linear layer in a part's blocks that a type can hold; those of adapters are left out."""
    blocks = {id(module) for block in part.blocks() for module in block.modules()}
    return [
        (name, layer)
        for name, layer in linear_layers(part).items()
        if type(layer) is nn.Linear
        and id(layer) in blocks
        and not is_adapter(f"{name}.weight")
        and (kind != "nf4" or (layer.weight.numel() % BLOCK == 0 and layer.in_features % 2 == 0))
    ]


def quantise_parts(parts: Mapping[str, Part], kind: Kind, asked_by: str) -> None:
    """Store the weights of linear layers in all blocks in 4 or 8 bits, in place, to ask a model and not to train it.

    Args:
        parts: slot → part, without adapters; parts without linear layers in blocks stay as they are.
        kind: the type.
        asked_by: what asks for it, for messages.

    Raises:
        ValueError: where no part has such layers, or for nf4 without torchao.
    """
    check_kind(kind, asked_by)
    found = {slot: layers for slot, part in parts.items() if (layers := _layers(part, kind))}
    if not found:
        raise ValueError(f"{asked_by}: no part of this model has linear layers in blocks")
    for slot, layers in found.items():
        for name, layer in layers:
            parts[slot].set_submodule(name, QuantisedLinear(layer, kind))


def quantised_kinds(parts: Mapping[str, nn.Module]) -> dict[str, Kind]:
    """Slot → type, of the parts that have quantised layers."""
    return {
        slot: module.kind
        for slot, part in parts.items()
        for module in part.modules()
        if isinstance(module, QuantisedLinear)
    }


def check_kind(kind: Kind | None, asked_by: str) -> None:
    """Check that what packs a type is installed.

    Args:
        kind: the type; None needs nothing.
        asked_by: what asks for it, for messages.

    Raises:
        ValueError: for nf4 without torchao.
    """
    if kind == "nf4" and importlib.util.find_spec("torchao") is None:
        raise ValueError(f"{asked_by}: nf4 needs the package torchao: pip install 'lit-vlm[quantized]'")


def weights_in(parameter: Tensor) -> int:
    """Number of weights that a parameter holds: two per byte in nf4."""
    return parameter.numel() * (2 if parameter.dtype == torch.uint8 else 1)


def own_weights(part: nn.Module) -> Iterator[tuple[int, int, bool]]:
    """Identity, number of weights and whether it trains, of each parameter but the scales of quantised weights."""
    for module in part.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not isinstance(module, QuantisedLinear) or name in ("data", "bias"):
                yield id(parameter), weights_in(parameter), parameter.requires_grad
