"""Decoding pictures, and resizing them."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from PIL.PngImagePlugin import PngInfo
from torch.utils._python_dispatch import TorchDispatchMode

from lit_vlm.core.batch import PixelSpec
from lit_vlm.data.records import MAX_SIDE, Image, RecordError, image_size, open_image
from lit_vlm.data.sample.any_res import AnyRes
from lit_vlm.data.sample.tiles import Tiles
from lit_vlm.data.sample.transforms import AreaLimit, AspectGrid, ImageTransform, Native, PadSquare, Resize, SquareCrop
from lit_vlm.data.sources.base import describe
from lit_vlm.encoders import PatchGrid
from tests.tiny import ROOT

SQUARE = PixelSpec(28, 7, (0.48, 0.45, 0.4))
ANY = PixelSpec(None, 8, (0.5, 0.5, 0.5))


def encoded(image: PILImage.Image, form: str = "PNG", **options: object) -> Image:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return Image(data=buffer.getvalue())


def colour_of(image: Image) -> tuple[int, ...]:
    opened = open_image(image, Path("/nowhere"))
    assert opened.mode == "RGB"
    pixel = opened.getpixel((0, 0))
    assert isinstance(pixel, tuple)
    return pixel


# ----- open_image -----


def test_transparent_becomes_white_and_opaque_stays() -> None:
    picture = PILImage.new("RGBA", (4, 4), (200, 10, 20, 0))
    assert colour_of(encoded(picture)) == (255, 255, 255)
    assert colour_of(encoded(PILImage.new("RGBA", (4, 4), (200, 10, 20, 255)))) == (200, 10, 20)
    half = colour_of(encoded(PILImage.new("RGBA", (4, 4), (0, 0, 0, 128))))
    assert half == pytest.approx((127, 127, 127), abs=1)


def test_grey_with_alpha_becomes_white() -> None:
    assert colour_of(encoded(PILImage.new("LA", (4, 4), (7, 0)))) == (255, 255, 255)


@pytest.mark.parametrize("form", ["PNG", "GIF"])
def test_palette_with_transparency(form: str) -> None:
    picture = PILImage.new("P", (4, 4), 0)
    picture.putpalette([255, 0, 0, 0, 0, 255] + [0] * 762)
    picture.putpixel((3, 3), 1)
    image = encoded(picture, form, transparency=0)
    assert colour_of(image) == (255, 255, 255)
    assert open_image(image, Path("/nowhere")).getpixel((3, 3)) == (0, 0, 255)


@pytest.mark.parametrize(("mode", "colour"), [("L", 7), ("RGB", (1, 2, 3))])
def test_a_colour_that_stands_for_transparency_becomes_white(mode: str, colour: object) -> None:
    assert colour_of(encoded(PILImage.new(mode, (4, 4), colour), transparency=colour)) == (255, 255, 255)  # type: ignore[arg-type]


def test_cmyk() -> None:
    picture = PILImage.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert colour_of(encoded(picture, "JPEG", quality=95)) == pytest.approx((255, 0, 0), abs=12)


@pytest.mark.parametrize("picture", [PILImage.new("1", (4, 4), 1), PILImage.new("L", (4, 4), 255)], ids=["1", "L"])
def test_grey(picture: PILImage.Image) -> None:
    assert colour_of(encoded(picture)) == (255, 255, 255)


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
@pytest.mark.parametrize(("value", "expected"), [(0, 0), (32768, 128), (65535, 255), (2560, 10)])
def test_sixteen_bits_are_scaled_down(value: int, expected: int, form: str) -> None:
    picture = PILImage.fromarray(np.full((4, 4), value, dtype=np.uint16))
    assert picture.mode == "I;16"
    assert colour_of(encoded(picture, form)) == pytest.approx((expected,) * 3, abs=1)


def test_a_rotated_photo_stands_upright() -> None:
    exif = PILImage.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90° clockwise to see it upright
    picture = PILImage.new("RGB", (16, 8), "red")
    picture.paste("blue", (0, 0, 8, 8))
    image = open_image(encoded(picture, "JPEG", exif=exif, quality=95), Path("/nowhere"))
    assert image.size == (8, 16)
    assert image.getpixel((4, 2)) == pytest.approx((0, 0, 254), abs=6)
    assert image.getpixel((4, 13)) == pytest.approx((254, 0, 0), abs=6)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_truncated_file_is_corrupt(form: str, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    data = encoded(PILImage.fromarray(noise), form).data
    assert data is not None
    for length in (0, 3, 20, len(data) // 2, len(data) - 40):
        (tmp_path / "cut").write_bytes(data[:length])
        with pytest.raises(RecordError, match="corrupt_image: cut: "):
            open_image(Image(path="cut"), tmp_path)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.filterwarnings("ignore")
def test_damaged_bytes_give_a_picture_or_a_record_error(form: str) -> None:
    exif = PILImage.Exif()
    exif[0x0112] = 6
    noise = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    data = encoded(PILImage.fromarray(noise), form, exif=exif).data
    assert data is not None
    rng = random.Random(0)
    for _ in range(60):
        damaged = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(min(200, len(data)))] = rng.randrange(256)
        try:
            assert open_image(Image(data=bytes(damaged)), Path("/nowhere")).mode == "RGB"
        except RecordError as error:
            assert error.reason in ("corrupt_image", "too_large")  # noqa: PT017 - either outcome is right


def test_what_is_not_an_image_is_corrupt(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("<html>404</html>")
    with pytest.raises(RecordError, match=r"corrupt_image: a\.png: cannot identify"):
        open_image(Image(path="a.png"), tmp_path)
    with pytest.raises(RecordError, match="^corrupt_image: image bytes: cannot identify its format$"):
        open_image(Image(data=b"nothing"), tmp_path)


@pytest.mark.parametrize("path", ["a.png", "", "sub/a.png"])
def test_a_missing_image_is_named(path: str, tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=f"missing_image: {tmp_path / path} does not exist"):
        open_image(Image(path=path), tmp_path)


@pytest.mark.parametrize("path", ["a" * 300, "data:image/png;base64," + "A" * 5000, "a\0b"], ids=["long", "url", "nul"])
def test_a_path_that_no_file_can_have_is_a_bad_sample(path: str, tmp_path: Path) -> None:
    with pytest.raises(RecordError):
        open_image(Image(path=path), tmp_path)


@pytest.mark.parametrize("path", ["../a.png", "sub/../../a.png", "/etc/passwd"])
def test_a_path_outside_the_folder_is_refused(path: str, tmp_path: Path, png: Callable[..., bytes]) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    (tmp_path / "a.png").write_bytes(png())
    with pytest.raises(RecordError, match=r"outside_folder: .* leaves the image folder"):
        open_image(Image(path=path), folder)


def test_a_link_that_leaves_the_folder_is_refused(tmp_path: Path, png: Callable[..., bytes]) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    (tmp_path / "a.png").write_bytes(png())
    (folder / "link.png").symlink_to(tmp_path / "a.png")
    with pytest.raises(RecordError, match="outside_folder"):
        open_image(Image(path="link.png"), folder)


def test_a_path_in_the_folder_is_opened(tmp_path: Path, png: Callable[..., bytes]) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.png").write_bytes(png(6, 5))
    assert open_image(Image(path="sub/../sub/a.png"), tmp_path).size == (6, 5)
    assert open_image(Image(path=str(tmp_path / "sub" / "a.png")), tmp_path).size == (6, 5)


@pytest.mark.parametrize(
    "notes",
    [
        [(b"iCCP", b"profile\0\0" + zlib.compress(bytes(3 << 20)))],
        [(b"zTXt", b"prompt\0\0" + zlib.compress(bytes(3 << 20)))],
        [(b"iTXt", b"prompt\0\1\0en\0prompt\0" + zlib.compress(bytes(3 << 20)))],
        [(b"tEXt", b"prompt\0" + b"x" * (1 << 20))] * 70,
        [(b"iCCP", b"cut")],
        [(b"gAMA", b"")],
    ],
    ids=["profile", "packed text", "international text", "many texts", "cut profile", "cut note"],
)
@pytest.mark.parametrize("behind", [False, True], ids=["in front", "behind"])
def test_notes_in_a_png_do_not_cost_its_pixels(notes: list[tuple[bytes, bytes]], behind: bool, tmp_path: Path) -> None:
    picture = PILImage.fromarray(np.random.default_rng(0).integers(0, 255, (12, 20, 3), dtype=np.uint8))
    content = encoded(picture).data
    assert content is not None
    chunks = [struct.pack(">I", len(data)) + kind + data for kind, data in notes]
    written = b"".join(chunk + struct.pack(">I", zlib.crc32(chunk[4:])) for chunk in chunks)
    place = len(content) - 12 if behind else 33
    (tmp_path / "a.png").write_bytes(content[:place] + written + content[place:])
    assert image_size(Image(path="a.png"), tmp_path) == (20, 12)
    assert np.array_equal(np.asarray(open_image(Image(path="a.png"), tmp_path)), np.asarray(picture))


def test_a_damaged_png_with_notes_stays_corrupt() -> None:
    content = encoded(PILImage.new("RGB", (64, 64)), pnginfo=_note("x")).data
    assert content is not None
    damaged = content[:-30] + bytes([content[-30] ^ 255]) + content[-29:]
    with pytest.raises(RecordError, match="corrupt_image"):
        open_image(Image(data=damaged), Path("/nowhere"))


def _note(text: str) -> PngInfo:
    info = PngInfo()
    info.add_text("prompt", text)
    return info


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "exif",
    [b"garbage", b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0II*\0\x08\0\0\0" + b"\xff" * 60_000],
)
@pytest.mark.filterwarnings("ignore")
def test_damaged_exif_does_not_cost_the_pixels(exif: bytes, form: str) -> None:
    image = encoded(PILImage.new("RGB", (20, 12), "white"), form, exif=exif)
    assert image_size(image, Path("/nowhere")) == (20, 12)
    assert colour_of(image) == (255, 255, 255)


@pytest.mark.parametrize("form", ["GIF", "WEBP", "TIFF", "PNG", "MPO"])
def test_the_first_of_several_frames_is_taken(form: str) -> None:
    white, black = (PILImage.new("RGB", (16, 16), colour) for colour in ("white", "black"))
    assert colour_of(encoded(white, form, save_all=True, append_images=[black])) == (255, 255, 255)


def test_a_picture_with_a_side_beyond_the_limit_is_refused() -> None:
    image = encoded(PILImage.new("1", (MAX_SIDE + 1, 3), 1))
    with pytest.raises(RecordError, match=f"too_large.*{MAX_SIDE + 1}×3.*a side over {MAX_SIDE}"):
        open_image(image, Path("/nowhere"))
    with pytest.raises(RecordError, match="too_large"):
        image_size(image, Path("/nowhere"))


# ----- links -----


@pytest.fixture
def hub(tmp_path: Path, png: Callable[..., bytes]) -> Path:
    """A revision in the cache of the Hugging Face hub, with links to files of its own and of others."""
    for name in ("datasets--me--set", "datasets--you--set"):
        (tmp_path / name / "blobs").mkdir(parents=True)
        (tmp_path / name / "blobs" / "0aa").write_bytes(png(6, 5))
    folder = tmp_path / "datasets--me--set/snapshots/abc"
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "own.png").symlink_to("../../../blobs/0aa")
    (folder / "images" / "other.png").symlink_to(tmp_path / "datasets--you--set/blobs/0aa")
    return folder


def test_links_into_the_blobs_of_a_hub_cache_are_read(hub: Path, tmp_path: Path) -> None:
    assert open_image(Image(path="images/own.png"), hub).size == (6, 5)
    assert open_image(Image(path="own.png"), hub / "images").size == (6, 5)
    (tmp_path / "shortcut").symlink_to(hub)
    assert open_image(Image(path="images/own.png"), tmp_path / "shortcut").size == (6, 5)
    with pytest.raises(
        RecordError, match="outside_folder: images/other.png leaves .* by a link, to .*allow_links: true"
    ):
        open_image(Image(path="images/other.png"), hub)
    assert open_image(Image(path="images/other.png", links=True), hub).size == (6, 5)


def test_allowed_links_do_not_allow_a_path_that_leaves_the_folder(tmp_path: Path, png: Callable[..., bytes]) -> None:
    disk, folder = tmp_path / "disk/coco", tmp_path / "set"
    disk.mkdir(parents=True)
    folder.mkdir()
    for name in ("a.png", "../secret.png"):
        (disk / name).write_bytes(png(6, 5))
    (folder / "coco").symlink_to(disk)
    assert open_image(Image(path="coco/a.png", links=True), folder).size == (6, 5)
    with pytest.raises(RecordError, match="outside_folder.*allow_links"):
        open_image(Image(path="coco/a.png"), folder)
    for path in ("../disk/coco/a.png", str(disk / "a.png")):
        with pytest.raises(RecordError, match=r"outside_folder: .* leaves the image folder \S+; image_folder"):
            open_image(Image(path=path, links=True), folder)
    # Behind the link `..` would be the folder of the disk.
    with pytest.raises(RecordError, match="missing_image"):
        open_image(Image(path="coco/../secret.png", links=True), folder)


# ----- transforms -----

SHAPES = [(28, 28), (100, 40), (40, 100), (29, 28), (5, 200), (200, 5), (1, 1), (3, 90)]


@pytest.mark.parametrize("size", SHAPES, ids=str)
@pytest.mark.parametrize("transform", [SquareCrop(), PadSquare(), Resize()], ids=lambda t: type(t).__name__)
def test_square_transforms_give_the_size_of_the_encoder(transform: ImageTransform, size: tuple[int, int]) -> None:
    pixels = transform(PILImage.new("RGB", size, (9, 8, 7)), SQUARE)
    assert pixels.shape == (3, 28, 28)
    assert pixels.dtype == torch.uint8
    assert pixels.is_contiguous()


class _Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.found = max(self.found, made.numel() * made.element_size())
        return made


@pytest.mark.parametrize("size", [(12_000, 20), (20, 12_000), (90_000, 30), (30, 90_000), (1, 60_000)], ids=str)
@pytest.mark.parametrize(
    "transform",
    [SquareCrop(), PadSquare(), Resize(), Native(64), AspectGrid(56, 2), AreaLimit(64), Tiles(6), AnyRes()],
    ids=lambda t: type(t).__name__,
)
def test_no_transform_of_a_strip_takes_much_memory(transform: ImageTransform, size: tuple[int, int]) -> None:
    pixels = SQUARE if isinstance(transform, AnyRes | Tiles) or transform.fixed(SQUARE) else ANY
    with _Largest() as largest:
        made = transform(PILImage.new("RGB", size, (9, 8, 7)), pixels)
    assert made.dtype == torch.uint8
    assert largest.found < 20_000_000


@pytest.mark.parametrize(
    ("size", "within"), [((900, 40), 0), ((40, 900), 1), ((701, 700), 0), ((700, 701), 1)], ids=str
)
def test_a_strip_is_padded_as_any_picture(size: tuple[int, int], within: int) -> None:
    rng = np.random.default_rng(0)
    picture = PILImage.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))
    whole = PadSquare()(picture, SQUARE).int()
    strip = PadSquare()._resize_strip(torch.from_numpy(np.array(picture)).permute(2, 0, 1), (28, 28), SQUARE).int()
    assert (whole - strip).abs().max() <= within


def halves(width: int, height: int) -> PILImage.Image:
    """Left half red, right half blue."""
    picture = PILImage.new("RGB", (width, height), (255, 0, 0))
    picture.paste((0, 0, 255), (width // 2, 0, width, height))
    return picture


def test_square_crop_takes_the_middle() -> None:
    picture = PILImage.new("RGB", (84, 28), (255, 0, 0))
    picture.paste((0, 255, 0), (28, 0, 56, 28))
    assert (SquareCrop()(picture, SQUARE) == torch.tensor([0, 255, 0])[:, None, None]).all()


def test_square_crop_scales_the_shorter_side() -> None:
    pixels = SquareCrop()(halves(112, 56), SQUARE)
    assert pixels[0, 14, 2] == 255
    assert pixels[2, 14, 25] == 255


@pytest.mark.parametrize(("size", "axis"), [((56, 28), 1), ((28, 56), 2)])
def test_pad_square_fills_with_the_mean_and_keeps_the_aspect(size: tuple[int, int], axis: int) -> None:
    pixels = PadSquare()(PILImage.new("RGB", size, (255, 255, 255)), SQUARE)
    lines = pixels.movedim(axis, 1)  # [3, the padded axis, the other]
    mean = torch.tensor([int(channel * 255) for channel in SQUARE.mean], dtype=torch.uint8)
    for edge in (0, 27):
        assert torch.equal(lines[:, edge], mean[:, None].expand(3, 28))
    assert (lines[:, 10:18] == 255).all()
    assert (lines[:, 2] == lines[:, 25]).all()  # in the middle


def test_pad_square_uses_the_published_colour_of_clip() -> None:
    clip = PixelSpec(28, 14, (0.48145466, 0.4578275, 0.40821073))
    assert PadSquare()(PILImage.new("RGB", (1, 280)), clip)[:, 14, 0].tolist() == [122, 116, 104]


def test_pad_square_leaves_a_square_alone() -> None:
    picture = halves(28, 28)
    assert torch.equal(PadSquare()(picture, SQUARE), Resize()(picture, SQUARE))


def test_resize_keeps_all_of_the_picture() -> None:
    pixels = Resize()(halves(200, 10), SQUARE)
    assert pixels[0, :, 3].eq(255).all()
    assert pixels[2, :, 24].eq(255).all()


@pytest.mark.parametrize("longest", [8, 20, 64, 100])
@pytest.mark.parametrize("size", [*SHAPES, (1, 5000), (5000, 1), (64, 64), (65, 63), (1000, 999)], ids=str)
def test_native_sides_are_multiples_within_the_limit(size: tuple[int, int], longest: int) -> None:
    _, height, width = Native(longest)(PILImage.new("RGB", size), ANY).shape
    for side in (height, width):
        assert side % 8 == 0
        assert 8 <= side <= max(8, longest)


@pytest.mark.parametrize("size", [(64, 32), (640, 320), (24, 48), (200, 120), (300, 301)], ids=str)
def test_native_keeps_the_aspect_to_within_a_patch(size: tuple[int, int]) -> None:
    _, height, width = Native(96)(PILImage.new("RGB", size), ANY).shape
    scale = min(1, 96 / max(size))
    assert abs(width - size[0] * scale) < 8
    assert abs(height - size[1] * scale) < 8


def test_native_leaves_a_picture_of_fitting_size_alone() -> None:
    picture = halves(40, 24)
    expected = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    assert torch.equal(Native(96)(picture, ANY), expected)


def test_native_never_enlarges_beyond_the_next_multiple() -> None:
    assert Native(672)(PILImage.new("RGB", (9, 3)), ANY).shape == (3, 8, 16)


@pytest.mark.parametrize("transform", [SquareCrop(), PadSquare(), Resize()], ids=lambda t: type(t).__name__)
def test_square_transforms_refuse_an_encoder_of_any_size(transform: ImageTransform) -> None:
    with pytest.raises(ValueError, match=f"{type(transform).__name__} needs an encoder of one size.*use Native"):
        transform(PILImage.new("RGB", (8, 8)), ANY)


@pytest.mark.parametrize("kind", [SquareCrop, PadSquare, Resize])
def test_square_transforms_take_a_side_for_an_encoder_of_any_size(kind: type[SquareCrop | PadSquare | Resize]) -> None:
    picture = halves(40, 24)
    one_size = replace(ANY, size=32)
    for pixels in (ANY, one_size):
        assert torch.equal(kind(32)(picture, pixels), kind()(picture, one_size))
        assert kind(32).fixed(pixels)
        assert kind(32).scale((40, 24), pixels) == kind().scale((40, 24), one_size)
    assert describe(kind()) == describe(kind(None)) != describe(kind(32))
    with pytest.raises(ValueError, match=f"{kind.__name__}: side 33 is no multiple of the 8"):
        kind(33)(picture, ANY)


# ----- AspectGrid, AreaLimit -----

CLIP_336 = PixelSpec(336, 14, (0.48145466, 0.4578275, 0.40821073))
EVE = PixelSpec(None, 28, CLIP_336.mean)
GEOMETRY = torch.load(ROOT / "tests" / "fixtures" / "eve.pt", weights_only=True)["geometry"]


@pytest.mark.parametrize("row", GEOMETRY, ids=lambda row: f"{row['cfg']}-{row['W']}x{row['H']}")
def test_aspect_grid_gives_the_published_geometry(row: dict[str, Any]) -> None:
    transform = AspectGrid(int(row["cfg"]))
    width, height = transform.size((row["W"], row["H"]), EVE)
    left, top, pasted_width, pasted_height = row["box_xywh"]
    assert (width, height) == (pasted_width, pasted_height)
    grid = PatchGrid(28, prefix=1, row_end=1)(height, width)
    assert (grid.rows, grid.cols, grid.num_tokens) == (row["rows"], row["cols"], row["n_tokens"])
    # Where the teacher finds the picture on its square: the same place at its scale.
    picture = PILImage.new("RGB", (row["W"], row["H"]), (255, 255, 255))
    square = transform(picture, CLIP_336)
    inside = (square == 255).all(0)
    scale = int(row["cfg"]) // 336
    rows, cols = inside.any(1).nonzero().flatten().tolist(), inside.any(0).nonzero().flatten().tolist()
    assert (cols[0], rows[0]) == (left // scale, top // scale)
    assert (len(cols), len(rows)) == (pasted_width // scale, pasted_height // scale)
    assert square.shape == (3, 336, 336)
    assert square[:, ~inside].unique(dim=1).flatten().tolist() in ([], [122, 116, 104])


def test_aspect_grid_keeps_the_original_geometry_of_a_reduced_jpeg() -> None:
    reduced = PILImage.new("RGB", (167, 83))
    assert (
        AspectGrid(672)(reduced, EVE, (1333, 667)).shape == AspectGrid(672)(PILImage.new("RGB", (1333, 667)), EVE).shape
    )
    assert AspectGrid(672).scale((1333, 667), EVE) == pytest.approx(13 * 28 / 667)


def test_aspect_grid_names_sizes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="longest 100 does not divide into 24 cells"):
        AspectGrid(100)
    with pytest.raises(ValueError, match="336 pixels in 12 cells.*multiple of the 56"):
        AspectGrid(336, 12).size((10, 10), PixelSpec(None, 56, EVE.mean))
    with pytest.raises(ValueError, match="336 pixels in 10 cells are 33.6"):
        AspectGrid(560, 10).size((10, 10), CLIP_336)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((640, 480), (640, 480)),
        ((1600, 1200), (928, 704)),
        ((10, 3), (32, 32)),
        ((4000, 20), (4000, 32)),
        ((48, 80), (64, 64)),
    ],
)
def test_area_limit_shrinks_to_the_area_and_rounds(size: tuple[int, int], expected: tuple[int, int]) -> None:
    pixels = PixelSpec(None, 32, EVE.mean)
    _, height, width = AreaLimit(800)(PILImage.new("RGB", size), pixels).shape
    assert (width, height) == expected
