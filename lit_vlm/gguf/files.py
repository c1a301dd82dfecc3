"""The two files of a model: its decoder with the tokenizer, and encoder with projector."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFWriter, RopeScalingType, get_tensor_name_map
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray
from torch import Tensor
from transformers import LlavaConfig, PreTrainedTokenizerFast

from lit_vlm.gguf.kinds import KINDS, packed, type_of
from lit_vlm.gguf.vocabulary import vocabulary_of, write_vocabulary

DECODERS = {"llama": MODEL_ARCH.LLAMA, "mistral": MODEL_ARCH.LLAMA, "qwen2": MODEL_ARCH.QWEN2}
"""transformers' name of a family → llama.cpp's."""
ENCODERS = ("clip_vision_model", "siglip_vision_model")
"""transformers' names of families."""
DECODER, TOWER = "model.language_model.", "model.vision_tower."
LAYERS = "model.multi_modal_projector."
PROJECTOR = {"linear_1": "mm.0", "linear_2": "mm.2"}
HEAD = "lm_head.weight"
WORDS = ("token_embd.weight", "output.weight")
_ROTATED = re.compile(r"\.self_attn\.([qk])_proj\.(weight|bias)$")


def check_held(config: LlavaConfig) -> None:
    """Refuse a model that the files cannot hold.

    Raises:
        ValueError: naming the part.
    """
    text, vision = config.text_config, config.vision_config
    if text.model_type not in DECODERS:
        raise ValueError(f"gguf holds decoders of {', '.join(DECODERS)}, not {text.model_type}")
    if vision.model_type not in ENCODERS:
        raise ValueError(f"gguf holds encoders of {', '.join(ENCODERS)}, not {vision.model_type}")
    kind = (text.rope_parameters or {}).get("rope_type", "default")
    if kind not in ("default", "linear", "llama3"):
        raise ValueError(f"gguf here holds rotary tables that are default, linear or llama3, not {kind}")
    if getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True):
        raise ValueError(f"gguf here holds no sliding window: the decoder's is {text.sliding_window}")
    if vision.hidden_act not in ("quick_gelu", "gelu", "gelu_pytorch_tanh"):
        raise ValueError(f"gguf holds encoders with gelu or quick_gelu, not {vision.hidden_act}")


