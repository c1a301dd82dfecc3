"""What processes of a run tell each other of themselves, and the connection on which they do."""

from __future__ import annotations

import json
import socket
import time
from contextlib import suppress
from typing import Any, Literal, NamedTuple

MOST_BYTES = 65_536
"""Bytes of lines that are read at a time; a line that is longer comes from a stranger."""


class Verdict(NamedTuple):
    """Why the processes of a run end.

    Attributes:
        kind: a process is gone, has failed and said so, or nothing happens any more.
        rank: of the process that it is about.
        reason: a line for people.
    """

    kind: Literal["lost", "failed", "hung"]
    rank: int
    reason: str


class Meeting(NamedTuple):
    """Where rank 0 listens, and the word by which its own processes are known from strangers."""

    host: str
    port: int
    word: str


class State(NamedTuple):
    """What a sign of life says of a process.

    Attributes:
        signs: number of things that it has done, such as batches.
        slow: whether it does something that may take long.
    """

    signs: int = 0
    slow: bool = True


class Line:
    """A connection on which lines of JSON come and go, none of them waited for."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.connection, self.closed = connection, False
        self.rank, self.heard, self.state = -1, time.monotonic(), State()
        self._rest = b""

    def fileno(self) -> int:
        """The descriptor, for a selector."""
        return self.connection.fileno()

    def send(self, **message: Any) -> None:
        """Send a line; what an end that is gone or does not read would have been told is left out."""
        with suppress(OSError):
            self.connection.send(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]]:
        """The lines that have come, and whether the other end is gone, as `closed`.

        Raises:
            ValueError: for lines that are no objects of JSON: this end is not of the run.
        """
        try:
            while data := self.connection.recv(MOST_BYTES):
                self._rest += data
                if len(self._rest) > MOST_BYTES:  # a stranger
                    break
            self.closed = True
        except BlockingIOError:
            pass
        except OSError:
            self.closed = True
        *lines, self._rest = self._rest.split(b"\n")
        if lines:
            self.heard = time.monotonic()
        messages = [json.loads(line) for line in lines]
        if not all(isinstance(message, dict) for message in messages):
            raise ValueError("a line is no object")
        return messages
