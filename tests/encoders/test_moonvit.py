"""MoonViT against the tower of transformers, and its files in each form that they are published in."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, Kimi_K25Config, Kimi_K25ForConditionalGeneration

from lit_vlm.core.batch import Grid, Images
from lit_vlm.core.part import load_state
from lit_vlm.encoders import MoonViT
from lit_vlm.testing import check_encoder
from tests.encoders.test_qwen import pictures

CONFIG: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "patch_size": 4,
    "pos_emb_height": 5,
    "pos_emb_width": 5,
}
TEXT = {"model_type": "deepseek_v3", "hidden_size": 16, "intermediate_size": 32, "moe_intermediate_size": 8,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 40,
        "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4,
        "first_k_dense_replace": 1, "n_routed_experts": 2, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 1,
        "pad_token_id": 0}  # fmt: skip
SIZES = [(16, 16), (8, 40), (8, 8), (24, 16), (8, 40)]


def noisy(model: Any) -> Any:
    """The model with weights that let no norm or bias be left out unseen."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def saved(folder: Path) -> Any:
    """A tower that transformers saved."""
    tower = noisy(AutoModel.from_config(MoonViT(config=CONFIG).config))
    tower.final_layernorm = torch.nn.LayerNorm(32)
    tower.save_pretrained(folder)
    return tower


def published(folder: Path) -> Any:
    """The tower of a whole model in the files that transformers writes of it, which have the published names."""
    config = Kimi_K25Config(vision_config=CONFIG, text_config=TEXT, projection_hidden_size=32)
    model = noisy(Kimi_K25ForConditionalGeneration(config))
    model.save_pretrained(folder)
    return model.model.vision_tower


def loaded(folder: Path, **settings: Any) -> MoonViT:
    encoder = MoonViT(str(folder), **settings).eval()
    load_state(encoder, encoder.pretrained_state() or {}, "encoder")
    return encoder


