"""Signs of life between the processes of a run, by which the loss of one is known to all within seconds.

Each process keeps a connection to rank 0, beside those of torch: a collective that waits for a lost process does not
hold it up. The end of a process closes its connection at once; one that is stopped, or on a machine that is gone, is
silent.
"""

from __future__ import annotations

import secrets
import selectors
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from lit_vlm.training.signs import MOST_BYTES, Line, Meeting, State, Verdict

BEAT = 2.0
"""Seconds between two signs of life."""
PAUSE = 5.0
"""Seconds by which a look is late when this process itself was stopped: others were then perhaps stopped, too."""
CONNECT = 20.0
"""Seconds in which the connection to rank 0 must be made."""


class Peers:
    """The other processes of a run, as one of them sees them; by itself, none.

    All methods but `wake` are for one thread.

    Args:
        rank: of this process.
        nodes: names of the machines of all ranks.
        silence: seconds after which a silent process counts as lost.
    """

    def __init__(self, rank: int, nodes: Sequence[str], silence: float) -> None:
        self.rank, self.nodes, self.silence = rank, list(nodes), silence
        self.state, self.changed = State(), time.monotonic()
        self._selector = selectors.DefaultSelector()
        self._woken, self._wake = socket.socketpair()
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._looked = self._told = time.monotonic()

    def name(self, rank: int) -> str:
        """A rank with its machine, for messages."""
        return f"rank {rank} on node {self.nodes[rank]}"

    def wake(self) -> None:
        """End a look of another thread."""
        self._wake.send(b".")

    def look(self, state: State, seconds: float = BEAT) -> Verdict | None:
        """Exchange signs of life for some seconds, or until there is news.

        Returns:
            what the end of this process is to be, if anything.
        """
        if state != self.state:
            self.state, self.changed = state, time.monotonic()
        if time.monotonic() - self._told >= BEAT:
            self._told = time.monotonic()
            self._beat()
        found = self._read(seconds)
        now = time.monotonic()
        if now - self._looked > seconds + PAUSE:
            self._forgive(now)
        self._looked = now
        return found or self._silent(now)

    def tell(self, verdict: Verdict) -> None:
        """Let all others know."""

    def behind(self) -> int | None:
        """The rank that has done least; None where none is behind the others."""
        return None

    def may_be_slow(self) -> bool:
        """Whether a process is at something that may take long."""
        return self.state.slow

    def decides(self) -> bool:
        """Whether no other process decides that nothing happens any more."""
        return True

    def leave(self) -> None:
        """Let the others know that this process leaves in order, and close all."""
        self.close()

    def linger(self, seconds: float) -> None:
        """Wait until the others are gone, for some seconds at most."""

    def close(self) -> None:
        """Close all; in a fork, that of the process which was forked stays open."""
        for one in (self._selector, self._woken, self._wake):
            one.close()

    def _read(self, seconds: float) -> Verdict | None:
        """What comes within some seconds, as far as it decides."""
        found = None
        for key, _ in self._selector.select(seconds):
            if key.fileobj is self._woken:
                self._woken.recv(MOST_BYTES)
            else:
                found = found or self._handle(key.fileobj)
        return found

    def _beat(self) -> None:
        """Send a sign of life."""

    def _handle(self, ready: Any) -> Verdict | None:
        """Take what a connection has for this process."""
        raise NotImplementedError

    def _silent(self, now: float) -> Verdict | None:
        """A process that has been silent for too long."""
        return None

    def _forgive(self, now: float) -> None:
        """Count silence from now on, as this process was stopped itself."""
        self.changed = now

    def _gone(self, rank: int, why: str) -> Verdict:
        return Verdict("lost", rank, f"{self.name(rank)} is gone: {why}")


