from __future__ import annotations

from itertools import combinations

import pytest

from lit_vlm.cluster import judge_network
from lit_vlm.cluster.links import Clock, Speed
from tests.machines.made import GIB, fact, places

ALL = places()


def tournament(slow: dict[int, float], nodes: int = 4, usual: float = 20.0) -> dict[tuple[int, int], Speed]:
    """All pairs at `usual` GiB/s, or at the lower of what two slow nodes reach."""
    return {
        pair: Speed(bandwidth=GIB * min(slow.get(rank, usual) for rank in pair), latency=2e-5)
        for pair in combinations(range(nodes), 2)
    }


def test_equal_pairs_are_well_with_numbers() -> None:
    (one,) = judge_network.pairs(tournament({1: 19.0}), ALL)
    assert one.level == "well"
    assert one.text == "all-reduce of 6 pairs of nodes at 19.00 GiB/s to 20.00 GiB/s, 20 µs for a single number"


@pytest.mark.parametrize("nodes", [3, 4, 7, 8])
def test_a_slow_node_is_named_and_not_those_that_it_slows(nodes: int) -> None:
    judged = judge_network.pairs(tournament({2: 4.0}, nodes), places(nodes))
    assert [(one.level, one.ranks) for one in judged] == [("error", (2,))]
    assert judged[0].text == (
        "the network of n3 (rank 2) carries 4.00 GiB/s with the best of its peers, 20% of the median of "
        f"{nodes} nodes (20.00 GiB/s)"
    )


def test_two_slow_nodes_of_five_are_named_the_slower_first() -> None:
    judged = judge_network.pairs(tournament({1: 11.0, 4: 2.0}, 5), places(5))
    assert [(one.level, one.ranks) for one in judged] == [("error", (4,)), ("warning", (1,))]


def test_one_slow_pair_of_well_nodes_is_a_warning() -> None:
    found = tournament({}) | {(1, 3): Speed(bandwidth=5.0 * GIB)}
    judged = judge_network.pairs(found, ALL)
    assert [(one.level, one.ranks) for one in judged] == [("warning", (1, 3))]
    assert judged[0].text == "n2 and n4 reach 5.00 GiB/s between them, and each 20.00 GiB/s or more with another node"


def test_a_pair_that_does_not_answer_is_named() -> None:
    found = tournament({}) | {(0, 2): Speed(failure="no answer in time")}
    judged = judge_network.pairs(found, ALL)
    assert [(one.level, one.ranks) for one in judged] == [("error", (0, 2))]
    assert judged[0].text == "n1 (rank 0) and n3 (rank 2) do not reach each other: no answer in time"
    assert judge_network.pairs({}, ALL) == []


def test_clocks_that_are_apart_are_named_with_their_side() -> None:
    found = {rank: Clock(offset=offset, round_trip=0.01) for rank, offset in ((1, 2.5), (2, -0.4), (3, -9.0))}
    judged = judge_network.clocks(found, ALL)
    assert [(one.level, one.ranks) for one in judged] == [("warning", (1,)), ("warning", (3,))]
    assert judged[0].text.startswith("the clock of n2 is 2.5 s ahead of that of n1 (± 0.005 s)")
    assert "9.0 s behind" in judged[1].text
    (well,) = judge_network.clocks({2: found[2]}, ALL)
    assert (well.level, well.text) == ("well", "1 within 405.0 ms of that of n1")


def test_an_uncertain_clock_is_not_blamed() -> None:
    (one,) = judge_network.clocks({1: Clock(offset=1.5, round_trip=2.0)}, ALL)
    assert one.level == "well"


def test_collectives_of_all_are_reported_or_fail() -> None:
    speeds = [Speed(bandwidth=10.0 * GIB, latency=3e-4), Speed(bandwidth=9.0 * GIB, latency=2e-3)]
    (one,) = judge_network.together({"all-reduce": speeds}, 64 * 2**20, 2)
    assert one.text == "64 MiB among 2 processes, 9.00 GiB/s from each, 2.0 ms for a single number"
    (one,) = judge_network.together({"all-gather": [speeds[0], Speed(failure="closed")]}, 64, 2)
    assert (one.level, one.text) == ("error", "it fails among all 2 processes: closed")


FACTS = {rank: fact(rank) for rank in range(4)}


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"variables": {"MASTER_ADDR": "n2"}}, "MASTER_ADDR: n2 on n3 (rank 2), n1 on the 3 others"),
        ({"address": "127.0.1.1"}, "its own name stands for 127.0.1.1, which gloo takes for its address"),
        ({"address": ""}, "its own name is not resolved, which gloo takes for its address: set GLOO_SOCKET_IFNAME"),
        ({"open_files": 256}, "256 files may be open, which loader workers exceed: ulimit -n 1024 or more"),
        ({"locked": 2**20}, "n3 (rank 2): 1024 KiB may be locked (ulimit -l), and InfiniBand wants no limit"),
    ],
)
def test_what_is_odd_in_an_environment_is_one_line(changed: dict[str, object], text: str) -> None:
    (one,) = judge_network.environment(FACTS | {2: fact(2, **changed)}, ALL)
    assert (one.level, one.ranks) == ("warning", (2,))
    assert text in one.text


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("NCCL_IB_DISABLE", "1", "NCCL_IB_DISABLE=1 on n1 (rank 0), n2 (rank 1): NCCL leaves a fast way unused"),
        ("NCCL_SOCKET_IFNAME", "=eno1,eno2", "NCCL_SOCKET_IFNAME==eno1,eno2, and the interfaces are lo, eth0, ib0"),
        ("GLOO_SOCKET_IFNAME", "eno1", "GLOO_SOCKET_IFNAME=eno1, and the interfaces are lo, eth0, ib0"),
    ],
)
def test_variables_that_slow_down_or_name_what_is_not_there(name: str, value: str, text: str) -> None:
    (one,) = judge_network.environment({rank: fact(rank, variables={name: value}) for rank in range(2)}, ALL)
    assert (one.level, one.ranks) == ("warning", (0, 1))
    assert text in one.text


def test_a_usual_environment_is_well_and_names_of_interfaces_may_be_beginnings() -> None:
    assert [one.level for one in judge_network.environment(FACTS, ALL)] == ["well"]
    for value in ("ib", "^docker0,lo", "=eth0"):
        given = {rank: fact(rank, variables={"NCCL_SOCKET_IFNAME": value}) for rank in range(4)}
        assert [one.level for one in judge_network.environment(given, ALL)] == ["well"]


def test_one_machine_may_call_itself_localhost() -> None:
    here = {rank: place.model_copy(update={"host": "laptop"}) for rank, place in ALL.items()}
    given = {rank: fact(rank, address="127.0.1.1") for rank in range(4)}
    assert [one.level for one in judge_network.environment(given, here)] == ["well"]
