"""The networks that OLA-VLM distils from: what they read, how pictures reach them, and their published weights."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    OneFormerConfig,
    OneFormerModel,
    SwinConfig,
)

from lit_vlm.core.batch import Grid, Images
from lit_vlm.core.part import load_state
from lit_vlm.encoders import CLIPEmbedding, DepthAnything, Encoder, HFEncoder, OneFormerSwin
from lit_vlm.teachers import DINOv2, EncoderTeacher

DINO: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 42, "patch_size": 7,
    "out_indices": [1, 2, 3, 4],
}  # fmt: skip
SWIN: dict[str, Any] = {
    "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 4, "image_size": 64,
    "drop_path_rate": 0.3,
}  # fmt: skip
VIT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 7, "projection_dim": 24,
}  # fmt: skip
MADE = {
    "depth": partial(DepthAnything, None, DINO, 28),
    "seg": partial(OneFormerSwin, None, SWIN, 64, 72),
    "gen": partial(CLIPEmbedding, None, VIT),
}
GRIDS = {"depth": Grid(4, 4), "seg": Grid(2, 2), "gen": Grid(1, 1)}


def pictures(encoder: Encoder, count: int = 2) -> Images:
    """Random pictures of the encoder's size."""
    side = encoder.pixels.size
    assert side is not None
    generator = torch.Generator().manual_seed(0)
    return Images.pack(list(torch.randint(0, 256, (count, 3, side, side), generator=generator).byte()))


@pytest.mark.parametrize("name", MADE)
def test_every_picture_gives_the_promised_features(name: str) -> None:
    encoder = MADE[name]().eval()
    images = pictures(encoder)
    assert encoder(images).grids == (GRIDS[name],) * 2


@pytest.mark.parametrize("name", MADE)
def test_as_a_teacher_it_gives_the_same_whatever_mode_training_is_in(name: str) -> None:
    teacher = EncoderTeacher(MADE[name])
    images = pictures(teacher.encoder)
    first = teacher(images).features
    teacher.encoder.train()  # a Trainer would not reach it; the swin has stochastic depth
    teacher.encoder.eval()
    assert torch.equal(first, teacher(images).features)
    assert not first.requires_grad


def test_depth_reads_the_mean_of_normalised_blocks_of_a_picture_with_swapped_channels() -> None:
    encoder = DepthAnything(None, DINO, 28).eval()
    images = pictures(encoder)
    x = images.pixels.view(2, 3, 28, 28).flip(1).float() / 255
    x = (x - encoder.pixel_mean) / encoder.pixel_std
    model = encoder.backbone
    hidden = model.embeddings(x)
    taps = []
    for layer in model.encoder.layer:
        hidden = layer(hidden)
        taps.append(model.layernorm(hidden)[:, 1:])
    expected = torch.stack(taps).mean(0).flatten(0, 1)
    torch.testing.assert_close(encoder(images).features, expected, atol=1e-5, rtol=1e-4)
    other = DepthAnything(None, DINO, 28, taps="last", channels="rgb").eval()
    load_state(other, encoder.state_dict(), "encoder")
    swapped = Images.pack(list(images.pixels.view(2, 3, 28, 28).flip(1)))
    torch.testing.assert_close(other(swapped).features, taps[-1].flatten(0, 1), atol=1e-5, rtol=1e-4)


def test_segmentation_is_seen_larger_and_brought_back() -> None:
    encoder = OneFormerSwin(None, SWIN, 64, 96).eval()
    images = pictures(encoder)
    x = F.interpolate(images.pixels.view(2, 3, 64, 64).float(), (96, 96), mode="bilinear", antialias=True).round()
    x = (x / 255 - encoder.pixel_mean) / encoder.pixel_std
    (found,) = encoder.backbone(x).feature_maps
    assert found.shape[2:] == (3, 3)
    expected = F.interpolate(found, (2, 2), mode="bilinear", align_corners=False).permute(0, 2, 3, 1)
    torch.testing.assert_close(encoder(images).features, expected.reshape(8, -1), atol=1e-5, rtol=1e-4)
    plain = OneFormerSwin(None, SWIN, 64, None).eval()
    load_state(plain, encoder.state_dict(), "encoder")
    assert not torch.allclose(plain(images).features, expected.reshape(8, -1), atol=1e-3)


def oneformer() -> OneFormerModel:
    """A tiny one with random weights."""
    return OneFormerModel(
        OneFormerConfig(
            backbone_config=SwinConfig(**{**SWIN, "out_features": ["stage1", "stage2", "stage3", "stage4"]}),
            hidden_dim=32,
            mask_dim=32,
            conv_dim=32,
            num_queries=4,
            encoder_layers=1,
            decoder_layers=1,
            encoder_feedforward_dim=16,
            dim_feedforward=16,
            text_encoder_width=16,
            text_encoder_num_layers=1,
            text_encoder_proj_layers=1,
            num_attention_heads=2,
        )
    )


