"""Low-rank adapters on a decoder's linear layers."""

from __future__ import annotations

from dataclasses import dataclass

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters on linear layers of the decoder; with them only the adapters train.

    Attributes:
        rank: rank of the update of a weight.
        alpha: scale: the update is multiplied by alpha / rank.
        dropout: dropout on the adapter's input.
        targets: names of the linear layers that get an adapter; the decoder must have layers of each name.
    """

    rank: int = 64
    alpha: float = 128.0
    dropout: float = 0.0
    targets: tuple[str, ...] = LINEAR_LAYERS


def add_adapters(lora: Lora, lm: nn.Module, model_type: str) -> None:
    """Put adapters on the linear layers of a causal language model, in place.

    Args:
        lora: rank, scale and names of the layers.
        lm: the model.
        model_type: name of its architecture, for the message.

    Raises:
        ValueError: when the model has no layer of one of the names, as its adapter would silently be left out.
    """
    linear = {name.rpartition(".")[2] for name, module in lm.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    if absent := [target for target in lora.targets if target.rpartition(".")[2] not in linear]:
        raise ValueError(
            f"model.decoder.init_args.lora: a '{model_type}' has no layers {', '.join(absent)}: "
            f"set its targets to some of {', '.join(sorted(linear))}"
        )
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=list(lora.targets)
    )
    inject_adapter_in_model(config, lm)


def merge_adapters(lm: nn.Module) -> None:
    """Add adapters into the weights that they adapt, and remove them, in place."""
    for name, module in list(lm.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            lm.set_submodule(name, module.get_base_layer())
