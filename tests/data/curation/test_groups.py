"""Hashes, indices and groups against comparisons of all with all."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image as PILImage
from PIL import ImageEnhance

from lit_vlm.data.curation import neighbours
from lit_vlm.data.curation.groups import equal_groups, near_groups, repeated
from lit_vlm.data.curation.hashes import content_hash, perceptual_hash, pixel_hash
from lit_vlm.data.curation.neighbours import CosineIndex, HammingIndex, best_bands, hamming
from lit_vlm.data.curation.same_pictures import near_codes

RADII = [(64, 0), (64, 3), (64, 6), (64, 13), (256, 12), (256, 31)]


def codes_near_each_other(count: int, bits: int, seed: int = 0) -> NDArray[np.uint8]:
    """Codes of which many lie within some bits of an earlier one."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 2, (count, bits), dtype=np.uint8)
    for row in range(1, count):
        if rng.random() < 0.6:
            codes[row] = codes[rng.integers(row)]
            codes[row, rng.choice(bits, rng.integers(0, bits // 4), replace=False)] ^= 1
    return np.packbits(codes, axis=1)


def greedy(near: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Whether each row is near to an earlier leader, one by one: -1 where it leads."""
    leaders: list[int] = []
    led = np.full(len(near), -1)
    for row in range(len(near)):
        if any(near[row, leader] for leader in leaders):
            led[row] = 0
        else:
            leaders.append(row)
    return led


def test_hamming_distances_are_those_of_the_bits() -> None:
    codes = codes_near_each_other(50, 64)
    bits = np.unpackbits(codes, axis=1)
    np.testing.assert_array_equal(hamming(codes, codes[:7]), (bits[:, None] != bits[None, :7]).sum(-1))


@pytest.mark.parametrize(("bits", "radius"), RADII)
@pytest.mark.parametrize("expected", [400, 10**9])
def test_hamming_index_finds_every_code_within_the_radius(bits: int, radius: int, expected: int) -> None:
    codes = codes_near_each_other(700, bits)
    added, asked = codes[:400], codes[400:]
    index = HammingIndex(bits, radius, expected)
    index.add(added[:150])
    index.add(added[150:])
    distances = hamming(asked, added)
    queries, numbers = index.within(asked)
    wanted = np.argwhere(distances <= radius)
    np.testing.assert_array_equal(np.stack([queries, numbers], 1), wanted)
    found = index.nearest(asked)
    near = distances.min(1) <= radius
    np.testing.assert_array_equal(found >= 0, near)
    np.testing.assert_array_equal(distances[near, found[near]], distances.min(1)[near])


def test_bands_save_comparisons_and_are_left_out_where_they_save_none() -> None:
    assert best_bands(64, 4, 20) == 0
    assert best_bands(64, 4, 10**6) > 0
    assert best_bands(64, 30, 10**9) == 0  # every band would differ in more bits than can be tried


@pytest.mark.parametrize(("bits", "radius"), RADII)
def test_groups_of_codes_are_those_of_a_greedy_pass(monkeypatch: pytest.MonkeyPatch, bits: int, radius: int) -> None:
    monkeypatch.setattr("lit_vlm.data.curation.groups.CHUNK", 64)
    codes = codes_near_each_other(500, bits, seed=radius)
    codes = np.concatenate([codes, codes[100:200]])
    groups, distances = near_codes(codes, radius), hamming(codes, codes)
    alone = greedy(distances <= radius)
    rows = np.arange(len(codes))
    np.testing.assert_array_equal(groups == rows, alone == -1)
    assert (groups <= rows).all()
    assert (groups[groups] == groups).all()
    assert (distances[rows, groups] <= radius).all()
    assert 0 < (alone == -1).sum() < 490


def vectors_near_each_other(count: int, width: int = 16) -> NDArray[np.float32]:
    rng = np.random.default_rng(3)
    vectors = rng.normal(size=(count, width))
    for row in range(1, count):
        if rng.random() < 0.6:
            vectors[row] = vectors[rng.integers(row)] + rng.uniform(0, 0.3) * rng.normal(size=width)
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def test_groups_of_vectors_are_those_of_a_greedy_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_vlm.data.curation.groups.CHUNK", 50)
    vectors = vectors_near_each_other(600)
    cosines = vectors @ vectors.T
    near = np.sort(cosines[(cosines > 0.96) & (cosines < 0.98)])
    widest = np.diff(near).argmax()  # between two cosines, so that rounding decides nothing
    threshold = float(near[widest : widest + 2].mean())
    groups = near_groups([vectors[:10], vectors[10:]], CosineIndex(16, threshold))
    np.testing.assert_array_equal(groups == np.arange(600), greedy(cosines >= threshold) == -1)
    assert (cosines[np.arange(600), groups] >= threshold).all()
    queries, numbers = _added(vectors[:200], threshold).within(vectors[200:])
    np.testing.assert_array_equal(np.stack([queries, numbers], 1), np.argwhere(cosines[200:, :200] >= threshold))


def _added(vectors: NDArray[np.float32], threshold: float) -> CosineIndex:
    index = CosineIndex(vectors.shape[1], threshold)
    index.add(vectors)
    return index


def test_cells_find_nearly_all_neighbours_and_nothing_else() -> None:
    vectors = vectors_near_each_other(3000)
    exact = near_groups([vectors], CosineIndex(16, 0.97))
    cells = near_groups([vectors], CosineIndex(16, 0.97, vectors, cells=32, probes=6))
    assert ((vectors * vectors[cells]).sum(1) >= 0.97 - 1e-6).all()
    repeats = exact != np.arange(3000)
    assert (cells[repeats] != np.flatnonzero(repeats)).mean() > 0.95
    every = near_groups([vectors], CosineIndex(16, 0.97, vectors, cells=32, probes=32))
    np.testing.assert_array_equal(every == np.arange(3000), exact == np.arange(3000))


def test_rows_that_are_equal_lead_to_the_first() -> None:
    codes = np.array([[1, 2], [3, 4], [1, 2], [3, 5], [3, 4]], np.uint8)
    assert equal_groups(codes).tolist() == [0, 1, 0, 3, 1]
    assert equal_groups(codes[:0]).tolist() == []
    assert near_codes(codes[:0].repeat(4, 1), 3).tolist() == []


def shown_before(groups: list[list[int]]) -> list[int]:
    first: dict[int, int] = {}
    found = []
    for number, own in enumerate(groups):
        gone = bool(own) and set(own) <= set(first)
        found.append(first[own[0]] if gone else number)
        for group in [] if gone else own:
            first.setdefault(group, number)
    return found


@pytest.mark.parametrize("most", [1, 3])
def test_records_with_nothing_new_repeat_the_first_that_shows_it(most: int) -> None:
    rng = np.random.default_rng(most)
    groups = [rng.integers(0, 30, rng.integers(0, most + 1)).tolist() for _ in range(80)]
    flat = np.array([group for own in groups for group in own], np.int64)
    owners = np.repeat(np.arange(80), [len(own) for own in groups])
    found = repeated(flat, owners, 80)
    assert found.tolist() == shown_before(groups)
    assert 0 < (found != np.arange(80)).sum() < 80
    assert repeated(flat[:0], owners[:0], 3).tolist() == [0, 1, 2]


def picture(seed: int, size: tuple[int, int] = (160, 120)) -> PILImage.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return PILImage.fromarray(noise).resize(size, PILImage.Resampling.BICUBIC)


def encoded(image: PILImage.Image, quality: int) -> PILImage.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return PILImage.open(io.BytesIO(buffer.getvalue()))


@pytest.mark.parametrize("bits", [64, 144, 256])
def test_perceptual_hashes_stay_when_a_picture_is_encoded_anew(bits: int) -> None:
    own = np.stack([perceptual_hash(picture(seed), bits) for seed in range(20)])
    assert own.shape == (20, bits // 8)
    for change in (
        lambda image: encoded(image, 60),
        lambda image: image.resize((93, 71), PILImage.Resampling.BILINEAR),
        lambda image: ImageEnhance.Brightness(image).enhance(0.85),
        lambda image: image.convert("L"),
    ):
        changed = np.stack([perceptual_hash(change(picture(seed)), bits) for seed in range(20)])
        assert hamming(own, changed).diagonal().max() <= bits // 8
    others = hamming(own, own)[~np.eye(20, dtype=bool)]
    assert others.min() > bits // 4
    np.testing.assert_array_equal(np.unpackbits(own, axis=1).sum(1), bits // 2)


def test_pictures_without_anything_in_them_have_one_hash() -> None:
    hashes = {perceptual_hash(PILImage.new("RGB", (50, 40), colour)).tobytes() for colour in ("white", "red", "black")}
    assert hashes == {bytes(8)}


def test_exact_hashes_tell_bytes_and_pixels_apart() -> None:
    image, flipped = picture(0), picture(0).resize((120, 160))
    as_png, smaller = io.BytesIO(), io.BytesIO()
    image.save(as_png, "PNG", compress_level=1)
    image.save(smaller, "PNG", compress_level=9)
    assert content_hash(as_png.getvalue()).tobytes() != content_hash(smaller.getvalue()).tobytes()
    again = [pixel_hash(PILImage.open(io.BytesIO(file.getvalue()))).tobytes() for file in (as_png, smaller)]
    assert again == [pixel_hash(image).tobytes()] * 2
    assert pixel_hash(flipped).tobytes() != again[0]
    stripes = PILImage.fromarray(np.zeros((2, 8, 3), np.uint8)), PILImage.fromarray(np.zeros((4, 4, 3), np.uint8))
    assert pixel_hash(stripes[0]).tobytes() != pixel_hash(stripes[1]).tobytes()


def test_without_faiss_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ValueError, match=r"pip install 'lit-vlm\[curation\]'"):
        neighbours.faiss_module()
