"""Mixtures: exact shares, whole passes, and an order that depends on nothing but seed and epoch."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from lit_vlm.data.feed.batching import GlobalBatch
from lit_vlm.data.feed.mixture import Interleaved, Mixture, Shuffled, Weighted
from tests.data.made import Count

SOURCES = [Count("a", 100), Count("b", 20), Count("c", 40)]
LAYOUT = GlobalBatch(2, 2)
MIXTURES: dict[str, Mixture] = {
    "shuffled": Shuffled(),
    "passes": Shuffled({"a": 0.5, "b": 2.5}),
    "weighted": Weighted({"a": 0.2, "b": 0.5, "c": 0.3}, samples=90),
    "temperature": Weighted(temperature=2.0),
    "interleaved": Interleaved(),
}


def names(order: np.ndarray) -> list[str]:
    return ["a" if i < 100 else "b" if i < 120 else "c" for i in order.tolist()]


@pytest.mark.parametrize("name", MIXTURES)
def test_an_order_depends_on_seed_and_epoch_only(name: str) -> None:
    mixture = MIXTURES[name]
    orders = {(seed, epoch): mixture.order(SOURCES, seed, epoch, LAYOUT) for seed in (1, 20) for epoch in (0, 1)}
    again = mixture.order(SOURCES, 1, 1, LAYOUT)
    assert again.tolist() == orders[1, 1].tolist()
    assert len({tuple(order.tolist()) for order in orders.values()}) == 4
    assert {len(order) for order in orders.values()} == {len(again)}


def test_shuffled_takes_everything_once() -> None:
    order = Shuffled().order(SOURCES, 3, 0, LAYOUT)
    assert sorted(order.tolist()) == list(range(160))
    assert Counter(names(order[:80])) != Counter(names(order[80:]))  # not by source


def test_a_fraction_of_a_pass_goes_on_in_the_next_epoch() -> None:
    mixture = Shuffled({"a": 0.5, "b": 2.5, "c": 0.0})
    epochs = [mixture.order(SOURCES, 3, epoch, LAYOUT) for epoch in range(2)]
    assert [Counter(names(order)) for order in epochs] == [Counter({"a": 50, "b": 50})] * 2
    both = Counter(np.concatenate(epochs).tolist())
    assert {both[i] for i in range(100)} == {1}
    assert {both[i] for i in range(100, 120)} == {5}


def test_weights_are_shares_and_samples_come_round_evenly() -> None:
    mixture = Weighted({"a": 0.2, "b": 0.5, "c": 0.3}, samples=90)
    assert mixture.counts(SOURCES) == [18, 45, 27]
    drawn = Counter(np.concatenate([mixture.order(SOURCES, 3, epoch, LAYOUT) for epoch in range(4)]).tolist())
    assert {drawn[i] for i in range(100, 120)} == {9}  # 4 × 45 draws of 20
    assert {drawn[i] for i in range(100)} == {0, 1}
    assert {drawn[i] for i in range(120, 160)} == {2, 3}


@pytest.mark.parametrize(("temperature", "shares"), [(1.0, [100, 20, 40]), (1e9, [53, 53, 54])])
def test_temperature_evens_out_sizes(temperature: float, shares: list[int]) -> None:
    assert sorted(Weighted(temperature=temperature).counts(SOURCES)) == sorted(shares)


def test_a_cap_leaves_its_share_to_the_others() -> None:
    counts = Weighted({"a": 1, "b": 8, "c": 1}, samples=100, max_passes=2.0).counts(SOURCES)
    assert counts == [30, 40, 30]
    with pytest.raises(ValueError, match="more than data.mixture.max_passes lets the sources give"):
        Weighted({"a": 0, "b": 1, "c": 0}, samples=100, max_passes=2.0).counts(SOURCES)


def test_wrong_names_are_named() -> None:
    with pytest.raises(ValueError, match=r"data\.mixture\.weights names d; sources: a, b, c"):
        Weighted({"d": 1.0}).counts(SOURCES)
    with pytest.raises(ValueError, match=r"data\.mixture\.weights lacks b, c"):
        Weighted({"a": 1.0}).counts(SOURCES)
    with pytest.raises(ValueError, match="different names"):
        Shuffled({"a": 1.0}).order([Count("a", 3), Count("a", 4)], 0, 0, LAYOUT)


def test_interleaved_keeps_all_ranks_on_one_source_and_sources_evenly_spread() -> None:
    size, world = 2, 2
    sources = [Count("a", 25), Count("b", 61), Count("c", 9)]
    order = Interleaved().order(sources, 7, 0, GlobalBatch(size, world))
    per_rank = {"a": 12, "b": 30, "c": 4}
    assert len(order) == world * sum(per_rank.values())
    owner = np.searchsorted([25, 86, 95], order, side="right").reshape(-1, world, size)
    assert all((owner[:, 0] == owner[:, rank]).all() for rank in range(world))
    ranks = order.reshape(-1, world, size).transpose(1, 0, 2).reshape(world, -1)
    # The largest source stands at ⌊i · 46 / 30⌋, permuted by Python's generator with seed + epoch.
    places = [i * 46 // 30 for i in range(30)]
    rng = random.Random(7)
    first = list(range(12))
    rng.shuffle(first)
    largest = list(range(25, 55))
    rng.shuffle(largest)
    assert ranks[0, places].tolist() == largest
    # The next one stands at even distances over what is left.
    free = [place for place in range(46) if place not in places]
    assert ranks[0, [free[i * 16 // 12] for i in range(12)]].tolist() == first
    assert set(ranks[1].tolist()).isdisjoint(ranks[0].tolist())
