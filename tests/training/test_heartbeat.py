"""How processes of a run learn that another one is gone: rank 0 and others, all in this process."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest

from lit_vlm.training import heartbeat
from lit_vlm.training.heartbeat import Hub, Peers, Spoke
from lit_vlm.training.signs import State, Verdict

NODES = ["n0", "n1", "n1"]


@pytest.fixture
def three() -> Iterator[list[Peers]]:
    hub = Hub(NODES, 0.5)
    meeting = hub.meeting("localhost")
    peers = [hub, *(Spoke(rank, NODES, 0.5, meeting) for rank in (1, 2))]
    settle(peers)
    assert len(hub._known()) == 2
    yield peers
    for one in peers:
        one.close()


def settle(peers: list[Peers], states: tuple[State, ...] = (State(), State(), State())) -> list[Verdict | None]:
    """What each hears, after all have sent and heard for a while; nobody looks after having heard a verdict."""
    found: list[Verdict | None] = [None] * len(peers)
    for _ in range(4):
        for index, one in enumerate(peers):
            one._told = 0.0  # a beat is due
            found[index] = found[index] or one.look(states[one.rank], 0.02)
    return found


def test_nothing_is_said_of_processes_that_live_and_of_those_that_leave(three: list[Peers]) -> None:
    assert settle(three) == [None] * 3
    three[2].leave()
    assert settle(three[:2]) == [None] * 2
    three[0].leave()
    assert settle(three[1:2]) == [None]
    assert three[1].decides()


def test_all_hear_that_a_process_ended(three: list[Peers]) -> None:
    three[1].close()
    gone = Verdict("lost", 1, "rank 1 on node n1 is gone: its process ended")
    assert settle([three[0], three[2]]) == [gone, gone]


def test_all_notice_that_rank_0_ended(three: list[Peers]) -> None:
    three[0].close()
    gone = Verdict("lost", 0, "rank 0 on node n0 is gone: its process ended")
    assert settle(three[1:]) == [gone, gone]


@pytest.mark.parametrize("silent", [0, 2])
def test_a_silent_process_is_lost(three: list[Peers], silent: int) -> None:
    rest = [one for one in three if one.rank != silent]
    end = time.monotonic() + 10
    while not all(found := settle(rest)):
        assert time.monotonic() < end
    assert found[0] == Verdict(
        "lost", silent, f"rank {silent} on node {NODES[silent]} is gone: no sign of life for 0.5 s"
    )


def test_nobody_is_lost_to_a_process_that_was_stopped_itself(
    three: list[Peers], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "PAUSE", 0.3)
    time.sleep(0.7)  # as in a job that is suspended, whose processes wake up one after the other
    assert [one.look(State(), 0.02) for one in three] == [None] * 3


def test_a_failure_is_told_to_all(three: list[Peers]) -> None:
    failed = Verdict("failed", 2, "rank 2 on node n1 failed: ValueError: broken")
    three[2].tell(failed)
    three[2].leave()
    assert settle(three[:2]) == [failed, failed]


def test_rank_0_knows_who_is_behind_and_who_may_be_slow(three: list[Peers]) -> None:
    hub = three[0]
    settle(three, (State(3, False), State(3, False), State(3, False)))
    assert (hub.behind(), hub.may_be_slow()) == (None, False)
    settle(three, (State(4, False), State(4, False), State(3, True)))
    assert (hub.behind(), hub.may_be_slow()) == (2, True)


@pytest.mark.parametrize("said", [b'{"rank": 1, "word": "guessed"}\n', b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b"\xff\n"])
def test_a_stranger_is_sent_away(three: list[Peers], said: bytes) -> None:
    hub = three[0]
    assert isinstance(hub, Hub)
    with socket.create_connection(hub.meeting("localhost")[:2]) as stranger:
        stranger.sendall(said)
        assert settle(three) == [None] * 3
        stranger.settimeout(5)
        assert stranger.recv(10) == b""
    assert settle(three) == [None] * 3
