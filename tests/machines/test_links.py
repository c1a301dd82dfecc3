from __future__ import annotations

from itertools import combinations

import pytest

from lit_vlm.cluster.links import rounds


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 13])
def test_all_pairs_meet_once_and_nobody_twice_in_a_round(count: int) -> None:
    played = list(rounds(count))
    assert len(played) == count - 1 + count % 2
    for round_ in played:
        players = [player for pair in round_ for player in pair]
        assert len(players) == len(set(players))
    assert sorted(pair for round_ in played for pair in round_) == list(combinations(range(count), 2))
