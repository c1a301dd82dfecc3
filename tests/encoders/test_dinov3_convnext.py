"""DINOv3ConvNeXt against transformers' own model, one picture at a time."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DINOv3ConvNextModel

from lit_vlm.core.batch import Grid, Images
from lit_vlm.core.part import load_state
from lit_vlm.encoders import DINOv3ConvNeXt
from lit_vlm.testing import check_encoder

CONFIG: dict[str, Any] = {"depths": [1, 2, 1, 1], "hidden_sizes": [8, 12, 16, 24], "layer_scale_init_value": 0.5}
SIZES = [(32, 64), (96, 32), (64, 64), (32, 64), (32, 32)]


def pictures(sizes: list[tuple[int, int]]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8) for size in sizes]


def saved(folder: Path) -> DINOv3ConvNextModel:
    torch.manual_seed(0)
    model = DINOv3ConvNextModel(transformers.AutoConfig.for_model("dinov3_convnext", **CONFIG)).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model


def loaded(folder: Path, **settings: Any) -> DINOv3ConvNeXt:
    encoder = DINOv3ConvNeXt(str(folder), **settings).eval()
    load_state(encoder, encoder.pretrained_state() or {}, "encoder")
    return encoder


@pytest.mark.parametrize("depth", [-1, 0, 1, 2])
def test_features_are_those_of_transformers_in_mixed_company(depth: int, tmp_path: Path) -> None:
    model, encoder = saved(tmp_path), loaded(tmp_path, depth=depth)
    shown, stride = pictures(SIZES), (4, 8, 16, 32)[depth]
    with torch.no_grad():
        result = encoder(Images.pack(shown))
    assert result.grids == tuple(Grid(height // stride, width // stride) for height, width in SIZES)
    assert encoder.width == CONFIG["hidden_sizes"][depth]
    parts = result.features.split([grid.num_tokens for grid in result.grids])
    for picture, found in zip(shown, parts, strict=True):
        with torch.no_grad():
            pixels = encoder.normalise(picture[None], torch.float32)
            states = model(pixels, output_hidden_states=True).hidden_states
            # The last state is that of the last stage; in front of the first there are the pixels.
            expected = states[depth if depth < 0 else depth + 1][0]
        torch.testing.assert_close(found, expected.flatten(1).T, atol=1e-5, rtol=1e-5)


def test_the_norm_of_transformers_makes_its_last_state(tmp_path: Path) -> None:
    model, encoder = saved(tmp_path), loaded(tmp_path)
    picture = pictures([(64, 96)])[0]
    with torch.no_grad():
        found = model.layer_norm(encoder(Images.pack([picture])).features)
        expected = model(encoder.normalise(picture[None], torch.float32)).last_hidden_state[0, 1:]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("depth", [-1, 1])
def test_it_keeps_the_contract(depth: int) -> None:
    check_encoder(partial(DINOv3ConvNeXt, config=CONFIG, depth=depth))


def test_gradients_of_mixed_company_are_those_of_pictures_alone() -> None:
    torch.manual_seed(0)
    encoder, shown = DINOv3ConvNeXt(config=CONFIG), pictures(SIZES)
    encoder(Images.pack(shown)).features.square().sum().backward()
    together = {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}
    encoder.zero_grad()
    for picture in shown:
        encoder(Images.pack([picture])).features.square().sum().backward()
    alone = {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}
    assert together.keys() == alone.keys()
    for name, grad in together.items():
        torch.testing.assert_close(grad, alone[name], atol=1e-4, rtol=1e-4)


def test_stages_behind_the_one_that_is_read_are_not_built(tmp_path: Path) -> None:
    saved(tmp_path)
    encoder = loaded(tmp_path, depth=1)
    assert len(encoder.blocks()) == 3
    assert not any("layer_norm" in name and "stages" not in name for name in encoder.state_dict())
    alone = DINOv3ConvNeXt(**encoder.standalone({"name": str(tmp_path), "depth": 1})).eval()
    alone.load_state_dict(encoder.state_dict())
    shown = Images.pack(pictures(SIZES))
    torch.testing.assert_close(alone(shown).features, encoder(shown).features)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({}, "give DINOv3ConvNeXt either a name or a config"),
        ({"config": {"model_type": "dinov3_vit"}}, "DINOv3ConvNeXt knows dinov3_convnext; 'dinov3_vit' is not one"),
        ({"config": CONFIG, "depth": 4}, "DINOv3ConvNeXt: depth 4 is none of the 4 stages of this config"),
        ({"config": CONFIG, "depth": -5}, "DINOv3ConvNeXt: depth -5 is none of the 4 stages of this config"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        DINOv3ConvNeXt(**arguments)


def test_sides_that_are_no_multiple_are_refused_with_the_transforms_to_use() -> None:
    with pytest.raises(ValueError, match=r"multiples of 32 pixels, found \[\(32, 48\)\]; use data.transform"):
        DINOv3ConvNeXt(config=CONFIG)(Images.pack(pictures([(32, 48)])))
