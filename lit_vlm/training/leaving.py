"""Leaving in order: a run that is asked to leave does so between two optimizer steps, on all processes alike."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from lit_vlm.core.launcher import PREEMPTED
from lit_vlm.core.transfer import Fetched, send_numbers


class Preempted(SystemExit):
    """The end of a run that was asked to leave and can go on: the process exits with `launcher.PREEMPTED`.

    Args:
        reason: why it was asked.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(PREEMPTED)
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


class Leaving:
    """Whether a run has been asked to leave, which its processes agree on before each batch.

    One process may be asked before another, and a save is the work of all, so each tells the others its flag in a sum
    over all processes. The sum is read one batch later, when it has long arrived: no process waits for it.

    Attributes:
        reason: why this process was asked to; None while it was not.
        late: whether the time is up, asked before each batch.
        go: saves and reports, for a reason; set by who does so.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self.late: Callable[[], str | None] | None = None
        self.go: Callable[[str], None] | None = None
        self._told: Fetched | None = None
        self._agreed = False

    def ask(self, reason: str) -> None:
        """Ask this process to leave; it does so with the others, between two optimizer steps."""
        self.reason = self.reason or reason

    def agreed(self, world_size: int, device: torch.device) -> bool:
        """Exchange flags, and say whether the processes leave; all call it equally often.

        Args:
            world_size: number of processes.
            device: of this process.
        """
        if self.reason is None and self.late is not None and (reason := self.late()) is not None:
            self.ask(reason)
        if world_size == 1:
            return self.reason is not None
        if not self._agreed:
            flag = send_numbers([float(self.reason is not None)], device)
            dist.all_reduce(flag)
            before, self._told = self._told, Fetched(flag)
            self._agreed = before is not None and bool(before.get())
        return self._agreed

    def leave(self) -> None:
        """Save, if there is someone who does, and leave.

        Raises:
            Preempted: always.
        """
        reason = self.reason or "another process was asked to leave"
        if self.go is not None:
            self.go(reason)
        raise Preempted(reason)

    def forget(self) -> None:
        """Begin anew, for another fit with the same trainer."""
        self.reason, self._told, self._agreed = None, None, False
