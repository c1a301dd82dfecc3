"""Building architectures of transformers from configurations, with errors that name the setting to change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PretrainedConfig

ATTENTIONS = {
    "sdpa": "_supports_sdpa",
    "eager": None,
    "flex_attention": "_supports_flex_attn",
    "flash_attention_2": "_supports_flash_attn",
    "flash_attention_3": "_supports_flash_attn",
}
"""Implementation of attention → attribute of a model's class that says whether it has this one; None: all have it."""


def language_model(config: PretrainedConfig, attention: str) -> Any:
    """A causal language model with random weights.

    Args:
        config: configuration of the model.
        attention: implementation of attention, a key of `ATTENTIONS`.

    Raises:
        ValueError: for a model that is no causal language model, or an attention that it lacks or that is not
            installed.
    """
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"model.decoder: a '{config.model_type}' is no causal language model of transformers")
    family = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    # What the class says itself: Gemma 2 caps its attention's logits, which sdpa cannot do.
    has = [name for name, flag in ATTENTIONS.items() if flag is None or getattr(family, flag, False)]
    if attention not in has:
        raise ValueError(
            f"model.decoder: attention is {attention}, which a '{config.model_type}' does not have in transformers: "
            f"set model.decoder.init_args.attention to one of {', '.join(has)}"
        )
    with installed_attention("model.decoder", attention):
        # The dtype is the trainer's choice, not that of the files.
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.get_default_dtype())


@contextmanager
def installed_attention(slot: str, attention: str) -> Iterator[None]:
    """Turn the import error of an attention's package into one that names the setting which asks for it.

    Args:
        slot: key of the part in the config, such as `model.decoder`.
        attention: implementation of attention, a key of `ATTENTIONS`.

    Raises:
        ValueError: in place of an `ImportError` inside the context.
    """
    try:
        yield
    except ImportError as error:
        raise ValueError(
            f"{slot}: attention {attention} needs a package that is not here ({str(error).splitlines()[0]}): install "
            f"it, or set {slot}.init_args.attention to sdpa or eager"
        ) from error
