"""All checks of a launch's machines, one after the other, in all its processes alike."""

from __future__ import annotations

import json
import socket
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from lit_vlm.cluster import judge, judge_network, links
from lit_vlm.cluster.judge import Judgement
from lit_vlm.cluster.meeting import Meeting
from lit_vlm.cluster.nodes import (
    Machine,
    Place,
    device_of,
    existing,
    facts,
    machine,
    matmul_rate,
    seen_after,
    step_nodes,
)
from lit_vlm.core.launcher import Launch

Said = TypeVar("Said", bound=BaseModel)

SHOWS_WITHIN = 10.0
"""Seconds within which a file must be seen by other machines; NFS remembers only names that were asked for."""


@dataclass
class Checkup:
    """Checks of all machines of a launch.

    All processes make one and go through `judgements`, which yields in the first process only.

    Args:
        meeting: of all processes.
        launched: this process among them.
        data: paths that training will read.
        out: folder that training will write to; it need not exist.
        size: bytes of the tensors of collectives.
    """

    meeting: Meeting
    launched: Launch
    data: Sequence[str] = ()
    out: Path | None = None
    size: int = 64 * 2**20
    found: dict[str, Any] = field(default_factory=dict)
    """What was gathered, by name, as plain data; in the first process."""
    _places: dict[int, Place] = field(default_factory=dict)
    _known: set[int] = field(default_factory=set)

    def judgements(self) -> Iterator[Judgement]:
        """What is found, check by check; those after it are left out where a process never came.

        Raises:
            LeftAlone: as `Meeting.gather`.
        """
        own = Place(rank=self.launched.rank, node=self.launched.node, host=socket.gethostname())
        came = self._gather("places", own)
        yield from judge.missing(self.meeting.silent, came, self._nodes(), self.meeting.timeout)
        if self.meeting.silent:
            return
        told = self.meeting.tell("all", json.dumps([place.model_dump() for place in came.values()]))
        self._places = {place["rank"]: Place(**place) for place in json.loads(told)}
        yield from self._machines()
        yield from self._links()

    def _nodes(self) -> list[str]:
        return step_nodes() if self.meeting.silent and self.meeting.rank == 0 else []

    @property
    def _leaders(self) -> list[int]:
        """The first process of each node that answers."""
        return sorted({self._places[rank].node: rank for rank in reversed(self.meeting.present())}.values())

    def _machines(self) -> Iterator[Judgement]:
        gathered = self._gather("versions", facts(self.launched.local_rank))
        yield from self._lost("versions")
        if gathered:
            for check in (judge.versions, judge.devices, judge.processors, judge_network.environment):
                yield from check(gathered, self._places)
        leaders = self._leaders
        leads = self.meeting.rank in leaders
        out = None if self.out is None else existing(self.out)
        machines = self._gather("data and disks", machine(self.data, out) if leads else Machine(), leaders)
        yield from self._lost("data and disks")
        if machines:
            yield from judge.data(machines, self._places)
            yield from judge.room(machines, self._places)
        if out is not None:
            yield from self._shared(out)
        rates = self._numbers("matrix products", matmul_rate(device_of(self.launched.local_rank)))
        yield from self._lost("matrix products")
        if rates:
            own = {rank: gathered[rank].device for rank in rates}
            yield from judge.speeds(rates, own, self._places)

    def _shared(self, out: Path) -> Iterator[Judgement]:
        leaders = self._leaders
        with _token(out, self.meeting.rank == 0) as token:
            told = self.meeting.tell("token", str(token or ""))
            seconds = seen_after(Path(told), SHOWS_WITHIN) if told and self.meeting.rank in leaders else None
            answers = self.meeting.gather("--out", json.dumps(seconds), leaders)
        yield from self._lost("--out")
        if answers and token:  # that it cannot be written has been said
            self.found["--out"] = {rank: json.loads(answer) for rank, answer in answers.items()}
            yield from judge.shared(self.found["--out"], str(token.parent), SHOWS_WITHIN, self._places)

    def _links(self) -> Iterator[Judgement]:
        clocks = links.clocks(self.meeting, self._leaders)
        self.found["clocks"] = {rank: clock.model_dump() for rank, clock in clocks.items()}
        yield from judge_network.clocks(clocks, self._places)
        self.meeting.gather("clocks", "")
        yield from self._lost("clocks")
        device = device_of(self.launched.local_rank)
        pairs = links.pairs(self.meeting, self._leaders, self.size, device)
        self.found["pairs"] = [{"ranks": pair, **speed.model_dump()} for pair, speed in pairs.items()]
        yield from judge_network.pairs(pairs, self._places)
        yield from self._lost("links between nodes")
        whole = not self.meeting.silent and not any(speed.failure for speed in pairs.values())
        if self.meeting.world_size == 1 or not json.loads(self.meeting.tell("all reachable", json.dumps(whole))):
            return
        speeds = links.together(self.meeting, self.size, device)
        self.found["together"] = {name: [speed.model_dump() for speed in each] for name, each in speeds.items()}
        yield from judge_network.together(speeds, self.size, self.meeting.world_size)
        yield from self._lost("collectives of all")

    def _gather(self, name: str, own: Said, among: Sequence[int] | None = None) -> dict[int, Said]:
        answers = self.meeting.gather(name, own.model_dump_json(), among)
        found = {rank: type(own).model_validate_json(answer) for rank, answer in answers.items()}
        self.found[name] = {rank: answer.model_dump(exclude={"sources"}) for rank, answer in found.items()}
        return found

    def _numbers(self, name: str, own: float) -> Mapping[int, float]:
        answers = self.meeting.gather(name, json.dumps(own))
        self.found[name] = {rank: float(answer) for rank, answer in answers.items()}
        return self.found[name]

    def _lost(self, when: str) -> Iterator[Judgement]:
        new, self._known = self.meeting.silent - self._known, set(self.meeting.silent)
        if self.meeting.rank == 0:
            yield from judge.lost(new, self._places, when)


@contextmanager
def _token(folder: Path, write: bool) -> Iterator[Path | None]:
    """A file with a new name in a folder while the context lasts; None where it is not or cannot be written."""
    path = folder / f".lit-vlm-doctor-{uuid.uuid4().hex}"
    try:
        path.touch() if write else None
    except OSError:
        write = False
    try:
        yield path if write else None
    finally:
        if write:
            path.unlink(missing_ok=True)
