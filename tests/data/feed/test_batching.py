"""Batching: rows that hold what they should, full, balanced, and the same for every number of ranks."""

from __future__ import annotations

import random
from itertools import chain

import numpy as np
import pytest

from lit_vlm.data.feed.batching import (
    Batching,
    GlobalBatch,
    ModalityLength,
    Packed,
    Padded,
    deal_out,
    first_fit_decreasing,
)
from tests.data.made import Count, measures_of, plan_over

BATCHINGS: dict[str, Batching] = {
    "padded": Padded(),
    "modality": ModalityLength(),
    "packed": Packed(window=200),
    "packed few images": Packed(window=200, max_images=3),
}


def mixed(count: int, seed: int = 0, capacity: int = 2048) -> list[tuple[int, int]]:
    """Positions and images of samples, as in instruction data: many short, some long, a third without an image."""
    rng = random.Random(seed)
    sizes = []
    for _ in range(count):
        images = rng.choice([0, 1, 1])
        text = int(rng.lognormvariate(4.5, 1.0)) + 8
        sizes.append((min(capacity, text + images * 196), images))
    return sizes


def rows_of(name: str, count: int, layout: GlobalBatch, rank: int, epoch: int = 0) -> list[list[list[int]]]:
    plan = plan_over(
        [Count("n", count)], layout, rank, batching=BATCHINGS[name], measures=measures_of(mixed(count), 2048)
    )
    plan.set_epoch(epoch)
    batches = []
    for batch in plan:
        rows: dict[int, list[int]] = {}
        for place in batch:
            rows.setdefault(place.row, []).append(place.sample)
        batches.append(list(rows.values()))
    assert len(batches) == len(plan)
    return batches


@pytest.mark.parametrize("epoch", [0, 3])
@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("count", [1, 50, 997])
@pytest.mark.parametrize("name", BATCHINGS)
def test_every_sample_comes_once_and_rows_fit(name: str, count: int, world: int, epoch: int) -> None:
    ranks = [rows_of(name, count, GlobalBatch(4, world, 2), rank, epoch) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    rows = [row for batches in ranks for batch in batches for row in batch]
    assert sorted(sample for row in rows for sample in row) == list(range(count))
    sizes = np.array(mixed(count))
    assert all(sizes[row, 0].sum() <= 2048 for row in rows)
    if "images" in name:
        assert all(sizes[row, 1].sum() <= 3 for row in rows)


@pytest.mark.parametrize("name", ["padded", "packed"])
def test_ranks_share_the_batches_that_one_would_take(name: str) -> None:
    alone = rows_of(name, 500, GlobalBatch(6, 1), 0)
    shares = [rows_of(name, 500, GlobalBatch(2, 3), rank) for rank in range(3)]
    assert [a + b + c for a, b, c in zip(*shares, strict=True)] == alone


def test_packed_rows_are_full_and_ranks_get_nearly_the_same() -> None:
    count, layout = 20_000, GlobalBatch(2, 4)
    sizes = mixed(count)
    lengths = np.array(sizes)[:, 0]
    plans = [
        plan_over([Count("n", count)], layout, rank, batching=Packed(), measures=measures_of(sizes, 2048))
        for rank in range(4)
    ]
    tokens = np.array([[lengths[[place.sample for place in batch]].sum() for batch in plan] for plan in plans])
    fill = tokens.sum() / (tokens.size * layout.batch_size * 2048)
    assert fill >= 0.97
    whole = tokens[:, :-1]  # the last batch is what is left
    assert (whole.min(0) / whole.max(0)).min() >= 0.95


def test_an_epoch_of_more_rows_than_the_first_loses_none() -> None:
    sizes = mixed(400, seed=3)
    counts = set()
    for epoch in range(12):
        plan = plan_over(
            [Count("n", 400)], GlobalBatch(1, 1), batching=Packed(window=50), measures=measures_of(sizes, 2048)
        )
        plan.set_epoch(epoch)
        batches = list(plan)
        counts.add(len(plan._plan(epoch).ends))
        assert len(batches) == len(plan)
        assert sorted(place.sample for batch in batches for place in batch) == list(range(400))
    assert len(counts) > 1  # or this test shows nothing


def test_modality_steps_hold_one_kind_of_similar_length() -> None:
    sizes = np.array(mixed(2000))
    plan = plan_over(
        [Count("n", 2000)], GlobalBatch(4, 1, 2), batching=ModalityLength(), measures=measures_of(sizes, 2048)
    )
    batches = [[place.sample for place in batch] for batch in plan]
    steps = [list(chain(*batches[i : i + 2])) for i in range(0, len(batches), 2)]
    kinds = [set((sizes[step, 1] > 0).tolist()) for step in steps]
    assert all(len(kind) == 1 for kind in kinds[:-2])
    assert kinds[:20].count({True}) not in (0, 20)  # both kinds take turns
    sums = np.array([sizes[batch, 0].sum() for batch in batches[:-4]]).reshape(-1, 2)
    apart = np.abs(sums[:, 0] - sums[:, 1]).mean()
    assert apart < 0.25 * sums.mean()


def test_dealing_out_by_hand() -> None:
    lengths = np.array([9, 1, 8, 2, 7, 3])
    assert deal_out(np.arange(6) + 10, lengths, 2).tolist() == [10, 15, 13, 12, 14, 11]


def test_an_item_with_too_many_images_has_a_bin_of_its_own() -> None:
    assert first_fit_decreasing([5, 4, 3], 12, [1, 9, 1], 2) == [[0, 2], [1]]
