"""Bins: those of the plain algorithm, with and without a limit of images."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from tests.tiny import bins_of


def plain(lengths: Sequence[int], capacity: int, images: Sequence[int], max_images: int | None) -> list[list[int]]:
    """First-fit as books have it: the longest item goes into the first bin that takes it."""
    bins: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        for members in bins:
            long = sum(lengths[i] for i in members) + lengths[index]
            count = sum(images[i] for i in members) + images[index]
            if long <= capacity and (max_images is None or count <= max_images):
                members.append(index)
                break
        else:
            bins.append([index])
    return bins


@pytest.mark.parametrize("max_images", [None, 1, 3, 1000])
@pytest.mark.parametrize("seed", range(20))
def test_bins_are_those_of_the_plain_algorithm(seed: int, max_images: int | None) -> None:
    rng = random.Random(seed)
    capacity = rng.randint(5, 60)
    # Some items are empty, and some longer than a bin, as a sample may be that is cut only when it is read.
    lengths = [rng.randint(0, capacity + 3) for _ in range(rng.randint(0, 80))]
    images = [rng.choice([0, 0, 1, 2, 5]) for _ in lengths]
    assert bins_of(lengths, capacity, images, max_images) == plain(lengths, capacity, images, max_images)


@pytest.mark.parametrize("seed", range(20))
def test_packing_overfills_no_bin_and_loses_no_item(seed: int) -> None:
    rng = random.Random(seed)
    capacity = rng.randint(5, 60)
    lengths = [rng.randint(1, capacity) for _ in range(rng.randint(0, 40))]
    bins = bins_of(lengths, capacity)
    assert sorted(index for members in bins for index in members) == list(range(len(lengths)))
    fills = [sum(lengths[index] for index in members) for members in bins]
    assert all(fill <= capacity for fill in fills)
    assert sum(2 * fill <= capacity for fill in fills) <= 1  # two half-empty bins would have become one


def test_packing_by_hand() -> None:
    assert bins_of([4, 8, 1, 4, 2, 1], 10) == [[1, 4], [0, 3, 2, 5]]
    assert bins_of([3, 3, 3], 3) == [[0], [1], [2]]
    assert bins_of([], 3) == []


def test_an_item_with_too_many_images_has_a_bin_of_its_own() -> None:
    assert bins_of([5, 4, 3], 12, [1, 9, 1], 2) == [[0, 2], [1]]
