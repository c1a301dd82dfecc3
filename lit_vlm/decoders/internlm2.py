"""InternLM2 as a Llama: the blocks differ in names only, and in one fused matrix for query, key and value."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

FUSED = "attention.wqkv.weight"
LAYER = {
    "attention.wq.": "self_attn.q_proj.",
    "attention.wk.": "self_attn.k_proj.",
    "attention.wv.": "self_attn.v_proj.",
    "attention.wo.": "self_attn.o_proj.",
    "feed_forward.w1.": "mlp.gate_proj.",
    "feed_forward.w3.": "mlp.up_proj.",
    "feed_forward.w2.": "mlp.down_proj.",
    "attention_norm.": "input_layernorm.",
    "ffn_norm.": "post_attention_layernorm.",
}
TOP = {"output.": "lm_head.", "model.tok_embeddings.": "model.embed_tokens."}
KEPT = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "tie_word_embeddings",
)


def as_llama(config: Mapping[str, Any]) -> dict[str, Any]:
    """Turn a configuration of InternLM2 into one of Llama."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.get("rope_theta", 10000.0)}
    if scaling := config.get("rope_scaling"):
        rope |= {"rope_type": scaling["type"], "factor": scaling["factor"]}
    chosen = {key: config[key] for key in KEPT if key in config}
    return {"model_type": "llama", "tie_word_embeddings": False} | chosen | {"rope_parameters": rope}


def from_llama_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A Llama's configuration with the rotary settings as InternLM2 writes them: the inverse of `as_llama`."""
    left_out = ("architectures", "model_type", "rope_parameters", "dtype", "transformers_version")
    plain: dict[str, Any] = {key: value for key, value in config.items() if key not in left_out}
    rope = config["rope_parameters"]
    scaled = rope["rope_type"] != "default"
    plain["rope_theta"] = rope["rope_theta"]
    plain["rope_scaling"] = {"type": rope["rope_type"], "factor": rope["factor"]} if scaled else None
    return json.loads(json.dumps(plain, default=str))


def to_llama(name: str) -> str:
    """Llama's name for a key of InternLM2's blocks, such as `0.attention.wq.weight`."""
    return _renamed(name, LAYER)


def from_llama(name: str) -> str:
    """InternLM2's name for a key of Llama's blocks: the inverse of `to_llama`."""
    return _renamed(name, {own: theirs for theirs, own in LAYER.items()})


def _renamed(name: str, names: Mapping[str, str]) -> str:
    for old, new in names.items():
        name = re.sub(rf"(^|\.)(\d+\.){re.escape(old)}", rf"\g<1>\g<2>{new}", name)
    return name


def state_as_llama(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Rename and split all weights of a published InternLM2 for `LlamaForCausalLM`.

    Args:
        state: weights by their published names.
        config: its published configuration, for the numbers of heads.

    Raises:
        ValueError: as `split_qkv`.
    """
    renamed = {}
    for key, value in split_qkv(state, config).items():
        for theirs, own in TOP.items():
            key = own + key.removeprefix(theirs) if key.startswith(theirs) else key
        renamed[to_llama(key)] = value
    return renamed


def split_qkv(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Split each fused matrix `wqkv` into `wq`, `wk` and `wv`; other weights stay as they are.

    Its rows stand group by group, the queries of a group before its key and its value.

    Args:
        state: weights by InternLM2's names.
        config: its configuration, for the numbers of heads.

    Raises:
        ValueError: for a fused matrix whose rows do not divide into such groups.
    """
    groups, queries = _groups(config)
    parts = groups * (queries + 2)
    split: dict[str, Tensor] = {}
    for key, value in state.items():
        if not key.endswith(FUSED):
            split[key] = value
            continue
        if value.ndim != 2 or value.shape[0] % parts:
            raise ValueError(
                f"'{key}' is {tuple(value.shape)}: num_attention_heads {groups * queries} and num_key_value_heads "
                f"{groups} of config.json ask for two dimensions, the first a multiple of {parts}"
            )
        rows = value.unflatten(0, (groups, queries + 2, -1))
        at = key.removesuffix("wqkv.weight")
        split[f"{at}wq.weight"] = rows[:, :queries].flatten(0, 2)
        split[f"{at}wk.weight"] = rows[:, queries].flatten(0, 1)
        split[f"{at}wv.weight"] = rows[:, queries + 1].flatten(0, 1)
    return split


def fuse_qkv(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Join `wq`, `wk` and `wv` to the fused matrix `wqkv`: the inverse of `split_qkv`."""
    groups, queries = _groups(config)
    fused = {key: value for key, value in state.items() if not re.search(r"attention\.w[qkv]\.weight$", key)}
    for key in state:
        if key.endswith("attention.wq.weight"):
            at = key.removesuffix("wq.weight")
            q = state[key].unflatten(0, (groups, queries, -1))
            k, v = (state[f"{at}{name}.weight"].unflatten(0, (groups, 1, -1)) for name in ("wk", "wv"))
            fused[f"{at}wqkv.weight"] = torch.cat([q, k, v], dim=1).flatten(0, 2).contiguous()
    return fused


def _groups(config: Mapping[str, Any]) -> tuple[int, int]:
    """Number of key-value heads, and of query heads for each of them."""
    heads, groups = int(config["num_attention_heads"]), int(config["num_key_value_heads"])
    return groups, heads // groups
