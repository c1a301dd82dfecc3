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
)
from lit_vlm.data.feed.mixture import Interleaved, Mixture, Weighted
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
    lengths = np.array([[9, 1, 8, 2, 7, 3]])
    assert deal_out(np.arange(6)[None] + 10, lengths, 2).tolist() == [[10, 15, 13, 12, 14, 11]]


@pytest.mark.parametrize("parts", [1, 3, 12])
def test_groups_are_dealt_out_as_one_by_one(parts: int) -> None:
    """Each to the part with the smallest sum that has room, the first of equal ones."""
    lengths = np.random.default_rng(parts).integers(0, 9, (20, 12))
    samples = np.random.default_rng(0).permutation(lengths.size).reshape(lengths.shape)
    for dealt, members, long in zip(deal_out(samples, lengths, parts), samples, lengths, strict=True):
        found: list[list[int]] = [[] for _ in range(parts)]
        for index in sorted(range(12), key=lambda i: -long[i]):
            room = [part for part in found if len(part) < 12 // parts]
            min(room, key=lambda part: sum(long[i] for i in part)).append(index)
        assert dealt.tolist() == [members[i] for part in found for i in part]


ORDERS = {
    ("padded", 0): "dbe8ffe1da622bbe",
    ("padded", 2): "3d134f174abe6ef2",
    ("modality", 0): "026d272e4093e00e",
    ("modality", 2): "76ff7e37613676e6",
    ("packed", 0): "e1d510a19cb68410",
    ("packed", 2): "c3901ffe147e08f9",
    ("packed few images", 0): "57fd046f5efa6ddc",
    ("packed few images", 2): "56fb752bcf04fdb1",
}
"""Batching and epoch → the hash of the order that checkpoints hold; another one, and no run could be resumed."""


@pytest.mark.parametrize(("name", "epoch"), ORDERS)
def test_the_order_is_that_of_earlier_versions(name: str, epoch: int) -> None:
    measures = measures_of(mixed(2999), 2048)
    sources = [Count("a", 1000), Count("b", 1999)]
    plan = plan_over(sources, GlobalBatch(2, 4, 3), batching=BATCHINGS[name], measures=measures)
    plan.set_epoch(epoch)
    assert plan.identity()["order"] == ORDERS[name, epoch]


@pytest.mark.parametrize(
    ("mixture", "order"),
    [(Weighted(weights={"a": 3, "b": 1}), "621f8bb686355eb9"), (Interleaved(), "967408c7ce630a7e")],
)
def test_the_order_of_a_mixture_is_that_of_earlier_versions(mixture: Mixture, order: str) -> None:
    plan = plan_over([Count("a", 1000), Count("b", 1999)], GlobalBatch(2, 4, 3), mixture=mixture)
    assert plan.identity()["order"] == order
