"""Low-rank adapters (LoRA) on the linear layers of any part.

A part knows nothing of adapters: they are put on when it is built and has its weights (`model.build`), and weights of
its own keep the names that the part gave them wherever the part reads or renames a state dict.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lit_vlm.core.part import Part, StateDict
from lit_vlm.core.pretrained import shortened

ADAPTED = ("encoder", "projector", "embedder", "decoder")
"""Slots that can have adapters; heads are small and start anew, so they train whole."""
_ADAPTER = re.compile(r"(.*)\.lora_[AB]\.default\.[^.]+$")
_BASE = ".base_layer."


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters on linear layers of a part; with them only the adapters train.

    Attributes:
        rank: rank of the update of a weight.
        alpha: scale: the update is multiplied by alpha / rank.
        dropout: dropout on the adapter's input.
        targets: names of the linear layers that get an adapter, or of modules that hold them; the part must have layers
            of each name. Default: all linear layers of its blocks, or of the whole part where it has no blocks.
    """

    rank: int = 64
    alpha: float = 128.0
    dropout: float = 0.0
    targets: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Adapters:
    """The adapters of each slot; null for a slot without.

    Attributes:
        encoder: adapters of the encoder.
        projector: adapters of the projector.
        embedder: adapters of the embedder.
        decoder: adapters of the decoder.
    """

    encoder: Lora | None = None
    projector: Lora | None = None
    embedder: Lora | None = None
    decoder: Lora | None = None


NO_ADAPTERS = Adapters()


def is_adapter(name: str) -> bool:
    """Whether a parameter's name is one of an adapter."""
    return _ADAPTER.match(name) is not None


def has_adapters(part: nn.Module) -> bool:
    """Whether a part has adapters."""
    return any(is_adapter(name) for name, _ in part.named_parameters())


def add_adapters(part: Part, lora: Lora, key: str) -> None:
    """Put adapters that change nothing yet on linear layers of a part, in place.

    Args:
        part: a part without adapters; may be on the meta device.
        lora: rank, scale and names of the layers.
        key: the key that asks for them, for messages.

    Raises:
        ValueError: when there is no layer to adapt, or none of one of the names, as its adapter would silently be left
            out; names those that there are.
    """
    from peft import LoraConfig, inject_adapter_in_model  # late, as most runs have no adapters

    chosen = "|".join(re.escape(name) for name in _chosen_layers(part, lora, key))
    pattern = rf"part\.(?:{chosen})"
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=pattern)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")  # for Conv1D; then set by peft
        # In a module around the part, as peft takes a module with a `config` for a model of transformers.
        inject_adapter_in_model(config, nn.ModuleDict({"part": part}))


def _chosen_layers(part: Part, lora: Lora, key: str) -> list[str]:
    """Names of the layers that get an adapter; raises as `add_adapters`."""
    layers = linear_layers(part)
    if lora.targets is None:
        blocks = {id(module) for block in part.blocks() for module in block.modules()}
        chosen = [name for name, layer in layers.items() if not blocks or id(layer) in blocks]
        if not chosen:
            where = "its blocks have no" if blocks else "it has no"
            raise ValueError(
                f"{key}: adapters go on linear layers, and {where} such layers in {_named(part)}: set {key} to null, "
                "and train this slot whole or leave it frozen"
            )
        return chosen
    absent = [t for t in lora.targets if not any(f".{t}." in f".{name}." for name in layers)]
    if absent or not lora.targets:
        known = sorted({name.rpartition(".")[2] for name in layers})
        raise ValueError(
            f"{key}: {_named(part)} has no layers {', '.join(absent) or 'without a name'}: set its targets to some of "
            f"{', '.join(known) or 'none: it has no linear layers'}"
        )
    return [name for name in layers if any(f".{target}." in f".{name}." for target in lora.targets)]


def linear_layers(part: nn.Module) -> dict[str, nn.Module]:
    """The linear layers that a part runs, by name.

    Subclasses of `nn.Linear` may do anything with their weight, and a weight that two places share would get its update
    twice, or where it is not meant; both are left out.
    """
    from transformers.pytorch_utils import Conv1D

    places: dict[int, int] = {}
    for module in part.modules():
        for parameter in module.parameters(recurse=False):
            places[id(parameter)] = places.get(id(parameter), 0) + 1
    names: dict[int, int] = {}
    for _, module in part.named_modules(remove_duplicate=False):
        names[id(module)] = names.get(id(module), 0) + 1
    return {
        name: module
        for name, module in part.named_modules()
        if type(module) in (nn.Linear, Conv1D)
        and names[id(module)] == 1
        and all(places[id(parameter)] == 1 for parameter in module.parameters(recurse=False))
    }