def test_published_weights_are_read_from_the_whole_models(tmp_path: Path) -> None:
    torch.manual_seed(0)
    depth = DepthAnythingForDepthEstimation(
        DepthAnythingConfig(
            backbone_config=Dinov2Config(**DINO, reshape_hidden_states=False),
            reassemble_hidden_size=32,
            neck_hidden_sizes=[8, 8, 8, 8],
            fusion_hidden_size=8,
        )
    )
    depth.save_pretrained(tmp_path / "depth")
    seg = oneformer()
    seg.save_pretrained(tmp_path / "seg")
    gen = CLIPVisionModelWithProjection(CLIPVisionConfig(**VIT))
    gen.save_pretrained(tmp_path / "gen" / "image_encoder")
    for encoder, whole in (
        (DepthAnything(str(tmp_path / "depth"), image_size=42, channels="rgb"), depth.backbone),
        (OneFormerSwin(str(tmp_path / "seg"), image_size=64), seg.pixel_level_module.encoder),
        (CLIPEmbedding(str(tmp_path / "gen")), gen),
    ):
        state = encoder.pretrained_state()
        assert state is not None
        load_state(encoder, state, "encoder")
        theirs = whole.state_dict()
        assert all(torch.equal(value, theirs[name]) for name, value in encoder.backbone.state_dict().items())


def published_oneformer(folder: Path) -> OneFormerModel:
    """A OneFormer under the names of its time: without `swin.`, and without the norm that transformers 5 adds."""
    model = oneformer()
    torch.nn.init.normal_(model.pixel_level_module.encoder.swin.layernorm.weight)
    model.save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    names = {key: f"model.{key.replace('.encoder.swin.', '.encoder.')}" for key in state}
    old = {name: state[key] for key, name in names.items() if ".encoder.layernorm." not in name}
    assert len(old) == len(state) - 2
    save_file(old, folder / "model.safetensors", metadata={"format": "pt"})
    return model


def test_oneformer_as_published_lacks_a_norm_that_its_features_do_not_pass(tmp_path: Path) -> None:
    whole = published_oneformer(tmp_path).eval()
    teacher = EncoderTeacher(partial(OneFormerSwin, str(tmp_path), None, 64, None))
    images = pictures(teacher.encoder)
    found = teacher(images).features
    pixels = teacher.encoder.normalise(images.pixels.view(2, 3, 64, 64), torch.float32)
    (expected,) = whole.pixel_level_module.encoder(pixels).feature_maps[-1:]
    torch.testing.assert_close(found, expected.flatten(2).transpose(1, 2).flatten(0, 1))
    state = load_file(tmp_path / "model.safetensors")
    key = next(key for key in state if key.endswith("hidden_states_norms.stage4.weight"))
    del state[key]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"no weights for pixel_level_module\.encoder\.\S*stage4\.weight \(missing\)"):
        OneFormerSwin(str(tmp_path), None, 64).pretrained_state()


@pytest.mark.parametrize("name", MADE)
def test_what_a_class_lets_be_absent_changes_no_feature(name: str) -> None:
    encoder = MADE[name]().eval()
    patterns = getattr(encoder.backbone, "_keys_to_ignore_on_load_missing", None) or ()
    before = encoder(pictures(encoder)).features
    for key, parameter in encoder.backbone.named_parameters():
        if any(re.search(pattern, key) for pattern in patterns):
            parameter.data += 1
    assert torch.equal(encoder(pictures(encoder)).features, before)
    assert bool(patterns) == (name == "seg")


def test_position_embeddings_are_resized_in_dinov2s_own_way(tmp_path: Path) -> None:
    config = DepthAnythingConfig(
        backbone_config=Dinov2Config(**DINO, reshape_hidden_states=False),
        reassemble_hidden_size=32,
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
    )
    whole = DepthAnythingForDepthEstimation(config)
    torch.nn.init.normal_(whole.backbone.embeddings.position_embeddings)
    whole.save_pretrained(tmp_path)
    state = DepthAnything(str(tmp_path), image_size=28).pretrained_state()
    assert state is not None
    own = state["backbone.embeddings.position_embeddings"]
    theirs = whole.backbone.embeddings.position_embeddings
    grid = theirs[:, 1:].view(1, 6, 6, 32).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, scale_factor=(4.1 / 6, 4.1 / 6), mode="bicubic")
    assert expected.shape[2:] == (4, 4)
    torch.testing.assert_close(own[:, 1:], expected.permute(0, 2, 3, 1).flatten(1, 2))
    torch.testing.assert_close(own[:, :1], theirs[:, :1])


@pytest.mark.parametrize("encoder", [DepthAnything, OneFormerSwin, CLIPEmbedding])
def test_a_name_and_a_config_are_one_too_many(encoder: Any) -> None:
    with pytest.raises(ValueError, match=f"give {encoder.__name__} either a name or a config"):
        encoder(config={})


def test_dinov2_is_pooled_to_the_grid_that_a_head_wants() -> None:
    config = {"model_type": "dinov2", **{key: value for key, value in DINO.items() if key != "out_indices"}}
    teacher = DINOv2(None, config, side=3)
    images = pictures(teacher.encoder)
    whole = EncoderTeacher(partial(HFEncoder, None, config, -1))(images)
    assert whole.grids == (Grid(6, 6),) * 2
    found = teacher(images)
    assert found.grids == (Grid(3, 3),) * 2
    assert teacher.pixels.resize == "squash"
    maps = whole.features.view(2, 6, 6, 32).permute(0, 3, 1, 2)
    expected = F.interpolate(maps, (3, 3), mode="bilinear", antialias=True).permute(0, 2, 3, 1).reshape(18, 32)
    torch.testing.assert_close(found.features, expected)
