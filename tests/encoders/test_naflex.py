"""NaFlexEncoder against transformers' own model and image processor."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import Siglip2ImageProcessor, Siglip2VisionModel

from lit_vlm.core.batch import Grid, Images
from lit_vlm.core.part import load_state
from lit_vlm.encoders import NaFlexEncoder
from lit_vlm.testing import check_encoder

CONFIG: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "patch_size": 4,
    "num_patches": 16,
}
SIZES = [(16, 16), (8, 28), (4, 4), (20, 12), (8, 28)]


def pictures(sizes: list[tuple[int, int]]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8) for size in sizes]


def saved(folder: Path) -> Siglip2VisionModel:
    torch.manual_seed(0)
    model = Siglip2VisionModel(transformers.AutoConfig.for_model("siglip2_vision_model", **CONFIG)).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model


def loaded(folder: Path, **settings: Any) -> NaFlexEncoder:
    encoder = NaFlexEncoder(str(folder), **settings).eval()
    load_state(encoder, encoder.pretrained_state() or {}, "encoder")
    return encoder


@pytest.mark.parametrize("layer", [-1, -2, 0, [1, -1]])
def test_features_are_those_of_transformers_on_its_own_inputs(layer: int | list[int], tmp_path: Path) -> None:
    model = saved(tmp_path)
    processor = Siglip2ImageProcessor(patch_size=4, do_resize=False)
    encoder = loaded(tmp_path, layer=layer)
    shown = pictures(SIZES)
    result = encoder(Images.pack(shown))
    assert result.grids == tuple(Grid(height // 4, width // 4) for height, width in SIZES)
    start = 0
    for picture, grid in zip(shown, result.grids, strict=True):
        # On its own, so that nothing of other pictures or of padding can have come in.
        patches = processor(images=[picture], max_num_patches=grid.num_tokens, return_tensors="pt")
        assert patches["spatial_shapes"].tolist() == [[grid.rows, grid.cols]]
        with torch.no_grad():
            states = model(**patches, output_hidden_states=True).hidden_states
        expected = torch.cat([states[one][0] for one in (layer if isinstance(layer, list) else [layer])], -1)
        torch.testing.assert_close(result.features[start : start + grid.num_tokens], expected, atol=1e-5, rtol=1e-4)
        start += grid.num_tokens
    assert start == len(result.features)


def test_a_picture_has_the_same_tokens_in_any_company() -> None:
    torch.manual_seed(0)
    encoder = NaFlexEncoder(config=CONFIG).eval()
    first, second = pictures([(8, 12), (28, 28)])
    alone, together = encoder(Images.pack([first])), encoder(Images.pack([second, first]))
    torch.testing.assert_close(together.features[49:], alone.features)


def test_it_keeps_the_contract() -> None:
    check_encoder(partial(NaFlexEncoder, config=CONFIG))


def test_blocks_behind_the_last_that_is_read_are_not_built(tmp_path: Path) -> None:
    saved(tmp_path)
    encoder = loaded(tmp_path, layer=-2)
    assert len(encoder.blocks()) == 2
    assert not any("head" in name or "post_layernorm" in name for name in encoder.state_dict())
    alone = NaFlexEncoder(**encoder.standalone({"name": str(tmp_path), "layer": -2}))
    alone.load_state_dict(encoder.state_dict())
    assert alone.name is None


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({}, "give NaFlexEncoder either a name or a config"),
        ({"config": {"model_type": "siglip_vision_model"}}, "NaFlexEncoder knows siglip2_vision_model; 'siglip_vision"),
        ({"config": CONFIG, "layer": 9}, "layer 9 is not one of the 4 hidden states"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        NaFlexEncoder(**arguments)


def test_sides_that_are_no_multiple_are_refused_with_the_transforms_to_use() -> None:
    with pytest.raises(ValueError, match=r"multiples of 4 pixels, found \[\(16, 10\)\]; use data.transform NativeArea"):
        NaFlexEncoder(config=CONFIG)(Images.pack(pictures([(16, 16), (16, 10)])))
