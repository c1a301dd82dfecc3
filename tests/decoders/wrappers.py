"""Multimodal checkpoints as decoders by their text part: the second table of docs/decoders.md, made by `families`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from lit_vlm.decoders import HFDecoder
from tests.decoders.test_order import CONV, DELTA, EXPERTS, PLAIN, SIZES, WINDOW

TEXT = SIZES | {"vocab_size": 300, "num_hidden_layers": 2}
PLAIN_TEXT = PLAIN | {"vocab_size": 300, "num_hidden_layers": 2}
BLOCK = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
SIDES = {"image_size": 28, "patch_size": 7}
SIGLIP = BLOCK | SIDES | {"model_type": "siglip_vision_model"}
CLIP = BLOCK | SIDES | {"model_type": "clip_vision_model"}
WINDOWS = WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}
QWEN = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "patch_size": 7, "out_hidden_size": 64}
QWEN |= {"embed_dim": 32, "fullatt_block_indexes": [0], "deepstack_visual_indexes": [0], "num_position_embeddings": 16}


def rotary(section: list[int], **settings: Any) -> dict[str, Any]:
    """Rotary frequencies for positions of three kinds."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": section} | settings}


MULTIMODAL: dict[str, dict[str, Any]] = {
    "aya_vision": {"text_config": TEXT | WINDOW | {"model_type": "cohere2"}, "vision_config": SIGLIP},
    "gemma3": {"text_config": TEXT | WINDOWS, "vision_config": SIGLIP, "mm_tokens_per_image": 4},
    "gemma4": {
        "text_config": TEXT
        | WINDOWS
        | {"global_head_dim": 16, "vocab_size_per_layer_input": 300, "hidden_size_per_layer_input": 8},
        "vision_config": BLOCK | {"num_key_value_heads": 2, "head_dim": 16, "patch_size": 7},
        "audio_config": None,
    },
    "glm4v": {"text_config": TEXT | rotary([1, 1, 2], partial_rotary_factor=0.5), "vision_config": QWEN},
    "idefics3": {"text_config": TEXT | {"model_type": "llama"}, "vision_config": BLOCK | SIDES},
    "internvl": {
        "text_config": TEXT | {"model_type": "qwen2"},
        "vision_config": BLOCK | {"image_size": [28, 28], "patch_size": [7, 7]},
    },
    "lfm2_vl": {
        "text_config": TEXT | CONV | {"model_type": "lfm2", "num_hidden_layers": 4},
        "vision_config": BLOCK | {"model_type": "siglip2_vision_model", "num_patches": 16, "patch_size": 7},
    },
    "llama4": {
        "text_config": TEXT | EXPERTS | {"attention_chunk_size": 8, "intermediate_size_mlp": 64},
        "vision_config": BLOCK
        | SIDES
        | {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
    },
    "llava": {"text_config": TEXT | {"model_type": "llama"}, "vision_config": CLIP},
    "llava_next": {"text_config": TEXT | {"model_type": "mistral"}, "vision_config": CLIP},
    "llava_onevision": {"text_config": TEXT | {"model_type": "qwen2"}, "vision_config": SIGLIP},
    "mistral3": {
        "text_config": TEXT | {"model_type": "mistral"},
        "vision_config": BLOCK | SIDES | {"model_type": "pixtral", "head_dim": 16},
    },
    "mllama": {
        "text_config": PLAIN_TEXT
        | {"cross_attention_layers": [1], "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        "vision_config": BLOCK
        | SIDES
        | {"num_global_layers": 1, "attention_heads": 2, "intermediate_layers_indices": [0], "vision_output_dim": 64},
    },
    "paligemma": {
        "text_config": TEXT | {"model_type": "gemma"},
        "vision_config": SIGLIP | {"projection_dim": 64},
        "projection_dim": 64,
    },
    "qwen2_vl": {"text_config": TEXT | rotary([2, 3, 3]), "vision_config": QWEN | {"hidden_size": 64}},
    "qwen2_5_vl": {"text_config": TEXT | rotary([2, 3, 3]), "vision_config": QWEN},
    "qwen3_5": {
        "text_config": TEXT
        | DELTA
        | rotary([1, 1, 0], mrope_interleaved=True, partial_rotary_factor=0.25)
        | {"layer_types": ["linear_attention", "full_attention"]},
        "vision_config": QWEN,
    },
    "qwen3_vl": {"text_config": TEXT | rotary([2, 3, 3], mrope_interleaved=True), "vision_config": QWEN},
    "qwen3_vl_moe": {
        "text_config": TEXT | EXPERTS | rotary([2, 3, 3], mrope_interleaved=True),
        "vision_config": QWEN,
    },
    "smolvlm": {"text_config": TEXT | {"model_type": "llama"}, "vision_config": BLOCK | SIDES},
}
"""Model type → a small configuration of a multimodal model of transformers."""
YES, NO, SCALED = "yes", "refused", "scaled"
TOLERANCE = 1e-5


def saved(family: str, folder: Path, tied: bool) -> Any:
    """A tiny multimodal model with random weights, which is saved in a folder as transformers does it."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**MULTIMODAL[family], tie_word_embeddings=tied)
    whole = AutoModelForImageTextToText.from_config(config).eval()
    whole.save_pretrained(folder)
    return whole


def loaded(family: str, tied: bool) -> tuple[str, str]:
    """The text model of a checkpoint, and whether it gives the logits of the whole model on text."""
    with tempfile.TemporaryDirectory() as scratch:
        whole = saved(family, Path(scratch), tied)
        torch.manual_seed(1)
        try:
            decoder = HFDecoder(name=scratch, tokenizer="bytes").eval()
        except ValueError as error:
            if "no causal language model" in str(error):
                return "–", NO
            raise
        state = decoder.pretrained_state()
    assert state is not None
    decoder.load_state_dict(state)
    table, output = decoder.lm.get_input_embeddings().weight, decoder.lm.get_output_embeddings().weight
    assert (table is output) == (whole.get_input_embeddings().weight is whole.get_output_embeddings().weight)
    ids = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = decoder.logits(decoder(decoder.embed(ids), torch.arange(9).expand(2, 9)).hidden)
        expected = whole(input_ids=ids).logits
    for scale, cell in ((1.0, YES), (getattr(decoder.config, "logit_scale", 1.0), SCALED)):
        if float((found - scale * expected).abs().max()) <= TOLERANCE * max(1.0, float(found.abs().max())):
            return decoder.config.model_type, cell
    raise AssertionError(f"{family}: logits differ by {float((found - expected).abs().max()):.1e}")


def row(family: str) -> list[str]:
    """The cells of a checkpoint's family: its text model, and whether it loads with two word tables and with one."""
    (text, apart), (_, tied) = loaded(family, False), loaded(family, True)
    return [f"`{text}`" if text != "–" else text, apart, tied]
