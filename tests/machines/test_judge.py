from __future__ import annotations

import pytest

from lit_vlm.cluster import judge
from lit_vlm.cluster.judge import Judgement
from lit_vlm.cluster.nodes import Folder
from tests.machines.made import GIB, card, fact, machine, places

FACTS = {rank: fact(rank) for rank in range(4)}
ALL = places()


def only(judged: list[Judgement]) -> tuple[str, str, tuple[int, ...]]:
    assert len(judged) == 1
    return judged[0].level, judged[0].text, judged[0].ranks


def test_a_healthy_cluster_is_well_in_every_respect() -> None:
    machines = {rank: machine() for rank in range(4)}
    rates = dict.fromkeys(range(4), 6e14)
    judged = [
        *judge.versions(FACTS, ALL),
        *judge.devices(FACTS, ALL),
        *judge.processors(FACTS, ALL),
        *judge.speeds(rates, {rank: card(rank) for rank in rates}, ALL),
        *judge.data(machines, ALL),
        *judge.room(machines, ALL),
        *judge.shared({0: 0.0, 1: 0.5}, "/out", 10, ALL),
    ]
    assert [one.level for one in judged] == ["well"] * 7
    assert judged[0].text == (
        "3 versions (Python 3.11.7, torch 2.15.0, lit-vlm 0.1.0) and 3 files of the kit, alike in 4 processes"
    )
    assert judged[2].text == "4 or more per process: room for data.num_workers up to 3"
    assert judged[5].text == "at least 500 GiB free for --out, at least 500 GiB free for cache, 64.0 GiB in /dev/shm"


def test_ranks_are_named_by_node() -> None:
    assert judge.where([5, 0, 4, 7], places(2, 4)) == "n1 (rank 0), n2 (ranks 4-5, 7)"
    numbered = {0: ALL[0].model_copy(update={"node": "0"})}
    assert judge.where([0], numbered) == "node 0 (host1) (rank 0)"


def test_those_that_never_came_are_named_with_their_nodes() -> None:
    came = {rank: place for rank, place in places(4, 2).items() if rank not in (2, 3, 5)}
    level, text, ranks = only(judge.missing({5, 2, 3}, came, ["n1", "n2", "n3", "n4"], 120))
    assert (level, ranks) == ("error", (2, 3, 5))
    assert text == (
        "ranks 2-3, 5 of 8 processes did not come within 120 s; nobody came from n2; there are "
        "n1 (ranks 0-1), n3 (rank 4), n4 (ranks 6-7)"
    )
    assert judge.missing(set(), ALL, [], 120) == []


def test_who_stops_answering_is_named() -> None:
    assert only(judge.lost({2}, ALL, "clocks")) == (
        "error",
        "n3 (rank 2) stopped answering at the check of clocks",
        (2,),
    )


def test_the_version_that_few_have_is_the_odd_one() -> None:
    other = fact(2, versions=FACTS[2].versions | {"torch": "2.14.1"})
    judged = judge.versions({0: FACTS[0], 1: FACTS[1], 2: other}, ALL)
    assert only(judged) == ("error", "torch: 2.14.1 on n3 (rank 2), 2.15.0 on n1 (rank 0), n2 (rank 1)", (2,))


def test_the_first_process_may_be_the_odd_one() -> None:
    other = fact(0, versions=FACTS[0].versions | {"torch": "2.14.1"})
    _, text, ranks = only(judge.versions(FACTS | {0: other}, ALL))
    assert text == "torch: 2.14.1 on n1 (rank 0), 2.15.0 on the 3 others"
    assert ranks == (0,)


def test_other_code_is_named_by_its_files() -> None:
    sources = {"lit_vlm/a.py": "ax", "lit_vlm/b.py": "bx", "lit_vlm/d.py": "dd"}
    _, text, ranks = only(judge.versions(FACTS | {3: fact(3, sources=sources)}, ALL))
    assert text == (
        "the code of n4 (rank 3) differs from the others' in callbacks/c.py, lit_vlm/a.py, lit_vlm/b.py and 1 more"
    )
    assert ranks == (3,)


def test_a_machine_whose_card_is_not_found_is_an_error_and_another_card_a_warning() -> None:
    none = fact(1, device=card(1, kind="cpu", name="x86_64", id=""))
    level, text, ranks = only(judge.devices(FACTS | {1: none}, ALL))
    assert (level, ranks) == ("error", (1,))
    assert text == "the kind of device: cpu on n2 (rank 1), cuda on the 3 others"
    level, text, _ = only(judge.devices(FACTS | {1: fact(1, device=card(1, name="NVIDIA A100"))}, ALL))
    assert level == "warning"
    assert "NVIDIA A100 on n2 (rank 1)" in text


