from __future__ import annotations

import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
from torch.distributed import HashStore

from lit_vlm.cluster.meeting import LeftAlone, Meeting, address, meet
from lit_vlm.core.launcher import Launch, launch


def free_port() -> int:
    with closing(socket.socket()) as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


def in_threads(world_size: int, ranks: list[int], timeout: float, act: Callable[[Meeting], object]) -> list[object]:
    """What each rank's `act` returns or raises, when those that are there meet in threads."""
    given = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}

    def one(rank: int) -> object:
        try:
            with meet(Launch("torchrun", rank, world_size), timeout, given) as meeting:
                return act(meeting)
        except LeftAlone as error:
            return str(error)

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(one, ranks))


def test_the_first_gets_all_answers_and_all_hear_what_it_says() -> None:
    def act(meeting: Meeting) -> object:
        answers = meeting.gather("name", f"I am {meeting.rank}")
        some = meeting.gather("some", f"{meeting.rank}", among=[1, 2])
        told = meeting.tell("end", f"said by {meeting.rank}")
        return answers, some, told

    first, *others = in_threads(3, [0, 1, 2], 30, act)
    assert first == ({rank: f"I am {rank}" for rank in range(3)}, {1: "1", 2: "2"}, "said by 0")
    assert others == [({}, {}, "said by 0")] * 2


def test_who_does_not_come_is_known_to_those_that_did() -> None:
    def act(meeting: Meeting) -> object:
        answers = meeting.gather("name", "here")
        return sorted(answers), sorted(meeting.silent), meeting.present()

    assert in_threads(4, [0, 2], 1.0, act) == [([0, 2], [1, 3], [0, 2]), ([], [1, 3], [0, 2])]


def test_who_comes_too_late_is_told_so() -> None:
    def act(meeting: Meeting) -> object:
        if meeting.rank == 0:
            answers = meeting.gather("name", "here")
            meeting.hear("late", 30)
            return answers
        meeting.hear("name/silent", 30)
        try:
            return meeting.gather("name", "here")
        finally:
            meeting.say("late", "")

    late = "this process answered too late, and the first one goes on without it"
    assert in_threads(2, [0, 1], 0.5, act) == [{0: "here"}, late]


def test_without_the_first_process_a_wait_ends() -> None:
    (said,) = in_threads(2, [1], 1.0, lambda meeting: meeting)
    assert isinstance(said, str)
    assert said.startswith("rank 0 does not answer at 127.0.0.1:")


def test_who_is_left_alone_is_ended_by_no_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_vlm.cluster.meeting.GRACE", 0.0)
    with pytest.raises(LeftAlone), Meeting(HashStore(), 1, 2, 0.1) as meeting:
        meeting.gather("name", "here")
    time.sleep(0.4)  # the guard would end this process


def test_a_taken_port_is_named() -> None:
    with closing(socket.socket(socket.AF_INET6)) as other:
        other.bind(("::", 0))
        other.listen()
        port = other.getsockname()[1]
        given = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        with pytest.raises(ValueError, match=f"port {port} of 127.0.0.1 cannot be opened: set MASTER_PORT to a free"):
            meet(Launch("torchrun", 0, 2), 1.0, given)


STEP = {"SLURM_JOB_ID": "1234", "SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8",
        "SLURM_STEP_NODELIST": "gpu[07-08,11],cpu3"}  # fmt: skip


def test_a_step_of_slurm_meets_at_its_first_node_and_a_port_of_its_own() -> None:
    host, port = address(launch(STEP), STEP)
    assert host == "gpu07"
    other = STEP | {"SLURM_STEP_ID": "1"}
    assert address(launch(other), other)[1] != port
    given = STEP | {"MASTER_ADDR": "login", "MASTER_PORT": "12345"}
    assert address(launch(given), given) == ("login", 12345)


def test_processes_that_cannot_meet_are_told_what_to_set() -> None:
    given = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "here"}
    with pytest.raises(ValueError, match="2 processes were started, but MASTER_ADDR is here and MASTER_PORT None"):
        address(launch(given), given)
