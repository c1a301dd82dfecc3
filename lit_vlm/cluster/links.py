"""What passes between machines, measured: clocks, all-reduces of pairs of nodes, collectives of all processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from statistics import median

import torch
import torch.distributed as dist
from pydantic import BaseModel
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from lit_vlm.cluster.meeting import GRACE, LeftAlone, Meeting

PINGS, PING_TIMEOUT = 5, 5.0
"""Questions for the time per machine, and seconds for an answer, as all machines are waiting for them."""
SMALL, TIMES = 20, 3
"""Repetitions of a collective of one number, and of one of the given size."""


class Clock(BaseModel, frozen=True):
    """A machine's clock against the first one's.

    Attributes:
        offset: seconds that it is ahead.
        round_trip: seconds of the quickest question and answer, half of which the offset may be wrong by.
    """

    offset: float
    round_trip: float


class Speed(BaseModel, frozen=True):
    """A collective.

    Attributes:
        bandwidth: bytes per second that each process sent.
        latency: seconds of one with a single number.
        failure: why there are no numbers; empty where there are.
    """

    bandwidth: float = 0.0
    latency: float = 0.0
    failure: str = ""


def rounds(count: int) -> Iterator[list[tuple[int, int]]]:
    """All pairs of `count` players in rounds in which each plays once at most: the tournament in which one sits still.

    Yields:
        pairs of a round, of which there are `count` − 1, or `count` for odd numbers; the smaller one comes first.
    """
    seats = list(range(count + count % 2))
    for _ in range(len(seats) - 1):
        pairs = zip(seats[: len(seats) // 2], reversed(seats), strict=False)
        yield [(min(pair), max(pair)) for pair in pairs if max(pair) < count]
        seats = [seats[0], seats[-1], *seats[1:-1]]


def clocks(meeting: Meeting, leaders: Sequence[int]) -> dict[int, Clock]:
    """Clocks of one process per node, by its rank; empty in all but the first process.

    The first one asks them one after the other; who does not answer is found by the next question to all.

    Raises:
        LeftAlone: where the first process is gone.
    """
    found: dict[int, Clock] = {}
    for place, rank in enumerate(leaders):
        if meeting.rank == 0 and rank != 0:
            with suppress(LeftAlone):  # this one is silent; the others are still asked
                found[rank] = min((_ask(meeting, rank, i) for i in range(PINGS)), key=lambda clock: clock.round_trip)
        elif meeting.rank == rank:
            for i in range(PINGS if rank else 0):
                meeting.hear(f"clock/{rank}/{i}", (place + 1) * PING_TIMEOUT + GRACE)
                meeting.say(f"clock/{rank}/{i}/time", repr(time.time()))
    return found


def _ask(meeting: Meeting, rank: int, number: int) -> Clock:
    start = time.time()
    meeting.say(f"clock/{rank}/{number}", "")
    answer = float(meeting.hear(f"clock/{rank}/{number}/time", PING_TIMEOUT))
    end = time.time()
    return Clock(offset=answer - (start + end) / 2, round_trip=end - start)


def pairs(meeting: Meeting, leaders: Sequence[int], size: int, device: torch.device) -> dict[tuple[int, int], Speed]:
    """Speeds between all pairs of nodes; empty in all but the first process.

    Each pair makes a group of its own, so that one that does not come about stops no other. The first process waits
    for all of a round, so that no node is in two pairs at once. A process that went silent is in no further pair.

    Args:
        meeting: of all processes.
        leaders: one rank per node.
        size: bytes of the tensor that is reduced.
        device: of this process.

    Raises:
        LeftAlone: as `Meeting.gather`.
    """
    found: dict[tuple[int, int], Speed] = {}
    for number, round_ in enumerate(rounds(len(leaders))):
        playing = [(leaders[a], leaders[b]) for a, b in round_]
        playing = [pair for pair in playing if not meeting.silent & set(pair)]
        mine = next((pair for pair in playing if meeting.rank in pair), None)
        speed = Speed()
        if mine:
            with _failures() as failures:
                place = mine.index(meeting.rank)
                with group(meeting, f"pair/{number}/{mine[0]}", place, 2, device):
                    speed = _all_reduce(size, 2, device)
            speed = failures[0] if failures else speed
        answers = meeting.gather(
            f"pairs/{number}", speed.model_dump_json(), [rank for pair in playing for rank in pair]
        )
        if meeting.rank == 0:
            found.update({pair: _worse(answers, pair) for pair in playing})
    return found


def together(meeting: Meeting, size: int, device: torch.device) -> dict[str, list[Speed]]:
    """Speeds of an all-reduce and an all-gather of all processes, one per process; empty in all but the first.

    Raises:
        LeftAlone: as `Meeting.gather`.
    """
    reduced = gathered = Speed()
    with _failures() as failures, group(meeting, "all", meeting.rank, meeting.world_size, device):
        reduced = _all_reduce(size, meeting.world_size, device)
        gathered = _all_gather(size, meeting.world_size, device)
    if failures:
        reduced = gathered = failures[0]
    found = {}
    for name, speed in (("all-reduce", reduced), ("all-gather", gathered)):
        answers = meeting.gather(name, speed.model_dump_json())
        found[name] = [Speed.model_validate_json(text) for text in answers.values()]
    return found if meeting.rank == 0 else {}


@contextmanager
def group(meeting: Meeting, name: str, rank: int, world_size: int, device: torch.device) -> Iterator[None]:
    """A process group whose calls end after the meeting's timeout: NCCL on cards, gloo on processors.

    Args:
        meeting: whose store its members find each other in.
        name: of the group, used once.
        rank: of this process in the group.
        world_size: number of members.
        device: that its tensors are on.
    """
    meeting.guard()
    dist.init_process_group(
        "gloo" if device.type == "cpu" else "nccl",
        store=PrefixStore(name, meeting.store),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=meeting.timeout),
        device_id=None if device.type == "cpu" else device,
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def _failures() -> Iterator[list[Speed]]:
    """A context whose list gets the failure of a collective that ends it."""
    failed: list[Speed] = []
    try:
        yield failed
    except RuntimeError as error:  # which all of torch.distributed's are
        failed.append(Speed(failure=" ".join(str(error).split())[:160] or type(error).__name__))


def _worse(answers: dict[int, str], pair: tuple[int, int]) -> Speed:
    """What a pair measured; a failure of either if there is one."""
    speeds = [Speed.model_validate_json(answers[rank]) for rank in pair if rank in answers]
    if len(speeds) < 2:
        return Speed(failure="no answer in time")
    return next((speed for speed in speeds if speed.failure), min(speeds, key=lambda speed: speed.bandwidth))


def _all_reduce(size: int, world_size: int, device: torch.device) -> Speed:
    """Each process sends the size twice, less its own share."""
    whole, number = (torch.ones(max(1, count), device=device) for count in (size // 4, 1))
    seconds = _seconds(lambda: dist.all_reduce(whole), TIMES, device)
    latency = _seconds(lambda: dist.all_reduce(number), SMALL, device)
    return Speed(bandwidth=2 * (world_size - 1) / world_size * size / seconds, latency=latency)


def _all_gather(size: int, world_size: int, device: torch.device) -> Speed:
    """Each process sends a share of the size to all others."""
    own = torch.ones(max(1, size // 4 // world_size), device=device)
    whole = torch.empty(world_size * len(own), device=device)
    number, numbers = torch.ones(1, device=device), torch.empty(world_size, device=device)
    seconds = _seconds(lambda: dist.all_gather_into_tensor(whole, own), TIMES, device)
    latency = _seconds(lambda: dist.all_gather_into_tensor(numbers, number), SMALL, device)
    return Speed(bandwidth=(world_size - 1) / world_size * size / seconds, latency=latency)


def _seconds(call: Callable[[], object], times: int, device: torch.device) -> float:
    """Median seconds of a call, after one that makes connections."""
    measured = []
    for _ in range(times + 1):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        measured.append(time.perf_counter() - start)
    return median(measured[1:])
