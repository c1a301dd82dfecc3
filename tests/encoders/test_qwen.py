"""QwenEncoder against the vision towers of transformers, on the inputs of transformers' own image processor."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen2VLImageProcessor

from lit_vlm.core.batch import Grid, Images
from lit_vlm.core.part import load_state
from lit_vlm.encoders import QwenEncoder
from lit_vlm.encoders.qwen import VISION_MODELS
from lit_vlm.testing import check_encoder

COMMON: dict[str, Any] = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 16,
}
QWEN3 = COMMON | {"num_position_embeddings": 25, "deepstack_visual_indexes": [0, 1]}
CONFIGS: dict[str, dict[str, Any]] = {
    # Windows of 2 × 2 merged tokens, so that most pictures have several, and some at an edge; one block sees all.
    "qwen2_5_vl_vision": COMMON | {"window_size": 16, "fullatt_block_indexes": [1]},
    "qwen3_vl_vision": QWEN3,
    "qwen3_vl_moe_vision": QWEN3,
}
WHOLE = {
    "qwen2_5_vl_vision": (transformers.Qwen2_5_VLConfig, transformers.Qwen2_5_VLForConditionalGeneration),
    "qwen3_vl_vision": (transformers.Qwen3VLConfig, transformers.Qwen3VLForConditionalGeneration),
    "qwen3_vl_moe_vision": (transformers.Qwen3VLMoeConfig, transformers.Qwen3VLMoeForConditionalGeneration),
}
TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2, "num_experts": 2,
        "num_experts_per_tok": 1, "moe_intermediate_size": 8}  # fmt: skip
SIZES = [(16, 16), (8, 40), (8, 8), (24, 16), (8, 40)]


def test_each_kind_is_tested() -> None:
    assert CONFIGS.keys() == VISION_MODELS.keys() == WHOLE.keys()


def pictures(sizes: list[tuple[int, int]]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8) for size in sizes]


def saved(model_type: str, folder: Path) -> Any:
    """The tower of a whole model in a folder, with weights that let no norm or bias be left out unseen."""
    torch.manual_seed(0)
    config, whole = WHOLE[model_type]
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}
    text = {key: value for key, value in TEXT.items() if "moe" in model_type or "exp" not in key}
    model = whole(config(vision_config=CONFIGS[model_type], text_config=text | {"rope_parameters": rope})).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model.model.visual


def loaded(folder: Path, **settings: Any) -> QwenEncoder:
    encoder = QwenEncoder(str(folder), **settings).eval()
    load_state(encoder, encoder.pretrained_state() or {}, "encoder")
    return encoder


def processed(model_type: str, picture: Tensor) -> dict[str, Tensor]:
    mean, std = VISION_MODELS[model_type]
    processor = Qwen2VLImageProcessor(patch_size=4, do_resize=False, image_mean=mean, image_std=std)
    return dict(processor(images=[picture], return_tensors="pt"))


def row_by_row(states: Tensor, rows: int, cols: int) -> Tensor:
    """States `[rows · cols, d]` of 2 × 2 patches after each other, as the tower has them, in the order of an image."""
    return states.view(rows // 2, cols // 2, 2, 2, -1).transpose(1, 2).reshape(rows * cols, -1)


def expected_states(tower: Any, given: dict[str, Tensor], layers: list[int]) -> Tensor:
    """Hidden states of transformers of one picture, row by row; windows of Qwen2.5-VL are put back in their order."""
    found: list[Tensor] = []
    hooks = [tower.blocks[0].register_forward_pre_hook(lambda _module, args: found.append(args[0]))]
    hooks += [block.register_forward_hook(lambda _module, _args, out: found.append(out)) for block in tower.blocks]
    with torch.no_grad():
        tower(given["pixel_values"], given["image_grid_thw"])
    for hook in hooks:
        hook.remove()
    (_, rows, cols) = given["image_grid_thw"][0].tolist()
    states = torch.cat([found[layer] for layer in layers], -1)
    if hasattr(tower, "window_size"):
        squares = windows(rows // 2, cols // 2, tower.window_size // tower.patch_size // 2)
        back = torch.empty_like(states).unflatten(0, (-1, 4))
        back[squares] = states.unflatten(0, (-1, 4))
        states = back.flatten(0, 1)
    return row_by_row(states, rows, cols)


def windows(rows: int, cols: int, side: int) -> list[int]:
    """Indices of the cells of a grid, window by window."""
    return [
        row * cols + col
        for top in range(0, rows, side)
        for left in range(0, cols, side)
        for row in range(top, min(top + side, rows))
        for col in range(left, min(left + side, cols))
    ]


@pytest.mark.parametrize("model_type", CONFIGS)
@pytest.mark.parametrize("layer", [-1, -2, 0, [1, -1]])
def test_features_are_those_of_transformers_on_its_own_inputs(
    model_type: str, layer: int | list[int], tmp_path: Path
) -> None:
    tower = saved(model_type, tmp_path)
    encoder = loaded(tmp_path, layer=layer)
    shown = pictures(SIZES)
    with torch.no_grad():
        result = encoder(Images.pack(shown))
    assert result.grids == tuple(Grid(height // 4, width // 4) for height, width in SIZES)
    assert encoder.width == result.features.shape[1]
    parts = result.features.split([grid.num_tokens for grid in result.grids])
    for picture, found in zip(shown, parts, strict=True):
        # On its own, so that nothing of other pictures can have come in.
        given = processed(model_type, picture)
        expected = expected_states(tower, given, layer if isinstance(layer, list) else [layer])
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model_type", CONFIGS)
def test_a_picture_has_the_same_tokens_in_any_company(model_type: str) -> None:
    torch.manual_seed(0)
    encoder = QwenEncoder(config={"model_type": model_type, **CONFIGS[model_type]}).eval()
    first, second = pictures([(8, 24), (32, 32)])
    alone, together = encoder(Images.pack([first])), encoder(Images.pack([second, first]))
    torch.testing.assert_close(together.features[64:], alone.features)


@pytest.mark.parametrize("model_type", CONFIGS)
def test_it_keeps_the_contract(model_type: str) -> None:
    check_encoder(partial(QwenEncoder, config={"model_type": model_type, **CONFIGS[model_type]}), SIZES)


@pytest.mark.parametrize("model_type", CONFIGS)
def test_blocks_behind_the_last_that_is_read_and_mergers_are_not_built(model_type: str, tmp_path: Path) -> None:
    saved(model_type, tmp_path)
    encoder = loaded(tmp_path, layer=-2)
    assert len(encoder.blocks()) == 2
    assert not any("merger" in name for name in encoder.state_dict())
    alone = QwenEncoder(**encoder.standalone({"name": str(tmp_path), "layer": -2})).eval()
    alone.load_state_dict(encoder.state_dict())
    shown = Images.pack(pictures(SIZES[:2]))
    torch.testing.assert_close(alone(shown).features, encoder(shown).features)


@pytest.mark.parametrize("model_type", CONFIGS)
@pytest.mark.parametrize("prefix", ["visual.", "model.visual.", ""])
def test_both_published_forms_and_the_tower_alone_are_read(model_type: str, prefix: str, tmp_path: Path) -> None:
    tower = saved(model_type, tmp_path)
    if prefix:
        file = tmp_path / "model.safetensors"
        state = {key.removeprefix("model."): value for key, value in load_file(file).items() if "visual." in key}
        state = {prefix + key.removeprefix("visual."): value for key, value in state.items()}
        save_file(state, file, metadata={"format": "pt"})
    else:
        tower.save_pretrained(tmp_path)
    encoder = loaded(tmp_path)
    for name, value in encoder.backbone.state_dict().items():
        torch.testing.assert_close(value, tower.state_dict()[name], rtol=0, atol=0)


def test_weights_that_are_not_there_are_an_error(tmp_path: Path) -> None:
    saved("qwen3_vl_vision", tmp_path)
    file = tmp_path / "model.safetensors"
    state = {key: value for key, value in load_file(file).items() if not key.endswith("blocks.1.attn.qkv.bias")}
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"has no weights for blocks.1.attn.qkv.bias \(missing\) of Qwen3VLVisionM"):
        QwenEncoder(str(tmp_path)).pretrained_state()
    QwenEncoder(str(tmp_path), layer=1).pretrained_state()


def test_pictures_stand_for_two_frames_and_colours_are_the_processors() -> None:
    for model_type in CONFIGS:
        encoder = QwenEncoder(config={"model_type": model_type, **CONFIGS[model_type]})
        shown = pictures([(16, 24)])
        found = encoder._patches(Images.pack(shown))
        torch.testing.assert_close(found, processed(model_type, shown[0])["pixel_values"], atol=1e-5, rtol=1e-5)


def test_sides_that_are_no_multiple_are_refused_with_the_transforms_to_use() -> None:
    encoder = QwenEncoder(config={"model_type": "qwen3_vl_vision", **QWEN3})
    assert encoder.pixels.multiple == 8
    with pytest.raises(ValueError, match=r"sides are multiples of 8 pixels, found \[\(16, 12\)\]; use .* NativeArea"):
        encoder(Images.pack(pictures([(16, 16), (16, 12)])))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({}, "give QwenEncoder either a name or a config"),
        ({"config": {"model_type": "siglip_vision_model"}}, "QwenEncoder knows qwen2_5_vl_vision, .*; 'siglip_vision"),
        ({"config": COMMON, "layer": 9}, "layer 9 is not one of the 4 hidden states"),
        ({"config": COMMON, "layer": [0, 2]}, "name one layer, or several different ones behind the embeddings"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        QwenEncoder(**arguments)
