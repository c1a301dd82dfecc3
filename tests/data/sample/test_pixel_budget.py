"""NativeArea and PatchBudget against the image processors of Qwen2-VL and SigLIP 2."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from transformers import Qwen2VLImageProcessor, Siglip2ImageProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize
from transformers.models.siglip2.image_processing_siglip2 import get_image_size_for_max_num_patches

from lit_vlm.core.batch import PixelSpec
from lit_vlm.data import NativeArea, PatchBudget
from lit_vlm.data.sample.transforms import ImageTransform

HALF = (0.5, 0.5, 0.5)
SIZES = [(28, 28), (1, 1), (14, 14), (42, 42), (13, 2000), (1000, 6), (4000, 3000), (56, 56), (36, 37)]


def random_sizes(count: int) -> list[tuple[int, int]]:
    """(width, height) of pictures, small ones as often as large ones, strips up to 1 : 200."""
    draw = np.random.default_rng(0)
    sizes = np.exp(draw.uniform(0, np.log(5000), (count * 2, 2))).astype(int).clip(1)
    return [(int(w), int(h)) for w, h in sizes if max(w, h) <= 200 * min(w, h)][:count]


@pytest.mark.parametrize(
    ("multiple", "least", "most"),
    [(28, 56 * 56, 1280 * 28 * 28), (28, 56 * 56, 12_845_056), (32, 65_536, 16_777_216), (32, 4 * 1024, 20 * 1024)],
)
def test_native_area_gives_the_sizes_of_qwen2_vl(multiple: int, least: int, most: int) -> None:
    transform, pixels = NativeArea(least, most), PixelSpec(None, multiple, HALF)
    drawn = random_sizes(300)
    assert len(drawn) == 300
    for width, height in drawn:
        expected = smart_resize(height, width, multiple, least, most)
        assert transform.size((width, height), pixels) == expected[::-1], (width, height)


def test_the_defaults_are_those_of_the_processor() -> None:
    own, theirs = NativeArea(), Qwen2VLImageProcessor().size
    assert (own.min_pixels, own.max_pixels) == (theirs["shortest_edge"], theirs["longest_edge"])
    assert PatchBudget().patches == Siglip2ImageProcessor().max_num_patches


@pytest.mark.parametrize(("multiple", "patches"), [(16, 256), (16, 1024), (14, 7), (16, 1)])
def test_patch_budget_gives_the_sizes_of_siglip_2(multiple: int, patches: int) -> None:
    transform, pixels = PatchBudget(patches), PixelSpec(None, multiple, HALF)
    for width, height in [*random_sizes(300), *SIZES]:
        expected = get_image_size_for_max_num_patches(height, width, multiple, patches)
        assert transform.size((width, height), pixels) == expected[::-1], (width, height)


def test_the_two_rules_differ_also_where_both_have_the_same_budget() -> None:
    """So neither can stand for the other: one rounds down within its budget, the other up."""
    pixels = PixelSpec(None, 16, HALF)
    area, patches = NativeArea(256 * 256, 256 * 256), PatchBudget(256)
    other = [size for size in random_sizes(300) if area.size(size, pixels) != patches.size(size, pixels)]
    assert len(other) > 100


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_native_area_stays_in_its_range_but_for_strips(size: tuple[int, int]) -> None:
    transform = NativeArea(56 * 56, 200 * 28 * 28)
    _, height, width = transform(PILImage.new("RGB", size), PixelSpec(None, 28, HALF)).shape
    assert width % 28 == height % 28 == 0
    assert width * height >= 56 * 56
    assert width * height <= transform.max_pixels or min(width, height) == 28


def test_a_picture_of_fitting_size_is_left_alone() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (56, 84, 3), dtype=np.uint8)
    made = NativeArea()(PILImage.fromarray(noise), PixelSpec(None, 28, HALF))
    assert torch.equal(made, torch.from_numpy(noise).permute(2, 0, 1))


@pytest.mark.parametrize("transform", [NativeArea(), PatchBudget()], ids=lambda t: type(t).__name__)
def test_an_encoder_of_one_size_is_refused(transform: ImageTransform) -> None:
    with pytest.raises(ValueError, match=f"{type(transform).__name__} needs an encoder of any size, .* takes 28"):
        transform(PILImage.new("RGB", (8, 8)), PixelSpec(28, 7, HALF))
    assert not transform.fixed(PixelSpec(None, 7, HALF))


@pytest.mark.parametrize(("least", "most"), [(0, 10), (11, 10), (-1, 1)])
def test_an_empty_range_is_refused(least: int, most: int) -> None:
    with pytest.raises(ValueError, match=f"NativeArea: min_pixels {least} must be at least 1, and at most .* {most}"):
        NativeArea(least, most)


def test_no_patch_is_refused() -> None:
    with pytest.raises(ValueError, match="PatchBudget: patches 0 must be at least 1"):
        PatchBudget(0)
