"""`python -m tests.encoders.families`: what works with which family of encoders, the table of docs/encoders.md.

Each cell is a comparison of a tiny model with random weights; `tests/encoders/test_families.py` runs them all again.
"""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_vlm.core.batch import Images
from lit_vlm.core.flops import executed
from lit_vlm.core.part import load_state
from lit_vlm.encoders import (
    S2,
    ConvPatches,
    DINOv3ConvNeXt,
    Encoder,
    Ensemble,
    EvePatchEmbedding,
    EveV2PatchEmbedding,
    HFEncoder,
    LinearPatches,
    MoonViT,
    NaFlexEncoder,
    QwenEncoder,
    TimmEncoder,
)
from lit_vlm.hf.export import export_hf
from lit_vlm.testing import Case, check_sharded
from lit_vlm.testing.tiny import random_images
from lit_vlm.training.step_flops import _Seeing
from tests.encoders import references
from tests.encoders.references import Reference

YES, NO, ABSENT = "yes", "refused", "–"
TOLERANCE = 2e-5
HF = references.HF_SIZES
SQUARE = partial(HFEncoder, config={"model_type": "clip_vision_model", **HF})
OTHER = partial(HFEncoder, config={"model_type": "siglip_vision_model", **HF})
VITS = {name: partial(HFEncoder, config={"model_type": kind, **HF}) for name, kind in references.HF_TYPES.items()}
FAMILIES: dict[str, partial[Encoder]] = {
    **VITS,
    # With registers, as published: torch's FSDP2 does not shard the empty tensor of none.
    "DINOv3 ViT": partial(HFEncoder, config={"model_type": "dinov3_vit", "num_register_tokens": 4, **HF}),
    "SigLIP 2 NaFlex": partial(NaFlexEncoder, config=references.NAFLEX),
    "Qwen2.5-VL": partial(QwenEncoder, config={"model_type": "qwen2_5_vl_vision", **references.QWEN2_5}),
    "Qwen3-VL": partial(QwenEncoder, config={"model_type": "qwen3_vl_vision", **references.QWEN3}),
    "Qwen3-VL MoE": partial(QwenEncoder, config={"model_type": "qwen3_vl_moe_vision", **references.QWEN3}),
    "MoonViT": partial(MoonViT, config=references.MOONVIT),
    "DINOv3 ConvNeXt": partial(DINOv3ConvNeXt, config=references.CONVNEXT),
    "timm ViT": partial(TimmEncoder, name="test_vit", pretrained=None),
    "timm ViT, register token": partial(TimmEncoder, name="test_vit3", pretrained=None),
    "timm ConvNeXt": partial(TimmEncoder, name="test_convnext", pretrained=None, image_size=64),
    "EVE patch embedding": partial(EvePatchEmbedding, width=16, patch=4, num_heads=2),
    "EVEv2 patch embedding": partial(EveV2PatchEmbedding, width=64, hidden=8, patch=4),
    "linear patches": partial(LinearPatches, width=32, patch=8),
    "conv patches": partial(ConvPatches, width=32, image_size=28, patch=7),
    "S2 of CLIP": partial(S2, encoder=SQUARE),
    "ensemble of CLIP and SigLIP": partial(Ensemble, encoders=[SQUARE, OTHER]),
}
"""Family → a tiny encoder of it, and its arguments."""
SAVED: dict[str, Callable[[Path], Reference]] = references.SAVED
"""Family of transformers or timm → what saves a tiny model of it, and what that model makes of a picture."""


def encoder_of(family: str, **settings: Any) -> Encoder:
    """A tiny encoder of a family in eval mode, with some arguments in place of its own."""
    torch.manual_seed(0)
    return FAMILIES[family](**settings).eval()


def sizes_of(encoder: Encoder) -> list[tuple[int, int]]:
    """(height, width) of pictures of several sizes, or of two squares where the encoder takes one size."""
    if encoder.pixels.size is not None:
        return [(encoder.pixels.size,) * 2] * 2
    step = encoder.pixels.multiple
    return [(2 * step, 4 * step), (4 * step, 2 * step), (2 * step, 2 * step)]


