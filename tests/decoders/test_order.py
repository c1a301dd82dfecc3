"""Samples of a packed row stay apart in every family of decoders, or the family is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lit_vlm.decoders import HFDecoder, check_cache, check_order
from lit_vlm.decoders.hf import RECURRENT

CPU = torch.device("cpu")
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 99,
    "pad_token_id": 0,
}
PLAIN = {key: value for key, value in SIZES.items() if key != "head_dim"}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2}
DELTA = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 16}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
LATENT |= {"num_key_value_heads": 4, "head_dim": 8, "n_group": 1, "topk_group": 1}
TURNS = {"layer_types": ["linear_attention", "full_attention"] * 2}
CONV = {"layer_types": ["conv", "full_attention"] * 2}
WINDOW = {"sliding_window": 8}
STATES = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 99, "pad_token_id": 0}
EAGER = ("falcon_mamba", "mamba", "mamba2", "rwkv", "xlstm")

CARRYING: dict[str, dict[str, Any]] = {
    "bailing_hybrid": SIZES | EXPERTS | LATENT | TURNS,
    "bamba": SIZES | MAMBA2 | {"attn_layer_indices": [1, 3]},
    "falcon_h1": SIZES | MAMBA2 | {"mamba_d_ssm": 128},
    "falcon_mamba": STATES | {"state_size": 8},
    "granitemoehybrid": SIZES | MAMBA2 | EXPERTS | {"layer_types": ["mamba", "attention"] * 2},
    "inkling_text": SIZES | EXPERTS,
    "jamba": SIZES | EXPERTS | {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "kimi_linear": SIZES | EXPERTS | LATENT | TURNS | {"linear_head_dim": 16, "linear_num_heads": 4},
    "lfm2": SIZES | CONV,
    "lfm2_moe": SIZES | EXPERTS | CONV,
    "lfm3": SIZES | CONV,
    "mamba": STATES | {"state_size": 8},
    "mamba2": STATES | {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "minimax": SIZES | EXPERTS | TURNS,
    "nemotron_h": SIZES | EXPERTS,
    "olmo_hybrid": SIZES | DELTA | TURNS,
    "qwen3_5_moe_text": SIZES | EXPERTS | DELTA | TURNS,
    "qwen3_5_text": SIZES | DELTA | TURNS,
    "qwen3_next": SIZES | EXPERTS | DELTA | TURNS | {"shared_expert_intermediate_size": 32},
    "recurrent_gemma": PLAIN | {"lru_width": 64},
    "rwkv": STATES,
    "xlstm": STATES | {"num_heads": 4},
    "zamba": PLAIN
    | {"num_hidden_layers": 8, "attn_layer_period": 4, "attn_layer_offset": 2, "use_mamba_kernels": False},
    "zamba2": PLAIN
    | {"layers_block_type": ["mamba", "hybrid"] * 2, "n_mamba_heads": 8, "mamba_d_state": 16, "adapter_rank": 8}
    | {"use_mamba_kernels": False, "num_key_value_heads": 4},
    "zaya": SIZES,
}
"""Recurrent or convolutional layers: kept apart by a kernel that takes the borders, or refused."""
UNTRIED = {"qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text"}
"""Wrappers: the text decoder that is taken out of them."""
LARGE = {
    "deepseek_v4": "compressed attention that keeps a state, without an sdpa or small form",
    "qwen4_exp": "word tables of 20 million n-grams",
    "qwen4_exp_text": "word tables of 20 million n-grams",
}
"""Not built here; they are refused, or not, by the same check when they are trained."""
DRAFTS = ("gemma4_assistant", "gemma4_unified_assistant")
"""Draft models, which have no configuration of their own."""

ATTENDING: dict[str, dict[str, Any]] = {
    "apertus": SIZES,
    "cohere2": SIZES | WINDOW,
    "deepseek_v3": SIZES | EXPERTS | LATENT | {"n_routed_experts": 4, "first_k_dense_replace": 1},
    "ernie4_5_moe": SIZES | {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32},
    "exaone4": SIZES | WINDOW,
    "gemma2": SIZES | WINDOW,
    "gemma3_text": SIZES | WINDOW,
    "glm4": SIZES,
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 99},
    "gpt_neox": PLAIN,
    "granite": SIZES,
    "llama": SIZES,
    "llama4_text": SIZES | EXPERTS | {"attention_chunk_size": 8},
    "minimax_m2": SIZES | EXPERTS,
    "mistral": SIZES | WINDOW,
    "mixtral": SIZES | EXPERTS,
    "olmo3": SIZES | WINDOW,
    "olmoe": SIZES | EXPERTS,
    "persimmon": PLAIN,
    "phi3": SIZES | WINDOW,
    "qwen2": SIZES,
    "qwen2_moe": SIZES | EXPERTS | {"shared_expert_intermediate_size": 32},
    "qwen3": SIZES,
    "qwen3_moe": SIZES | EXPERTS,
    "smollm3": SIZES,
    "starcoder2": SIZES | WINDOW,
}
"""Softmax attention alone, over all, a window or a chunk, dense and with experts."""
DEAF: dict[str, dict[str, Any]] = {
    "afmoe": SIZES | EXPERTS,
    "biogpt": PLAIN,
    "gpt_oss": SIZES | EXPERTS | WINDOW,
    "opt": PLAIN | {"ffn_dim": 64, "word_embed_proj_dim": 64},
}
"""Softmax attention whose mask or positions do not follow restarting position ids, in some versions of transformers."""


def built(family: str, config: dict[str, Any]) -> HFDecoder:
    attention: Any = "eager" if family in (*EAGER, "gemma2", "gpt_oss") else "sdpa"
    torch.manual_seed(0)
    return HFDecoder(config={"model_type": family} | config, attention=attention).eval()


def refusal(check: Callable[[], None]) -> str | None:
    """What a check says against a decoder."""
    try:
        check()
    except ValueError as error:
        return str(error)
    return None


def packed_row(decoder: HFDecoder) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """States of the second sample of a packed row, the same behind another first sample, and on its own."""
    embeds = torch.randn(1, 24, decoder.width)
    other = torch.cat([torch.randn(1, 13, decoder.width), embeds[:, 13:]], dim=1)
    positions = torch.cat([torch.arange(13), torch.arange(11)])[None]
    with torch.no_grad():
        first, second = (decoder(inputs, positions).hidden[:, 13:] for inputs in (embeds, other))
        alone = decoder(embeds[:, 13:], torch.arange(11)[None]).hidden
    return first, second, alone


@pytest.mark.parametrize("family", sorted(ATTENDING))
def test_attention_keeps_packed_samples_apart(family: str) -> None:
    decoder = built(family, ATTENDING[family])
    check_order(decoder, packed=True, device=CPU)
    check_cache(decoder, CPU)
    assert decoder.carried() is None
    first, second, alone = packed_row(decoder)
    # Rows of experts are multiplied in groups, whose sizes the other sample changes: a rounding, no leak.
    bound = 1e-6 if EXPERTS.keys() & ATTENDING[family].keys() else 0.0
    assert float((first - second).abs().max()) <= bound * float(first.abs().max())
    torch.testing.assert_close(first, alone, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("family", sorted(CARRYING | DEAF))
def test_other_families_keep_packed_samples_apart_or_are_refused(family: str) -> None:
    decoder = built(family, (CARRYING | DEAF)[family])
    assert (decoder.carried() is not None) == (family in CARRYING)
    check_order(decoder, packed=False, device=CPU)
    refused = refusal(lambda: check_order(decoder, packed=True, device=CPU))
    if refused is None:
        first, second, _ = packed_row(decoder)
        assert torch.equal(first, second)
    else:
        assert family in refused
        assert "data.batching" in refused


def test_no_family_that_carries_a_state_is_forgotten() -> None:
    known = {*CARRYING, *UNTRIED, *LARGE}
    for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        config = CONFIG_MAPPING[family]
        layers = set() if family in DRAFTS else set(getattr(config(), "layer_types", None) or ())
        if MODEL_FOR_CAUSAL_LM_MAPPING[config]._is_stateful or layers & set(RECURRENT):
            assert family in known, f"{family} carries a state along the row: add a small configuration"


# Which of them go on from a cache is a matter of transformers' version; what counts is that none does so wrongly.
@pytest.mark.parametrize("family", sorted(CARRYING))
def test_what_carries_a_state_goes_on_from_a_cache_or_is_refused(family: str) -> None:
    decoder = built(family, CARRYING[family])
    refused = refusal(lambda: check_cache(decoder, CPU))
    if refused is not None:
        assert f"{family}) cannot be asked" in refused
        return
    embeds = torch.randn(2, 9, decoder.width)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        cache = decoder.new_cache()
        decoder(embeds[:, :7], positions[:, :7], cache=cache, attention_mask=mask[:, :7])
        swapped = decoder.select_cache(cache, torch.tensor([1, 0, 0]))
        rows = torch.tensor([1, 0, 0])
        found = decoder(embeds[rows, 7:], positions[rows, 7:], cache=swapped, attention_mask=mask[rows]).hidden
        short = decoder(embeds[:1, 3:], torch.arange(6)[None]).hidden[:, 4:]
        long = decoder(embeds[1:], torch.arange(9)[None]).hidden[:, 7:]
    torch.testing.assert_close(found, torch.cat([long, short, short]), atol=1e-4, rtol=1e-3)


def test_a_leak_that_nothing_announces_is_found() -> None:
    # A shift by one position, as a token-shift layer makes it, in the middle of an ordinary block.
    decoder = built("llama", SIZES)
    inner = decoder.base.layers[1].mlp.forward
    decoder.base.layers[1].mlp.forward = lambda states: (
        inner(states) + 1e-4 * torch.nn.functional.pad(states[:, :-1], (0, 0, 1, 0))
    )
    assert decoder.carried() is None
    check_order(decoder, packed=False, device=CPU)
    with pytest.raises(ValueError, match="keep the samples of a packed row apart"):
        check_order(decoder, packed=True, device=CPU)


def test_a_model_that_looks_ahead_is_refused() -> None:
    config = {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    decoder = HFDecoder(config=config | {"vocab_size": 99, "intermediate_size": 64}).eval()
    with pytest.raises(ValueError, match="bert.* is no causal decoder as configured.*is_decoder"):
        check_order(decoder, packed=False, device=CPU)
