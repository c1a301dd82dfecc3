"""A meeting of all processes of a launch before they trust each other: every wait ends, and who is missing is known.

Messages are small texts in a key-value store of torch.distributed. It needs one connection per process to the first
one, while a process group needs all of them, and cannot say who did not come.
"""

from __future__ import annotations

import faulthandler
import json
import os
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Self

import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from lit_vlm.core.launcher import Launch, rendezvous

GRACE = 30.0
"""Seconds beyond two timeouts that a process waits for the first one, which may itself be waiting for another."""
FAREWELL = 5.0
"""Seconds that the first process, in which the store lives, waits for others to read its last word."""


class LeftAlone(Exception):
    """The first process cannot be reached, or goes on without this one."""


class Meeting:
    """Rounds of questions that all processes answer and the first one collects; a context, from which they part.

    At its end the first process stays until the others have heard its last word, for a few seconds at most; with an
    error it does not wait.

    Args:
        store: that all processes reach.
        rank: number of this process.
        world_size: number of processes.
        timeout: seconds that the first process waits for answers.

    Attributes:
        silent: ranks that did not answer in time; they are asked nothing more.
    """

    def __init__(self, store: Store, rank: int, world_size: int, timeout: float) -> None:
        self.store, self.rank, self.world_size, self.timeout = store, rank, world_size, timeout
        self.silent: set[int] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        faulthandler.cancel_dump_traceback_later()
        if kind is not None:
            return
        try:
            self.say(f"left/{self.rank}", "")
            if self.rank == 0:
                keys = [f"left/{rank}" for rank in self.present()]
                self.store.wait(keys, timedelta(seconds=FAREWELL))
        except (dist.DistError, LeftAlone):
            pass  # they end by their own time limits

    def present(self) -> list[int]:
        """Ranks that have answered so far, in order."""
        return [rank for rank in range(self.world_size) if rank not in self.silent]

    def gather(self, name: str, answer: str, among: Sequence[int] | None = None) -> dict[int, str]:
        """Answers of all processes that came in time, by rank; empty in all but the first process.

        Args:
            name: of the question, which is asked once.
            answer: of this process.
            among: ranks that are asked; default: all. The others wait along.

        Raises:
            LeftAlone: in a process that the first one no longer waits for, or that does not reach the first one.
        """
        self.guard()
        asked = [rank for rank in (range(self.world_size) if among is None else among) if rank not in self.silent]
        if self.rank in asked:
            self.say(f"{name}/{self.rank}", answer)
        if self.rank == 0:
            answers = self._collect(name, asked)
            self.silent |= set(asked) - answers.keys()
        else:
            answers = {}
        self.silent = set(json.loads(self.tell(f"{name}/silent", json.dumps(sorted(self.silent)))))
        if self.rank in self.silent:
            raise LeftAlone("this process answered too late, and the first one goes on without it")
        return answers

    def tell(self, name: str, said: str) -> str:
        """What the first process says, in all processes; what another says is not heard.

        Raises:
            LeftAlone: in a process that waits for twice the timeout in vain, or whose connection is lost.
        """
        if self.rank == 0:
            self.say(name, said)
            return said
        return self.hear(name, 2 * self.timeout + GRACE)

    def hear(self, name: str, seconds: float) -> str:
        """A message as soon as it is there.

        Raises:
            LeftAlone: where it does not come in time, or the connection is lost.
        """
        try:
            self.store.wait([name], timedelta(seconds=seconds))
            return self.store.get(name).decode()
        except dist.DistError as error:
            ended = isinstance(error, dist.DistNetworkError)
            late = f"says nothing of {name} within {seconds:.0f} s"
            raise LeftAlone(f"the first process {'has ended' if ended else late}") from error

    def guard(self) -> None:
        """End this process with its stack if it is still at the same question after three timeouts.

        That covers waits inside of drivers and file systems, which Python cannot end.
        """
        faulthandler.dump_traceback_later(3 * self.timeout + 2 * GRACE, exit=True, file=2)

    def say(self, name: str, said: str) -> None:
        """Leave a message.

        Raises:
            LeftAlone: where the connection is lost.
        """
        try:
            self.store.set(name, said)
        except dist.DistError as error:
            raise LeftAlone("the first process has ended") from error

    def _collect(self, name: str, asked: Sequence[int]) -> dict[int, str]:
        keys = {rank: f"{name}/{rank}" for rank in asked}
        if not keys:
            return {}
        try:
            self.store.wait(list(keys.values()), timedelta(seconds=self.timeout))
        except dist.DistError:
            keys = {rank: key for rank, key in keys.items() if self.store.check([key])}
        return {rank: self.store.get(key).decode() for rank, key in keys.items()}


def meet(launched: Launch, timeout: float, variables: Mapping[str, str] | None = None) -> Meeting:
    """The meeting of the processes of a launch; one alone meets itself.

    Args:
        launched: this process among them.
        timeout: seconds that the first process waits for the others, and they for it.
        variables: the environment; default: that of this process.

    Raises:
        ValueError: for a launch that does not say where its first process is, and in the first process for a port that
            is taken.
        LeftAlone: where the first process is not reached in time.
    """
    given: Mapping[str, str] = os.environ if variables is None else variables
    if launched.world_size == 1:
        return Meeting(HashStore(), 0, 1, timeout)
    host, port = address(launched, given)
    # torchrun itself runs a store at that address, and tells its processes so
    serves = launched.rank == 0 and given.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        store = TCPStore(
            host, port, is_master=serves, timeout=timedelta(seconds=timeout), wait_for_workers=False, multi_tenant=True
        )
    except dist.DistError as error:
        if serves:
            raise ValueError(
                f"port {port} of {host} cannot be opened: set MASTER_PORT to a free one ({_first_line(error)})"
            ) from error
        raise LeftAlone(
            f"rank 0 does not answer at {host}:{port} within {timeout:.0f} s: is that machine reached by this name, "
            "and that port not shut by a firewall (MASTER_ADDR, MASTER_PORT)?"
        ) from error
    return Meeting(PrefixStore(f"doctor/{launched.attempt}", store), launched.rank, launched.world_size, timeout)


def address(launched: Launch, given: Mapping[str, str]) -> tuple[str, int]:
    """Host and port at which the processes of a launch meet.

    Raises:
        ValueError: for a launcher that gives neither.
    """
    if launched.by == "srun":
        return rendezvous(given)
    host, port = given.get("MASTER_ADDR"), given.get("MASTER_PORT")
    if host is None or port is None or not port.isdigit():
        raise ValueError(
            f"{launched.world_size} processes were started, but MASTER_ADDR is {host} and MASTER_PORT {port}: start "
            "them with srun or torchrun, or set both to a host and a number"
        )
    return host, int(port)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:120]
