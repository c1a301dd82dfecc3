"""EVE and EVEv2: published names in and out."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lit_vlm.checkpoints import load_published, read_slots
from lit_vlm.checkpoints.published import FAMILIES, eve
from lit_vlm.decoders import DivideAndConquer, HFDecoder
from lit_vlm.encoders import EvePatchEmbedding, EveV2PatchEmbedding
from lit_vlm.heads import PatchAlignment
from lit_vlm.model.build import build
from lit_vlm.model.vlm import VLM
from lit_vlm.projectors import Identity
from lit_vlm.teachers import HFVision
from tests.tiny import CLIP, LLAMA, ROOT, tiny_slots, tiny_vlm

HEAD = partial(PatchAlignment, teacher=partial(HFVision, None, CLIP), every=1, num_heads=4)
V1 = {
    "encoder": partial(EvePatchEmbedding, width=32, patch=4),
    "heads": {"align": HEAD},
}
V2 = {
    "encoder": partial(EveV2PatchEmbedding, width=64, hidden=16, patch=4),
    "projector": Identity,
    "decoder": partial(DivideAndConquer, config=LLAMA | {"model_type": "qwen2"}, tokenizer="bytes"),
}


def model_of(parts: dict[str, Any]) -> VLM:
    """A tiny model in which no two weights of the same shape are alike."""
    model = tiny_vlm(**parts)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


def published_keys() -> dict[str, tuple[int, ...]]:
    """Keys of the published EVE at tiny sizes, written down from the table of its checkpoint."""
    d, c, t, ffn, kv, vocab = 64, 32, 32, 128, 32, 300
    keys: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, d), "lm_head.weight": (vocab, d)}
    for i in range(3):
        at = f"model.layers.{i}."
        keys |= {
            f"{at}self_attn.q_proj.weight": (d, d), f"{at}self_attn.k_proj.weight": (kv, d),
            f"{at}self_attn.v_proj.weight": (kv, d), f"{at}self_attn.o_proj.weight": (d, d),
            f"{at}mlp.gate_proj.weight": (ffn, d), f"{at}mlp.up_proj.weight": (ffn, d),
            f"{at}mlp.down_proj.weight": (d, ffn), f"{at}input_layernorm.weight": (d,),
            f"{at}post_attention_layernorm.weight": (d,), f"{at}self_attn.rotary_emb.inv_freq": (8,),
        }  # fmt: skip
    tower = "model.vision_tower."
    keys |= {"model.norm.weight": (d,), f"{tower}patch_embedding.weight": (c, 3, 4, 4)}
    keys |= {f"{tower}class_embedding": (c,), f"{tower}split_embedding": (c,)}
    for name in ("local_attention", "global_attention"):
        keys |= {f"{tower}{name}.{part}.0.{kind}": (c,) for part in ("q", "kv") for kind in ("weight", "bias")}
        keys |= {f"{tower}{name}.q.1.weight": (c, c), f"{tower}{name}.kv.1.weight": (2 * c, c)}
        keys |= {f"{tower}{name}.proj.weight": (c, c), f"{tower}{name}.proj.bias": (c,)}
    keys |= {"model.mm_projector.0.weight": (d, c), "model.mm_projector.0.bias": (d,)}
    keys |= {"model.mm_projector.2.weight": (d, d), "model.mm_projector.2.bias": (d,)}
    pal = "model.vision_tower_compressor."
    for j in range(4):
        keys |= {f"{pal}norm_layer.{j}.0.weight": (d,), f"{pal}norm_layer.{j}.0.bias": (d,)}
        keys |= {f"{pal}norm_layer.{j}.1.weight": (t, d)}
    keys |= {f"{pal}input_layer.weight": (t, d), f"{pal}input_layer.bias": (t,)}
    keys |= {f"{pal}output_layer.weight": (t, t), f"{pal}output_layer.bias": (t,)}
    clip = "backbone.vision_model.embeddings.class_embedding"
    return keys | {f"model.vision_clip.{clip}": (t,), f"{pal}clip_layer.{clip}": (t,)}


CONFIG = LLAMA | {
    "model_type": "eve",
    "vocab_size": 300,
    "mm_hidden_size": 32,
    "architectures": ["EVELlamaForCausalLM"],
}


def random_state(keys: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {key: torch.randn(shape, generator=generator) for key, shape in keys.items()}


def test_every_published_key_arrives_or_is_dropped_for_a_reason() -> None:
    state = random_state(published_keys())
    model = load_published("eve", state, CONFIG)
    found = {p.data_ptr(): name for name, p in model.named_parameters()}
    assert len(found) == len(list(model.parameters()))
    kept = {key for key in state if not any(part in key for part in eve.NAMES.dropped) and "compressor" not in key}
    assert len(kept) == len(found)
    own = model.state_dict()
    assert torch.equal(
        own["encoder.local_attention.kv.1.weight"], state["model.vision_tower.local_attention.kv.1.weight"]
    )
    assert torch.equal(own["projector.layers.2.bias"], state["model.mm_projector.2.bias"])
    assert torch.equal(own["decoder.lm.model.layers.2.mlp.up_proj.weight"], state["model.layers.2.mlp.up_proj.weight"])


def test_a_stage_starts_from_published_weights_with_pal(tmp_path: Path) -> None:
    state = random_state(published_keys())
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    decoder = partial(HFDecoder, config=LLAMA | {"vocab_size": 300}, tokenizer="bytes")
    model = build(tiny_slots(**V1, decoder=decoder), read_slots(f"eve:{tmp_path}"))
    own = model.state_dict()
    compressor = {k.removeprefix("model.vision_tower_compressor."): v for k, v in state.items() if "compressor" in k}
    del compressor["clip_layer.backbone.vision_model.embeddings.class_embedding"]
    assert compressor.keys() == model.heads["align"].state_dict().keys()
    assert all(torch.equal(own[f"heads.align.{key}"], value) for key, value in compressor.items())
    assert torch.equal(own["encoder.split_embedding"], state["model.vision_tower.split_embedding"])


def test_keys_that_fit_nowhere_or_are_missing_are_named() -> None:
    state = random_state(published_keys())
    with pytest.raises(ValueError, match="'model_ema.x' is no key of the family eve"):
        load_published("eve", state | {"model_ema.x": torch.zeros(1)}, CONFIG)
    with pytest.raises(ValueError, match=r"slot 'encoder' \(EvePatchEmbedding\): not of this part: norm.weight"):
        load_published("eve", state | {"model.vision_tower.norm.weight": torch.zeros(1)}, CONFIG)
    del state["model.mm_projector.2.bias"]
    with pytest.raises(ValueError, match=r"slot 'projector' \(MLP\): missing: layers.2.bias"):
        load_published("eve", state, CONFIG)
    with pytest.raises(ValueError, match="family: there is no 'adam'; there are eve, eve_v2, fuyu, hovle, "):
        build(tiny_slots(), read_slots("adam:somewhere"))


@pytest.mark.parametrize("family", ["eve", "eve_v2"])
def test_what_was_trained_comes_back_from_the_exported_folder(family: str, tmp_path: Path) -> None:
    parts, module = {"eve": V1, "eve_v2": V2}[family], FAMILIES[family]
    model = model_of(parts)
    assert module.export(model, tmp_path / "out") <= 1e-5
    written = eve_keys(tmp_path / "out")
    if family == "eve":
        expected = {k for k in published_keys() if not any(part in k for part in eve.NAMES.dropped)}
        assert written == expected
    else:
        layer = "model.layers.1.self_attn."
        assert {f"{layer}q_proj.bias", f"{layer}moe_q_proj.bias", "model.layers.0.moe_mlp.up_proj.weight"} <= written
        assert {"model.layers.2.moe_input_layernorm.weight", "model.vision_tower.patch_embedding.2.bias"} <= written
        assert not any("text" in key or ".vision." in key for key in written)
        assert len(written) == len(model.state_dict())
    again = build(tiny_slots(**parts), read_slots(f"{family}:{tmp_path / 'out'}"))
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    with pytest.raises(ValueError, match="is not empty"):
        module.export(model, tmp_path / "out")


@pytest.mark.parametrize("part", ["local_attention", "global_attention"])
def test_an_eve_without_one_of_its_attentions_says_so(part: str, tmp_path: Path) -> None:
    state = random_state(published_keys())
    begins = (f"model.vision_tower.{part}.", "model.vision_tower.class_embedding")
    lost = {key: value for key, value in state.items() if not key.startswith(begins[: 1 + (part[0] == "g")])}
    with pytest.raises(ValueError, match=rf"missing: .*\(model.vision_tower.{part}.q.0.weight\)"):
        load_published("eve", lost, CONFIG)
    del state["model.vision_tower.class_embedding"]
    with pytest.raises(ValueError, match=r"missing: class_embedding \(model.vision_tower.class_embedding\)"):
        load_published("eve", state, CONFIG)
    model = model_of(V1 | {"encoder": partial(V1["encoder"], **{part: False}), "heads": {}})
    assert FAMILIES["eve"].export(model, tmp_path / "out") <= 1e-5


def eve_keys(folder: Path) -> set[str]:
    from lit_vlm.core.safetensors import read_folder

    return set(read_folder(str(folder)))


def test_a_model_of_another_form_is_not_written(tmp_path: Path) -> None:
    for module in (FAMILIES["eve"], FAMILIES["eve_v2"]):
        with pytest.raises(ValueError, match=r"eve.* is Eve.*this model is \['HFEncoder'"):
            module.export(tiny_vlm(), tmp_path / "out")


def test_the_table_of_keys_counts_what_the_fixture_of_the_layer_has() -> None:
    layer = torch.load(ROOT / "tests" / "fixtures" / "eve.pt", weights_only=True)["vision_tower"]
    keys = {k.removeprefix("model.vision_tower.") for k in published_keys() if k.startswith("model.vision_tower.")}
    assert keys == layer.keys()