def alone(encoder: Encoder, images: Images) -> Tensor:
    """Features of pictures that are encoded one by one."""
    parts = images.pixels.split([3 * height * width for height, width in images.sizes])
    return torch.cat([encoder(Images(part, (size,))).features for part, size in zip(parts, images.sizes, strict=True)])


@torch.no_grad()
def published(family: str) -> str:
    """Whether features are those of the library's own model, whose files are read, one picture after the other."""
    if family not in SAVED:
        return ABSENT
    with tempfile.TemporaryDirectory() as folder:
        library, named, expected = SAVED[family](Path(folder))
        encoder = named().eval()
        load_state(encoder, encoder.pretrained_state() or {}, "encoder")
        images = random_images(sizes_of(encoder))
        found = encoder(images)
        for part, (_, picture) in zip(_parts(found.features, found.grids), _pictures(images), strict=True):
            assert_close(part, expected(encoder, picture), family)
    return library


def weights(family: str) -> str:
    """Whether all weights are those of the library's files, and files that lack one are refused."""
    if family not in SAVED:
        return ABSENT
    with tempfile.TemporaryDirectory() as folder:
        _, named, _ = SAVED[family](Path(folder))
        encoder = named()
        state = encoder.pretrained_state()
        assert state is not None
        load_state(encoder, state, "encoder")
        file = Path(folder) / "model.safetensors"
        saved = load_file(file)
        key, value = next((key, value) for key, value in reversed(state.items()) if value.ndim > 1)
        lost = [name for name, other in saved.items() if torch.equal(other, value)]
        assert len(lost) == 1, f"{family} {key}: {lost}"
        assert all(any(torch.equal(own, other) for other in saved.values()) for own in state.values()), family
        save_file({name: v for name, v in saved.items() if name != lost[0]}, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match="no"):
            encoder.pretrained_state()
    return YES


@torch.no_grad()
def any_size(family: str) -> str:
    """Whether a picture that is no square is taken as it is."""
    encoder = encoder_of(family)
    step = encoder.pixels.multiple
    size = (2 * step, 6 * step)
    try:
        found = encoder(random_images([size]))
    except ValueError:
        assert encoder.pixels.size is not None
        return ABSENT
    assert encoder.pixels.size is None
    assert found.grids == (encoder.patch_grid(*size),)
    return YES


@torch.no_grad()
def mixed(family: str) -> str:
    """Whether a picture has the features that it has alone among pictures of other sizes."""
    encoder = encoder_of(family)
    if encoder.pixels.size is not None:
        return ABSENT
    images = random_images(sizes_of(encoder))
    assert len(set(images.sizes)) > 1
    assert_close(encoder(images).features, alone(encoder, images), f"{family} mixed")
    return YES


@torch.no_grad()
def layers(family: str) -> str:
    """Whether several layers, side by side and summed, are those that are read one by one."""
    arguments = inspect.signature(FAMILIES[family].func).parameters
    key = next((key for key in ("layer", "depth") if key in arguments and "list" in arguments[key].annotation), None)
    if key is None:
        return ABSENT
    try:
        encoder = encoder_of(family, **{key: [2, 1]})
    except ValueError:
        return NO
    images = random_images(sizes_of(encoder))
    single = []
    for one in (2, 1):
        part = encoder_of(family, **{key: one})
        part.load_state_dict({name: encoder.state_dict()[name] for name in part.state_dict()})
        single.append(part(images).features)
    assert_close(encoder(images).features, torch.cat(single, -1), f"{family} layers")
    summed = encoder_of(family, **{key: [2, 1], "merge": "sum"})
    summed.load_state_dict(encoder.state_dict())
    assert_close(summed(images).features, torch.stack(single).sum(0), f"{family} sum of layers")
    return YES