class Hub(Peers):
    """What rank 0 sees: it hears all others, decides, and tells them."""

    def __init__(self, nodes: Sequence[str], silence: float) -> None:
        super().__init__(0, nodes, silence)
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        self._listener = socket.create_server(("", 0), family=family, backlog=len(nodes), dualstack_ipv6=both)
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._lines: list[Line] = []
        self._word = secrets.token_hex(16)

    def meeting(self, host: str) -> Meeting:
        """Where the others find this one, under a name of this machine."""
        return Meeting(host, self._listener.getsockname()[1], self._word)

    def tell(self, verdict: Verdict) -> None:
        """Let all others know."""
        for line in self._lines:
            line.send(verdict=verdict)

    def behind(self) -> int | None:
        """The rank that has done least; None where none is behind the others."""
        done = {0: self.state.signs} | {line.rank: line.state.signs for line in self._known()}
        last = min(done, key=lambda rank: (done[rank], rank))
        return last if done[last] < max(done.values()) else None

    def may_be_slow(self) -> bool:
        """Whether a process is at something that may take long."""
        return self.state.slow or any(line.state.slow for line in self._known())

    def leave(self) -> None:
        """Let the others know that this process leaves in order, and close all."""
        for line in self._lines:
            line.send(left=True)
        super().leave()

    def linger(self, seconds: float) -> None:
        """Wait until the others are gone, for some seconds at most: what they were told must reach them."""
        end = time.monotonic() + seconds
        while self._known() and (left := end - time.monotonic()) > 0:
            self._read(left)

    def close(self) -> None:
        """Close all; in a fork, that of the process which was forked stays open."""
        super().close()
        for one in (self._listener, *(line.connection for line in self._lines)):
            one.close()

    def _known(self) -> list[Line]:
        return [line for line in self._lines if line.rank > 0]

    def _beat(self) -> None:
        for line in self._known():
            line.send(beat=True)

    def _handle(self, ready: Any) -> Verdict | None:
        if ready is self._listener:
            with suppress(OSError):
                line = Line(self._listener.accept()[0])
                self._lines.append(line)
                self._selector.register(line, selectors.EVENT_READ)
            return None
        found = None
        try:
            for message in ready.receive():
                taken = self._take(ready, message)
                found = found or taken
        except (ValueError, TypeError):  # a stranger
            ready.closed = True
        if ready.closed:
            known = ready.rank > 0
            self._drop(ready)
            if known and found is None:
                found = self._gone(ready.rank, "its process ended")
                self.tell(found)
        return found

    def _take(self, line: Line, message: dict[str, Any]) -> Verdict | None:
        if line.rank < 0 and message.get("word") == self._word:
            line.rank = int(message["rank"])
        elif line.rank < 0:
            line.closed = True
        elif "state" in message:
            state = State(*message["state"])
            if state != line.state:
                line.state, self.changed = state, time.monotonic()
        elif "verdict" in message:
            verdict = Verdict(*message["verdict"])
            self.tell(verdict)
            return verdict
        elif "left" in message:
            line.rank, line.closed = -1, True
        return None

    def _drop(self, line: Line) -> None:
        self._selector.unregister(line)
        self._lines.remove(line)
        line.connection.close()

    def _silent(self, now: float) -> Verdict | None:
        for line in self._known():
            if now - line.heard > self.silence:
                found = self._gone(line.rank, f"no sign of life for {self.silence:g} s")
                self._drop(line)
                self.tell(found)
                return found
        return None

    def _forgive(self, now: float) -> None:
        super()._forgive(now)
        for line in self._lines:
            line.heard = now


class Spoke(Peers):
    """What another process than rank 0 sees: rank 0, and what that one tells of the others.

    Args:
        rank: of this process.
        nodes: names of the machines of all ranks.
        silence: seconds after which a silent process counts as lost.
        meeting: where rank 0 listens.

    Raises:
        OSError: when there is no way to rank 0.
    """

    def __init__(self, rank: int, nodes: Sequence[str], silence: float, meeting: Meeting) -> None:
        super().__init__(rank, nodes, silence)
        self._line: Line | None = Line(socket.create_connection(meeting[:2], timeout=CONNECT))
        self._line.send(rank=rank, word=meeting.word)
        self._selector.register(self._line, selectors.EVENT_READ)

    def decides(self) -> bool:
        """Whether no other process decides that nothing happens any more: rank 0 has left."""
        return self._line is None

    def tell(self, verdict: Verdict) -> None:
        """Let all others know, by rank 0."""
        if self._line is not None:
            self._line.send(verdict=verdict)

    def leave(self) -> None:
        """Let the others know that this process leaves in order, and close all."""
        if self._line is not None:
            self._line.send(left=True)
        super().leave()

    def close(self) -> None:
        """Close all; in a fork, that of the process which was forked stays open."""
        super().close()
        if self._line is not None:
            self._line.connection.close()

    def _beat(self) -> None:
        if self._line is not None:
            self._line.send(state=self.state)

    def _handle(self, ready: Any) -> Verdict | None:
        for message in ready.receive():
            if "verdict" in message:
                return Verdict(*message["verdict"])
            if "left" in message:
                self._forget()
                return None
        if ready.closed:
            self._forget()
            return self._gone(0, "its process ended")
        return None

    def _forget(self) -> None:
        assert self._line is not None
        self._selector.unregister(self._line)
        self._line.connection.close()
        self._line = None

    def _silent(self, now: float) -> Verdict | None:
        if self._line is not None and now - self._line.heard > self.silence:
            return self._gone(0, f"no sign of life for {self.silence:g} s")
        return None

    def _forgive(self, now: float) -> None:
        super()._forgive(now)
        if self._line is not None:
            self._line.heard = now