def expected_states(tower: Any, encoder: MoonViT, picture: Tensor, layers: list[int]) -> Tensor:
    """Hidden states of transformers of one picture: before the first block, and behind each."""
    rows, cols = (side // 4 for side in picture.shape[1:])
    pixels = encoder.normalise(picture[None], torch.float32)[0]
    patches = pixels.reshape(3, rows, 4, cols, 4).permute(1, 3, 0, 2, 4).flatten(0, 1)
    found: list[Tensor] = []
    hooks = [tower.layers[0].register_forward_pre_hook(lambda _module, args: found.append(args[0]))]
    hooks += [block.register_forward_hook(lambda _module, _args, out: found.append(out)) for block in tower.layers]
    with torch.no_grad():
        tower(patches, torch.tensor([(1, rows, cols)]))
    for hook in hooks:
        hook.remove()
    return torch.cat([found[layer] for layer in layers], -1)


@pytest.mark.parametrize("layer", [-1, -2, 0, [1, -1]])
def test_features_are_those_of_transformers(layer: int | list[int], tmp_path: Path) -> None:
    tower = published(tmp_path)
    encoder = loaded(tmp_path, layer=layer)
    shown = pictures(SIZES)
    with torch.no_grad():
        result = encoder(Images.pack(shown))
    assert result.grids == tuple(Grid(height // 4, width // 4) for height, width in SIZES)
    assert encoder.width == result.features.shape[1]
    parts = result.features.split([grid.num_tokens for grid in result.grids])
    for picture, found in zip(shown, parts, strict=True):
        # On its own, so that nothing of other pictures can have come in.
        expected = expected_states(tower, encoder, picture, layer if isinstance(layer, list) else [layer])
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_it_keeps_the_contract() -> None:
    check_encoder(partial(MoonViT, config=CONFIG), SIZES)


def interleaved(weight: Tensor) -> Tensor:
    """Queries or keys of two heads of 16 as published: the rotary pairs of a head are neighbours."""
    order = torch.arange(32).view(2, 2, 8).transpose(1, 2).flatten()
    return weight[order]


def test_the_files_of_a_whole_model_have_the_published_names(tmp_path: Path) -> None:
    tower = published(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    wqkv = state["vision_tower.encoder.blocks.1.wqkv.weight"]
    attention = tower.layers[1].attn
    parts = [interleaved(attention.q_proj.weight), interleaved(attention.k_proj.weight), attention.v_proj.weight]
    torch.testing.assert_close(wqkv, torch.cat(parts), rtol=0, atol=0)


@pytest.mark.parametrize("config", [
    {"model_type": "moonvit", "merge_kernel_size": [2, 2]},
    {"model_type": "kimi_vl", "vision_config": {"model_type": "moonvit"}},
    {"model_type": "kimi_k25", "vision_config": {f"vt_{key}": CONFIG[key] for key in list(CONFIG)[:4]}},
])  # fmt: skip
@pytest.mark.parametrize("prefix", ["vision_tower.", ""])
def test_towers_of_other_models_and_alone_are_read(config: dict[str, Any], prefix: str, tmp_path: Path) -> None:
    tower = published(tmp_path)
    file = tmp_path / "model.safetensors"
    state = {key.removeprefix("vision_tower."): value for key, value in load_file(file).items() if "vision" in key}
    save_file({prefix + key: value for key, value in state.items()}, file, metadata={"format": "pt"})
    sizes = {key: value for key, value in CONFIG.items() if not key.startswith("pos_emb")}
    inner = config.get("vision_config", config)
    inner = (sizes if "vt_hidden_size" not in inner else {"patch_size": 4}) | inner
    inner |= {"init_pos_emb_height": 5, "init_pos_emb_width": 5}
    written = {**config, "vision_config": inner} if "vision_config" in config else inner
    (tmp_path / "config.json").write_text(json.dumps(written))
    encoder = loaded(tmp_path)
    for name, value in encoder.backbone.state_dict().items():
        torch.testing.assert_close(value, tower.state_dict()[name], rtol=0, atol=0)


def test_blocks_behind_the_last_that_is_read_are_not_built(tmp_path: Path) -> None:
    saved(tmp_path)
    encoder = loaded(tmp_path, layer=-2)
    assert len(encoder.blocks()) == 2
    assert not any("final_layernorm" in name for name in encoder.state_dict())
    alone = MoonViT(**encoder.standalone({"name": str(tmp_path), "layer": -2})).eval()
    alone.load_state_dict(encoder.state_dict())
    shown = Images.pack(pictures(SIZES[:2]))
    torch.testing.assert_close(alone(shown).features, encoder(shown).features)


def test_weights_that_are_not_there_are_an_error(tmp_path: Path) -> None:
    published(tmp_path)
    file = tmp_path / "model.safetensors"
    state = {key: value for key, value in load_file(file).items() if not key.endswith("blocks.1.wqkv.bias")}
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"has no weights for layers.1.attn.q_proj.bias \(missing\), .* of MoonViT"):
        MoonViT(str(tmp_path)).pretrained_state()
    MoonViT(str(tmp_path), layer=1).pretrained_state()


def test_of_a_sharded_model_only_the_shards_with_the_tower_are_opened(tmp_path: Path) -> None:
    published(tmp_path)
    file = tmp_path / "model.safetensors"
    names = {
        key: "tower.safetensors" if key.startswith("vision_tower.") else "rest.safetensors" for key in load_file(file)
    }
    tower = {key: value for key, value in load_file(file).items() if key.startswith("vision_tower.")}
    save_file(tower, tmp_path / "tower.safetensors", metadata={"format": "pt"})
    (tmp_path / "rest.safetensors").write_bytes(b"opening this is an error")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert len(loaded(tmp_path).blocks()) == 3


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({}, "give MoonViT either a name or a config"),
        ({"config": CONFIG, "layer": 9}, "layer 9 is not one of the 4 hidden states"),
        ({"config": CONFIG, "layer": [0, 2]}, "name one layer, or several different ones"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        MoonViT(**arguments)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (
            {"model_type": "siglip_vision_model", "hidden_size": 8},
            "knows moonvit and .*; 'siglip_vision_model' in .*json",
        ),
        ({"model_type": "moonvit"}, "describes no MoonViT: it has none of hidden_size"),
        (None, "has no config.json"),
    ],
)
def test_folders_of_other_models_are_refused(config: dict[str, Any] | None, match: str, tmp_path: Path) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=match):
        MoonViT(str(tmp_path))
