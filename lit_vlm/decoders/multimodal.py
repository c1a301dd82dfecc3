"""The text part of a multimodal checkpoint of transformers as a causal language model of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForImageTextToText,
    PretrainedConfig,
)

from lit_vlm.core.pretrained import plain_config, read_pretrained

PLAIN: dict[str, dict[str, Any]] = {
    "glm4v_text": {"model_type": "glm4"},
    "qwen2_vl_text": {"model_type": "qwen2"},
    "qwen2_5_vl_text": {"model_type": "qwen2"},
    "qwen3_vl_text": {"model_type": "qwen3"},
    "qwen3_vl_moe_text": {"model_type": "qwen3_moe", "norm_topk_prob": True},
}
"""Text model with positions of three kinds (M-RoPE) → its settings as the model that it is where they are equal, as in
text."""
OF_THREE = ("mrope_section", "mrope_interleaved")
"""Settings of rotary frequencies for three kinds of positions."""


def is_multimodal(config: PretrainedConfig) -> bool:
    """Whether a configuration is that of a model that reads images and text, with a text model in it."""
    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and getattr(config, "text_config", None) is not None


def text_config(config: PretrainedConfig, source: str) -> PretrainedConfig:
    """The configuration of the text part as a causal language model.

    Whether word table and output layer are one is asked of the whole model, as its configuration and that of its text
    part may say different things.

    Args:
        config: that of the whole model.
        source: where it is from, for the message.

    Raises:
        ValueError: for a text part that is no causal language model on its own.
    """
    text = config.get_text_config(decoder=True)
    if text.model_type in PLAIN:
        settings = plain_config(text) | PLAIN[text.model_type]
        rope = settings.get("rope_parameters") or {}
        settings["rope_parameters"] = {key: value for key, value in rope.items() if key not in OF_THREE}
        text = AutoConfig.for_model(**settings)
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"decoder.name {source} is a '{config.model_type}', whose text part, a '{text.model_type}', is no causal "
            "language model of transformers: name a language model"
        )
    whole = _on_meta(config)
    text.tie_word_embeddings = whole.get_output_embeddings().weight is whole.get_input_embeddings().weight
    return text


def text_state(config: PretrainedConfig, source: str, lm: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The weights of the text part, under the names of a causal language model.

    Args:
        config: that of the whole model.
        source: its folder, as `resolve` gives it.
        lm: the language model, whose weights may have no values.

    Returns:
        the weights, and name → reason of those that the files lack, as `read_pretrained`.

    Raises:
        ValueError: as `read_pretrained`.
    """
    whole = _on_meta(config)
    names = dict(zip(_places(whole), _places(lm), strict=True))
    state, lacking = read_pretrained(AutoModelForImageTextToText, source, dtype=torch.get_default_dtype())

    def renamed(found: dict[str, Any]) -> dict[str, Any]:
        return {
            own + key.removeprefix(theirs): value
            for key, value in found.items()
            for theirs, own in names.items()
            if key.startswith(theirs)
        }

    return renamed(state), renamed(lacking)


def blocks_of(model: Any) -> Any:
    """The part of a model of transformers that holds the blocks with the final norm, without the output layer."""
    found = model.get_decoder()
    if found is not model and found.get_output_embeddings() is not None:  # a language model inside a multimodal one
        return blocks_of(found)
    if found is model:  # Llama 4's text model does not name its inner model
        found = next((child for child in model.children() if hasattr(child, "layers")), found)
    return found


def _places(model: Any) -> tuple[str, str]:
    """How the names of the weights of blocks and output layer begin."""
    wanted = (blocks_of(model), model.get_output_embeddings())
    names = {id(module): f"{name}." for name, module in model.named_modules()}
    return names[id(wanted[0])], names[id(wanted[1])]


def _on_meta(config: PretrainedConfig) -> Any:
    with torch.device("meta"):  # as transformers itself makes a model before it reads weights
        return AutoModelForImageTextToText.from_config(config)