def _named(part: Part) -> str:
    """The class of a part, with the architecture that it was configured for."""
    kind = getattr(getattr(part, "config", None), "model_type", None)
    return f"{type(part).__name__}{f' ({kind})' if kind else ''}"


def split_state(state: Mapping[str, Tensor]) -> tuple[StateDict, StateDict]:
    """Weights under the names that the part gave them, and the adapters under theirs."""
    adapters = {key: value for key, value in state.items() if is_adapter(key)}
    adapted = {match[1] for key in adapters if (match := _ADAPTER.match(key))}
    return {plain_name(key, adapted): value for key, value in state.items() if key not in adapters}, adapters


def plain_name(key: str, adapted: set[str]) -> str:
    """The name of a weight without its adapter.

    Args:
        key: name of a weight, such as `blocks.0.q.base_layer.weight`.
        adapted: names of the layers that have an adapter.
    """
    layer, found, rest = key.rpartition(_BASE)
    return f"{layer}.{rest}" if found and layer in adapted else key


def check_adapters(part: Part, adapters: Mapping[str, Tensor], name: str, origin: str) -> None:
    """Check that saved adapters are those of a part, by names and shapes; no saved ones fit any part.

    Args:
        part: with its adapters.
        adapters: saved ones.
        name: the slot, for messages.
        origin: where they were read, for messages.

    Raises:
        ValueError: saying what differs.
    """
    own = {key: value for key, value in part.state_dict().items() if is_adapter(key)}
    if not adapters or {k: v.shape for k, v in own.items()} == {k: v.shape for k, v in adapters.items()}:
        return
    if not own:
        raise ValueError(
            f"{origin} has adapters for the slot '{name}' ({type(part).__name__}), and here it has none: set "
            f"model.lora.{name} as that stage had it, or add '{name}' to model.stage.fresh"
        )
    differing = [key for key in sorted(own.keys() & adapters.keys()) if own[key].shape != adapters[key].shape]
    shapes = [f"{key} {tuple(adapters[key].shape)} instead of {tuple(own[key].shape)}" for key in differing]
    missing, surplus = sorted(own.keys() - adapters.keys()), sorted(adapters.keys() - own.keys())
    problems = [
        f"{title}: {shortened(keys)}"
        for title, keys in (("missing", missing), ("not of this part", surplus), ("other shape", shapes))
        if keys
    ]
    raise ValueError(
        f"{origin}: the adapters do not fit the slot '{name}' ({type(part).__name__}): {'; '.join(problems)}. Set rank "
        f"and targets of model.lora.{name} as that stage had them, or add '{name}' to model.stage.fresh"
    )


def load_adapters(part: Part, adapters: Mapping[str, Tensor], name: str, origin: str) -> None:
    """Load saved adapters into those of a part; without saved ones they stay new. Raises as `check_adapters`."""
    check_adapters(part, adapters, name, origin)
    with torch.no_grad():
        for key, parameter in part.named_parameters():
            if key in adapters:
                parameter.copy_(adapters[key])


def trained_parameters(part: Part, only: str | None = None) -> list[nn.Parameter]:
    """What trains when a stage trains a part: with adapters, only these and what `Part.beside_adapters` names.

    Args:
        part: with or without adapters.
        only: a group of parameters, as for `Part.trainable_parameters`.

    Raises:
        ValueError: as `Part.trainable_parameters`.
    """
    chosen = list(part.trainable_parameters(only))
    adapters = {id(parameter) for name, parameter in part.named_parameters() if is_adapter(name)}
    if not adapters:
        return chosen
    adapters |= {id(parameter) for parameter in part.beside_adapters()}
    return [parameter for parameter in chosen if id(parameter) in adapters]


def adapted_layers(part: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of each layer with an adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    yield from [(name, module) for name, module in part.named_modules() if isinstance(module, BaseTunerLayer)]


def merge_adapters(part: nn.Module) -> None:
    """Add adapters into the weights that they adapt, and remove them, in place; does nothing without adapters."""
    for name, layer in adapted_layers(part) if has_adapters(part) else ():
        layer.merge()  # type: ignore[operator]
        part.set_submodule(name, layer.get_base_layer())  # type: ignore[operator]


def effective_weight(layer: nn.Module) -> Tensor:
    """The weight of a linear layer with its adapter: for parts that compute with a weight, and do not run its layer.

    Dropout of the adapter is left out, as it belongs to the input of a layer that runs.
    """
    weight: Tensor = layer.get_parameter("weight")
    if not hasattr(layer, "get_delta_weight"):
        return weight
    return weight + layer.get_delta_weight("default")  # type: ignore[operator]