def test_a_card_with_two_processes_or_with_others_memory_is_named() -> None:
    where = places(2, 2)
    level, text, ranks = only(judge.devices(FACTS | {3: fact(3, device=card(2))}, where))
    assert (level, ranks) == ("error", (2, 3))
    assert text.startswith("n2 (ranks 2-3) share one card")
    level, text, ranks = only(judge.devices(FACTS | {3: fact(3, device=card(3, used=40 * GIB))}, ALL))
    assert (level, ranks) == ("warning", (3,))
    assert text == "40.0 GiB of the card of n4 (rank 3) are in use by others"


def test_processes_without_processors_of_their_own_are_named() -> None:
    where = places(2, 2)
    shared = {rank: fact(rank, cpus=[0]) for rank in (2, 3)}
    level, text, ranks = only(judge.processors(FACTS | shared, where))
    assert (level, ranks) == ("warning", (2, 3))
    assert text == "n2 (ranks 2-3) have 1 processors for 2 processes (--cpus-per-task)"


def test_slow_devices_are_named_among_equal_ones_the_slowest_first() -> None:
    devices = {rank: card(rank) for rank in range(5)} | {5: card(5, name="NVIDIA L4")}
    rates = {0: 600e12, 1: 590e12, 2: 470e12, 3: 250e12, 4: 610e12, 5: 60e12}
    judged = judge.speeds(rates, devices, places(6))
    assert [(one.level, one.ranks) for one in judged] == [("error", (3,)), ("warning", (2,))]
    assert judged[0].text.startswith(
        "the NVIDIA H100 of n4 (rank 3) multiplies matrices at 250.0 TFLOP/s, 42% of the median of 5 (590.0 TFLOP/s)"
    )
    assert [one.level for one in judge.speeds(rates | {2: 473e12, 3: 473e12}, devices, places(6))] == ["well"]


def test_data_that_some_do_not_see_or_see_differently_are_named() -> None:
    machines = {rank: machine() for rank in range(3)} | {3: machine(data={"/data": "nothing"})}
    level, text, ranks = only(judge.data(machines, ALL))
    assert (level, ranks) == ("error", (3,))
    assert text == "/data: nothing on n4 (rank 3), a folder of 3 entries (12ab) on the 3 others"
    nowhere = {rank: machine(data={"/data": "nothing"}) for rank in range(3)}
    assert only(judge.data(nowhere, ALL)) == ("error", "/data exists nowhere", ())


def test_a_folder_that_is_not_shared_is_an_error_with_the_nodes_that_do_not_see_it() -> None:
    level, text, ranks = only(judge.shared({0: 0.0, 1: None, 2: 0.1}, "/scratch/me", 10, ALL))
    assert (level, ranks) == ("error", (1,))
    assert text.startswith("n2 (rank 1) do not see within 10 s what rank 0 wrote to /scratch/me")


@pytest.mark.parametrize(("free", "level"), [(0.5, "error"), (5, "warning"), (11, "well")])
def test_a_full_disk_is_named(free: float, level: str) -> None:
    full = machine().folders | {"--out": Folder(path="/out", free=int(free * GIB), problem=None)}
    judged = judge.room({0: machine(), 1: machine(folders=full)}, ALL)
    assert only(judged)[0] == level
    if level != "well":
        assert only(judged)[1:] == (f"{free:.1f} GiB are free in the --out /out of n2 (rank 1)", (1,))


def test_a_folder_that_takes_no_file_and_little_shared_memory_are_named() -> None:
    broken = machine().folders | {"cache": Folder(path="/cache", free=0, problem="Read-only file system")}
    level, text, ranks = only(judge.room({0: machine(), 1: machine(folders=broken)}, ALL))
    assert (level, ranks) == ("error", (1,))
    assert text == "n2 (rank 1) cannot write to the cache folder /cache: Read-only file system"
    level, text, ranks = only(judge.room({0: machine(), 1: machine(shared_memory=64 * 2**20)}, ALL))
    assert (level, ranks) == ("warning", (1,))
    assert text.startswith("64 MiB are free in /dev/shm of n2 (rank 1)")