def write_decoder(
    file: Path,
    config: LlavaConfig,
    state: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerFast,
    kind: str,
    bos: bool,
    ends: int | None,
) -> None:
    """Write the decoder and its tokenizer.

    Args:
        file: the new file.
        config: of transformers' LlavaForConditionalGeneration.
        state: its weights.
        tokenizer: of the decoder, with its chat template.
        kind: one of `KINDS`.
        bos: whether text begins with the token that begins it.
        ends: id of the token that ends a turn, where it is not the one that ends text.

    Raises:
        ValueError: for a tokenizer that llama.cpp has no equal of, or a type that cannot hold a weight.
        OSError: where the file cannot be written.
    """
    text = config.text_config
    arch = DECODERS[text.model_type]
    heads = text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    writer = GGUFWriter(file, MODEL_ARCH_NAMES[arch])
    writer.add_name(file.stem)
    writer.add_file_type(int(KINDS[kind][0]))
    writer.add_quantization_version(2)
    writer.add_context_length(text.max_position_embeddings)
    writer.add_embedding_length(text.hidden_size)
    writer.add_block_count(text.num_hidden_layers)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(text.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    writer.add_vocab_size(text.vocab_size)
    writer.add_rope_dimension_count(width)
    rope = text.rope_parameters or {}
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    write_vocabulary(writer, vocabulary_of(tokenizer, text.vocab_size), tokenizer, bos, ends)
    if rope.get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", _llama3(rope, width))
    names = get_tensor_name_map(arch, text.num_hidden_layers)
    tied = bool(config.tie_word_embeddings)
    for key, value in state.items():
        if not key.startswith((DECODER, "lm_head.")) or (tied and key == HEAD):
            continue
        own = key if key == HEAD else f"model.{key.removeprefix(DECODER)}"
        found = names.get_name(own, (".weight", ".bias"))
        if found is None:
            raise ValueError(f"gguf has no name for the decoder's {own}")
        rotated = _ROTATED.search(own)
        if rotated and arch == MODEL_ARCH.LLAMA:
            value = _interleaved(value, heads if rotated[1] == "q" else text.num_key_value_heads)
        if found in WORDS:
            value = value[: text.vocab_size]
        _add(writer, found, value, kind, text.num_hidden_layers, tied)
    _close(writer)


def write_encoder(
    file: Path, config: LlavaConfig, state: Mapping[str, Tensor], mean: list[float], std: list[float], kind: str
) -> None:
    """Write encoder and projector.

    Args:
        file: the new file.
        config: of transformers' LlavaForConditionalGeneration.
        state: its weights.
        mean: of the pixels of the three colours, as the encoder takes them.
        std: their standard deviation.
        kind: `f32` or `f16`.

    Raises:
        ValueError: for a value beyond the range of f16.
        OSError: where the file cannot be written.
    """
    vision = config.vision_config
    writer = GGUFWriter(file, MODEL_ARCH_NAMES[MODEL_ARCH.MMPROJ])
    writer.add_name(file.stem)
    writer.add_file_type(int(KINDS[kind][0]))
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_bool("clip.has_text_encoder", False)
    writer.add_bool("clip.has_llava_projector", True)
    writer.add_clip_projector_type("mlp")
    writer.add_vision_image_size(vision.image_size)
    writer.add_vision_patch_size(vision.patch_size)
    writer.add_vision_embedding_length(vision.hidden_size)
    writer.add_vision_feed_forward_length(vision.intermediate_size)
    writer.add_vision_projection_dim(config.text_config.hidden_size)
    blocks = vision.num_hidden_layers + 1 + config.vision_feature_layer
    writer.add_vision_block_count(blocks)
    writer.add_array("clip.vision.feature_layer", [blocks])  # left out, llama.cpp does not run the last block
    writer.add_vision_head_count(vision.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(vision.layer_norm_eps)
    writer.add_vision_image_mean(mean)
    writer.add_vision_image_std(std)
    writer.add_vision_use_gelu(vision.hidden_act != "quick_gelu")
    names = get_tensor_name_map(MODEL_ARCH.MMPROJ, blocks)
    if config.projector_hidden_act == "linear":
        state = {**state, **_single_layer(state)}
    for key, value in state.items():
        found = _encoder_name(key, names, blocks)
        if found is not None:
            whole = found.startswith(("v.patch_embd", "v.position_embd", "v.class_embd"))  # llama.cpp reads these so
            _add(writer, found, value.flatten() if "class_embd" in found else value, "f32" if whole else kind)
    _close(writer)


def _single_layer(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A projector of one layer as two with gelu in between, which the file has in any case: gelu(x) − gelu(−x) is x."""
    first = f"{LAYERS}linear_1."
    weight, bias = state[f"{first}weight"], state[f"{first}bias"]
    same = torch.eye(len(weight))
    return {
        f"{first}weight": torch.cat([weight, -weight]),
        f"{first}bias": torch.cat([bias, -bias]),
        f"{LAYERS}linear_2.weight": torch.cat([same, -same], dim=1),
    }


def _encoder_name(key: str, names: Any, blocks: int) -> str | None:
    """The name of a weight of encoder or projector; None for one that is not used."""
    if key.startswith(LAYERS):
        layer, _, kind = key.removeprefix(LAYERS).rpartition(".")
        return f"{PROJECTOR[layer]}.{kind}"
    if not key.startswith(TOWER) or "post_layernorm" in key or ".head." in key or "position_ids" in key:
        return None
    own = key.removeprefix(TOWER)
    own = own if own.startswith("vision_model.") else f"vision_model.{own}"
    block = re.search(r"\.layers\.(\d+)\.", own)
    if block and int(block[1]) >= blocks:
        return None
    found = names.get_name(f"vision_tower.{own}", (".weight", ".bias")) or names.get_name(f"vision_tower.{own}")
    if found is None:
        raise ValueError(f"gguf has no name for the encoder's {own}")
    return str(found)


def _add(writer: GGUFWriter, name: str, value: Tensor, kind: str, layers: int = 0, tied: bool = False) -> None:
    array: NDArray[np.float32] = value.detach().to(torch.float32).cpu().numpy()
    if array.ndim == 1:
        writer.add_tensor(name, np.ascontiguousarray(array))
        return
    wanted = Type.F32 if array.ndim > 2 else type_of(name, array.shape[-1], kind, layers, tied)
    try:
        writer.add_tensor(name, np.ascontiguousarray(packed(array, wanted)), raw_dtype=wanted)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _close(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _interleaved(value: Tensor, heads: int) -> Tensor:
    """Rows of a projection in llama.cpp's order: it turns neighbours, transformers the halves of a head."""
    shape = value.shape
    return value.view(heads, 2, shape[0] // heads // 2, *shape[1:]).transpose(1, 2).reshape(shape)


def _llama3(rope: Mapping[str, Any], width: int) -> NDArray[np.float32]:
    """What each frequency is divided by, of Llama 3's scaling."""
    base, factor = float(rope["rope_theta"]), float(rope["factor"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    before = float(rope["original_max_position_embeddings"])
    found = []
    for index in range(0, width, 2):
        length = 2 * math.pi * base ** (index / width)
        if length < before / high:
            found.append(1.0)
        elif length > before / low:
            found.append(factor)
        else:
            smooth = (before / length - low) / (high - low)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, np.float32)
