"""HFEncoder against reference features and against transformers itself."""

from __future__ import annotations

import pickle
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_vlm.core.batch import Grid, Images
from lit_vlm.core.part import load_state
from lit_vlm.encoders import S2, HFEncoder
from lit_vlm.testing import check_encoder

VISION: dict[str, Any] = torch.load(Path(__file__).parents[1] / "fixtures" / "vila_vision.pt", weights_only=True)
CLIP = {
    "model_type": "clip_vision_model",
    "layer_norm_eps": VISION["layer_norm_eps"],
    "hidden_act": VISION["hidden_act"],
    **VISION["clip_config"],
}
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
}
FAMILIES = [
    "clip_vision_model",
    "siglip_vision_model",
    "dinov2",
    "dinov2_with_registers",
    "dinov3_vit",
    "aimv2_vision_model",
    "internvl_vision",
]


def reference_encoder(layer: int, cls: bool) -> HFEncoder:
    encoder = HFEncoder(config=CLIP, layer=layer, cls=cls)
    state = {f"backbone.{key.removeprefix('vision_model.')}": v for key, v in VISION["clip_state_dict"].items()}
    load_state(encoder, {key: state[key] for key in encoder.state_dict()}, "encoder")
    return encoder.eval()


def tiny(model_type: str, folder: Path) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **SIZES)
    model = transformers.AutoModel.from_config(config).eval()
    for parameter in model.parameters():  # so that a norm left out or applied twice is seen
        parameter.data += 0.1 * torch.randn_like(parameter)
    if model_type == "internvl_vision":  # published only inside of InternVL
        text = {"model_type": "qwen2", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
                "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 40}  # fmt: skip
        whole = transformers.InternVLForConditionalGeneration(
            transformers.InternVLConfig(vision_config=config.to_dict(), text_config=text, image_token_id=3)
        )
        whole.model.vision_tower.load_state_dict(model.state_dict())
        whole.save_pretrained(folder)
        return model
    model.save_pretrained(folder)
    return model


def images(count: int, side: int = 28) -> Images:
    generator = torch.Generator().manual_seed(count)
    return Images.pack(list(torch.randint(0, 256, (count, 3, side, side), generator=generator, dtype=torch.uint8)))


def hidden_states(model: transformers.PreTrainedModel, pixels: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return model(pixels, output_hidden_states=True).hidden_states


@pytest.mark.parametrize(
    ("layer", "cls", "case"),
    [
        (-2, False, "feature_layer-2_patch"),
        (-2, True, "feature_layer-2_cls_patch"),
        (-1, False, "feature_layer-1_patch"),
    ],
)
def test_clip_layer_matches_vila(layer: int, cls: bool, case: str) -> None:
    encoder = reference_encoder(layer, cls)
    with torch.no_grad():
        features = encoder.backbone(VISION["images"]).last_hidden_state[:, encoder.skip :]
    torch.testing.assert_close(features, VISION[case], atol=1e-5, rtol=0)


@pytest.mark.parametrize("cls", [False, True])
def test_forward_is_normalise_then_backbone_row_by_row(cls: bool) -> None:
    encoder, batch = reference_encoder(-2, cls), images(3)
    with torch.no_grad():
        result = encoder(batch)
        pixels = encoder.normalise(batch.pixels.view(3, 3, 28, 28), torch.float32)
        expected = encoder.backbone(pixels).last_hidden_state[:, 0 if cls else 1 :]
    assert result.grids == (Grid(4, 4, prefix=int(cls)),) * 3
    torch.testing.assert_close(result.features, expected.flatten(0, 1))
    assert encoder.patch_grid(28, 28) == result.grids[0]


def test_normalise_equals_the_image_processor_of_clip() -> None:
    encoder, batch = reference_encoder(-2, False), images(2)
    raw = batch.pixels.view(2, 3, 28, 28)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    expected = (raw.permute(0, 2, 3, 1).double() / 255 - mean) / std
    result = encoder.normalise(raw, torch.float32)
    torch.testing.assert_close(result, expected.permute(0, 3, 1, 2).float())
    assert encoder.normalise(raw, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize(("layer", "kept"), [(-1, 4), (-2, 3), (2, 2), (0, 0)])
def test_only_needed_blocks_exist(model_type: str, layer: int, kept: int) -> None:
    encoder = HFEncoder(config={"model_type": model_type, **SIZES}, layer=layer)
    assert len(encoder.blocks()) == kept
    names = " ".join(encoder.state_dict())
    assert "post_layernorm" not in names
    assert "backbone.layernorm" not in names
    assert "head." not in names


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("layer", [0, 1, 3, 4, -1, -2, -5])
def test_features_equal_the_hidden_states_of_transformers(model_type: str, layer: int, tmp_path: Path) -> None:
    model = tiny(model_type, tmp_path)
    encoder = HFEncoder(name=str(tmp_path), layer=layer).eval()
    state = encoder.pretrained_state()
    assert state is not None
    load_state(encoder, state, "encoder")
    batch = images(2)
    with torch.no_grad():
        result = encoder(batch).features
    pixels = encoder.normalise(batch.pixels.view(2, 3, 28, 28), torch.float32)
    torch.testing.assert_close(result, hidden_states(model, pixels)[layer][:, -16:].flatten(0, 1))


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("layer", [[-3, -1], [4, 2, 1]])
def test_several_layers_stand_side_by_side_in_their_order_or_are_summed(
    model_type: str, layer: list[int], tmp_path: Path
) -> None:
    model = tiny(model_type, tmp_path)
    batch = images(2)
    for merge in ("concat", "sum"):
        encoder = HFEncoder(name=str(tmp_path), layer=layer, merge=merge).eval()  # type: ignore[arg-type]
        load_state(encoder, encoder.pretrained_state() or {}, "encoder")
        pixels = encoder.normalise(batch.pixels.view(2, 3, 28, 28), torch.float32)
        states = [hidden_states(model, pixels)[one][:, -16:].flatten(0, 1) for one in layer]
        expected = torch.cat(states, -1) if merge == "concat" else torch.stack(states).sum(0)
        with torch.no_grad():
            torch.testing.assert_close(encoder(batch).features, expected)
        assert encoder.width == expected.shape[1]
        assert len(encoder.blocks()) == max(one % 5 for one in layer)
        arguments = encoder.standalone({"name": str(tmp_path), "layer": layer, "merge": merge})
        alone = HFEncoder(**arguments).eval()
        alone.load_state_dict(encoder.state_dict())
        with torch.no_grad():
            torch.testing.assert_close(alone(batch).features, expected)


def test_several_layers_are_told_apart_by_their_identity() -> None:
    """Features that are prepared once are found by it."""
    settings = [1, 3], [2, 3], [3, 1], 3
    assert len({HFEncoder(config=CLIP, layer=layer).identity() for layer in settings}) == len(settings)
    assert "ReadLayers" not in HFEncoder(config=CLIP, layer=3).identity()
    assert len({S2(partial(HFEncoder, config=CLIP, layer=layer)).identity() for layer in settings}) == len(settings)


@pytest.mark.parametrize("model_type", ["clip_vision_model", "dinov2"])
def test_cls_token_stands_in_front(model_type: str, tmp_path: Path) -> None:
    model = tiny(model_type, tmp_path)
    encoder = HFEncoder(name=str(tmp_path), cls=True).eval()
    load_state(encoder, encoder.pretrained_state() or {}, "encoder")
    batch = images(2)
    with torch.no_grad():
        result = encoder(batch)
    pixels = encoder.normalise(batch.pixels.view(2, 3, 28, 28), torch.float32)
    torch.testing.assert_close(result.features, hidden_states(model, pixels)[-2].flatten(0, 1))
    assert result.grids == (Grid(4, 4, prefix=1),) * 2


@pytest.mark.parametrize("model_type", ["dinov2_with_registers", "dinov3_vit"])
@pytest.mark.parametrize("cls", [False, True])
def test_registers_are_dropped(model_type: str, cls: bool, tmp_path: Path) -> None:
    config = {"model_type": model_type, "num_register_tokens": 3, **SIZES}
    encoder = HFEncoder(config=config, cls=cls).eval()
    batch = images(2)
    pixels = encoder.normalise(batch.pixels.view(2, 3, 28, 28), torch.float32)
    with torch.no_grad():
        states, result = encoder.backbone(pixels).last_hidden_state, encoder(batch)
    assert states.shape[1] == 1 + 3 + 16
    kept = [0] * cls + list(range(4, 20))
    torch.testing.assert_close(result.features, states[:, kept].flatten(0, 1))
    assert result.grids == (Grid(4, 4, prefix=int(cls)),) * 2


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_the_vision_tower_of_a_whole_image_text_model_is_found(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    text = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": 9,
    }
    ends = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    config = transformers.AutoConfig.for_model(family, vision_config=SIZES, text_config={**text, **ends})
    model = transformers.AutoModel.from_config(config).eval()
    model.save_pretrained(tmp_path)
    encoder = HFEncoder(name=str(tmp_path)).eval()
    load_state(encoder, encoder.pretrained_state() or {}, "encoder")
    batch = images(1)
    pixels = encoder.normalise(batch.pixels.view(1, 3, 28, 28), torch.float32)
    with torch.no_grad():
        result = encoder(batch).features
    expected = hidden_states(model.vision_model, pixels)[-2][:, encoder.skip :]
    torch.testing.assert_close(result, expected.flatten(0, 1))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_training_mode_draws_nothing(model_type: str) -> None:
    encoder = HFEncoder(config={"model_type": model_type, **SIZES})
    torch.testing.assert_close(encoder.train()(images(2)).features, encoder.eval()(images(2)).features)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_it_is_made_again_from_its_kept_blocks_without_other_files(model_type: str) -> None:
    arguments = {"config": {"model_type": model_type, **SIZES}, "layer": 2}
    encoder = HFEncoder(**arguments).eval()  # type: ignore[arg-type]
    alone = HFEncoder(**encoder.standalone(arguments)).eval()
    alone.load_state_dict(encoder.state_dict())
    torch.testing.assert_close(alone(images(2)).features, encoder(images(2)).features)


def test_random_weights_have_no_pretrained_state() -> None:
    assert HFEncoder(config=CLIP).pretrained_state() is None


@pytest.mark.parametrize("model_type", FAMILIES)
def test_each_family_keeps_the_contract(model_type: str) -> None:
    # DINOv2 masks in its own training only.
    check_encoder(partial(HFEncoder, config={"model_type": model_type, **SIZES}), unread=("mask_token",))


def test_pixels_and_grid_say_what_the_model_wants_and_pickle() -> None:
    encoder = HFEncoder(config=CLIP)
    assert (encoder.pixels.size, encoder.pixels.multiple, encoder.width) == (28, 7, 16)
    assert pickle.loads(pickle.dumps((encoder.pixels, encoder.patch_grid))) == (encoder.pixels, encoder.patch_grid)


@pytest.mark.parametrize("layer", [5, -6, 100])
def test_a_layer_out_of_range_is_refused(layer: int) -> None:
    with pytest.raises(ValueError, match=f"layer {layer} is not one of the 5 hidden states"):
        HFEncoder(config=CLIP, layer=layer)


@pytest.mark.parametrize("layer", [[], [-1, 4], [0, 2]])
def test_layers_that_cannot_be_merged_are_refused(layer: list[int]) -> None:
    with pytest.raises(ValueError, match="name one layer, or several different ones behind the embeddings"):
        HFEncoder(config=CLIP, layer=layer)


def test_siglip_has_no_cls_token() -> None:
    with pytest.raises(ValueError, match="siglip_vision_model has no CLS token to keep"):
        HFEncoder(config={"model_type": "siglip_vision_model", **SIZES}, cls=True)


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(ValueError, match="knows clip_vision_model, siglip_vision_model, dinov2, .*; 'vit' is not one"):
        HFEncoder(config={"model_type": "vit", **SIZES})


@pytest.mark.parametrize(("name", "config"), [(None, None), ("somewhere", CLIP)])
def test_exactly_one_of_name_and_config_is_needed(name: str | None, config: dict[str, Any] | None) -> None:
    with pytest.raises(ValueError, match="either a name or a config"):
        HFEncoder(name=name, config=config)


def test_a_missing_folder_is_named() -> None:
    with pytest.raises(ValueError, match="there are no weights at /no/such/folder"):
        HFEncoder(name="/no/such/folder")


def test_mixed_sizes_are_refused_with_the_transforms_to_use() -> None:
    mixed = Images.pack([torch.zeros(3, 28, 28, dtype=torch.uint8), torch.zeros(3, 28, 35, dtype=torch.uint8)])
    with pytest.raises(ValueError, match=r"28 × 28 pixels, found \[\(28, 35\)\].*SquareCrop, PadSquare or Resize"):
        HFEncoder(config=CLIP)(mixed)


def test_the_config_of_the_caller_is_not_changed() -> None:
    config = dict(CLIP)
    HFEncoder(config=config)
    assert config == CLIP


@pytest.mark.parametrize("model_type", FAMILIES)
def test_tiles_below_each_other_are_images_of_their_own(model_type: str) -> None:
    encoder = HFEncoder(config={"model_type": model_type, **SIZES}, layer=-1).eval()
    one, two, three = (torch.randint(0, 256, (3, 28, 28), dtype=torch.uint8) for _ in range(3))
    alone = encoder(Images.pack([one, two, three, one]))
    columns = encoder(Images.pack([one, torch.cat([two, three], dim=1), one]))
    torch.testing.assert_close(columns.features, alone.features)
    assert columns.grids == (Grid(4, 4), Grid(8, 4), Grid(4, 4))


def test_tiles_with_a_class_token_are_refused() -> None:
    encoder = HFEncoder(config={"model_type": "dinov2", **SIZES}, cls=True)
    with pytest.raises(ValueError, match="Tiles without a CLS token"):
        encoder(Images.pack([torch.zeros(3, 56, 28, dtype=torch.uint8)]))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_weights_that_are_not_there_or_of_another_shape_are_an_error(model_type: str, tmp_path: Path) -> None:
    tiny(model_type, tmp_path)
    encoder, file = HFEncoder(name=str(tmp_path)), tmp_path / "model.safetensors"
    whole = load_file(file)
    # The position table is in all of them but DINOv3, which has rotary positions; text models have none.
    names = ("position_embeddings", "position_embedding.weight", "register_tokens" if "v3" in model_type else "-")
    (key,) = (key for key in whole if key.endswith(names))
    save_file({name: value for name, value in whole.items() if name != key}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"has no weights for \S*{re.escape(key)}\S* \(missing\) of "):
        encoder.pretrained_state()
    other = torch.cat([whole[key], whole[key]], dim=-1)
    save_file(whole | {key: other}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"has no weights for \S*{re.escape(key)}\S* \(\(.*\) instead of "):
        encoder.pretrained_state()
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(ValueError, match=f"a weight file of {tmp_path} cannot be read: "):
        encoder.pretrained_state()


def test_dinov3_takes_pictures_of_a_given_size(tmp_path: Path) -> None:
    model = tiny("dinov3_vit", tmp_path)
    encoder = HFEncoder(str(tmp_path), layer=-1, side=42).eval()
    load_state(encoder, encoder.pretrained_state() or {}, "encoder")
    assert (encoder.pixels.size, encoder.patch_grid(42, 42)) == (42, Grid(6, 6))
    batch = images(2, 42)
    pixels = encoder.normalise(batch.pixels.view(2, 3, 42, 42), torch.float32)
    with torch.no_grad():
        kept = slice(1 + model.config.num_register_tokens, None)
        expected = model(pixels, output_hidden_states=True).hidden_states[-1][:, kept]
        torch.testing.assert_close(encoder(batch).features, expected.flatten(0, 1))
    assert encoder.identity() != HFEncoder(str(tmp_path), layer=-1).identity()


@pytest.mark.parametrize(
    ("config", "side", "said"),
    [
        (CLIP, 42, "side 42: the positions of a 'clip_vision_model' are learnt for pictures of 28 pixels"),
        ({"model_type": "dinov3_vit", **SIZES}, 40, "side 40 is no multiple of the patch, 7"),
        ({"model_type": "dinov3_vit", **SIZES}, 0, "side 0 is no multiple of the patch, 7"),
    ],
)
def test_sizes_that_a_model_cannot_have_are_refused(config: dict[str, Any], side: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        HFEncoder(config=config, side=side)