@torch.no_grad()
def tiles(family: str) -> str:
    """Whether a column of squares is its squares one after the other."""
    encoder = encoder_of(family)
    side = encoder.pixels.size
    if side is None:
        return ABSENT
    squares = random_images([(side, side)] * 3)
    _, second, third = (picture for _, picture in _pictures(squares))
    column = Images.pack([torch.cat([second, third], 1)])
    try:
        found = encoder(column)
    except ValueError:
        return NO
    assert_close(found.features, alone(encoder, Images.pack([second, third])), f"{family} tiles")
    return YES


def flops(family: str) -> str:
    """Whether the operations that are counted for one picture of each size are those that run, backward included."""
    encoder = encoder_of(family)
    counted = _Seeing(encoder_of(family), encoder)
    for size in sizes_of(encoder):
        found, ran = counted([size]), executed(partial(_features, encoder, random_images([size])))
        assert found == pytest.approx(ran, rel=0.01), f"{family} {size}"
    return YES


def _features(encoder: Encoder, images: Images) -> Tensor:
    return encoder(images).features


def exported(family: str) -> str:
    """Whether `--format hf` gives a model that is the same in transformers."""
    from tests.exports import read

    # EVEv2's recipe has a transform that keeps the shape of pictures, LLaVA's one that makes squares.
    recipe = "llava15" if encoder_of(family).pixels.size is not None else "eve_v2"
    projector = {"class_path": "lit_vlm.projectors.Linear", "init_args": {}}
    module, config, written = read(recipe, encoder=_config(FAMILIES[family]), projector=projector)
    with tempfile.TemporaryDirectory() as folder:
        found = export_hf(module.vlm, config, written, module.input_spec, Path(folder) / "out")
    assert found.logits <= TOLERANCE
    assert found.gradients is None or found.gradients <= TOLERANCE
    return YES


def _config(value: Any) -> Any:
    """A factory as a config file writes it."""
    if isinstance(value, partial):
        arguments = {key: _config(one) for key, one in value.keywords.items()}
        return {"class_path": f"lit_vlm.encoders.{value.func.__name__}", "init_args": arguments}  # type: ignore[attr-defined]
    return [_config(one) for one in value] if isinstance(value, list) else value


def sharded() -> set[str]:
    """The families that two sharded processes, of which one has no picture, train as one process does."""
    check_sharded({family: Case({"encoder": factory}, sizes_of(factory())) for family, factory in FAMILIES.items()})
    return set(FAMILIES)


def _pictures(images: Images) -> list[tuple[tuple[int, int], Tensor]]:
    parts = images.pixels.split([3 * height * width for height, width in images.sizes])
    return [(size, part.view(3, *size)) for size, part in zip(images.sizes, parts, strict=True)]


def _parts(features: Tensor, grids: Sequence[Any]) -> Sequence[Tensor]:
    return features.split([grid.num_tokens for grid in grids])


def assert_close(found: Tensor, expected: Tensor, what: str) -> None:
    """Compare to a tolerance that is relative to the largest value."""
    assert found.shape == expected.shape, f"{what}: {tuple(found.shape)}, expected {tuple(expected.shape)}"
    difference = float((found - expected).abs().max())
    assert difference <= TOLERANCE * max(1.0, float(expected.abs().max())), f"{what}: {difference:.1e}"


CHECKS: dict[str, Callable[[str], str]] = {
    "equal to": published,
    "weights by name": weights,
    "any size": any_size,
    "sizes mixed": mixed,
    "several layers": layers,
    "tiles": tiles,
    "FLOPs": flops,
    "export": exported,
}
"""Column → the comparison behind it."""


def row(family: str) -> list[str]:
    """The cells of a family, but for sharding."""
    return [check(family) for check in CHECKS.values()]


def main() -> None:
    """Print the table."""
    agree = sharded()
    show = Console(width=200, highlight=False).print
    show("| family | class | " + " | ".join([*CHECKS, "FSDP2"]) + " |")
    show("|---" * (len(CHECKS) + 3) + "|")
    for family, factory in FAMILIES.items():
        kind = f"`{factory.func.__name__}`"  # type: ignore[attr-defined]
        show(f"| {family} | {kind} | " + " | ".join([*row(family), YES if family in agree else NO]) + " |")


if __name__ == "__main__":
    main()
