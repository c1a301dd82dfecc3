"""What a place in the network is: a list of files, each of which can be read from any byte on."""

from __future__ import annotations

import io
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import TypeVar

from lit_vlm.data.remote.address import Address

T = TypeVar("T")
ATTEMPTS = 6
"""How often in a row a request may fail that could succeed the next time."""
FIRST_WAIT = 0.5
"""Seconds before the second attempt; twice as long before each further one."""
TIMEOUT = (10.0, 60.0)
"""Seconds that a connection may take to stand, and to say nothing."""
PIECE = 1 << 18
"""Bytes that are taken from a connection at a time, and most that are lost with it."""


class Interrupted(OSError):
    """A request failed in a way that may be over soon: a cut connection, a server that is busy."""


class Changed(Exception):
    """A file is not the one that was listed any more."""


class Unreachable(ValueError):
    """A place did not answer, however often it was asked."""


@dataclass(frozen=True)
class Entry:
    """A file of a place.

    Attributes:
        path: its path there.
        size: bytes; -1 where the server does not say.
        tag: what the server tells versions of it apart by; "" where it does not.
        checksum: `sha256:`, `git:` (the SHA-1 of a git object) or `md5:` and hex digits; "" where none is known.
    """

    path: str
    size: int
    tag: str
    checksum: str


@dataclass(frozen=True)
class Listing:
    """The files below an address, and the revision they are of.

    Attributes:
        revision: the commit of a data set of the hub; "" elsewhere, where the tags of the files are all there is.
        entries: the files, sorted by path.
    """

    revision: str
    entries: tuple[Entry, ...]


class Store(ABC):
    """Reads one place.

    Args:
        address: what is read of it.
    """

    def __init__(self, address: Address) -> None:
        self.address = address

    @property
    def home(self) -> str:
        """What tells this place from others."""
        return self.address.place

    @abstractmethod
    def listing(self) -> Listing:
        """The file at the address, or all files below it.

        Raises:
            ValueError: in one line, where there is no such file or place, or none that may be read.
            Interrupted: where asking again may help.
        """

    @abstractmethod
    def stream(self, entry: Entry, start: int) -> Iterator[bytes]:
        """Yield the content of a file from a byte on.

        Raises:
            ValueError: in one line, where the file may not be read.
            Changed: where it is another one than was listed.
            Interrupted: where asking again may help.
        """

    def is_sound(self, entry: Entry) -> bool:
        """Whether a file whose content has another checksum than was listed is right all the same."""
        return False


def retried(ask: Callable[[], T], where: object) -> T:
    """The answer to a request, which is made again with growing pauses while it is interrupted.

    Raises:
        Unreachable: after `ATTEMPTS`, with the last reason.
    """
    for attempt in range(ATTEMPTS):
        try:
            return ask()
        except Interrupted as error:
            if attempt == ATTEMPTS - 1:
                raise Unreachable(f"{where} cannot be reached: {error}") from error
            pause(attempt)
    raise AssertionError("unreachable")


def pause(attempt: int) -> None:
    """Wait before the next attempt; processes that failed together do not come back together."""
    time.sleep(FIRST_WAIT * 2**attempt * random.uniform(0.5, 1.0))


def read(store: Store, entry: Entry, start: int = 0, most: int | None = None) -> bytes:
    """Bytes of a file from a byte on.

    Args:
        store: where it lies.
        entry: the file.
        start: the first byte.
        most: number of bytes; None: all that follow.

    Raises:
        ValueError: as `Store.stream` and `retried`.
        Changed: as `Store.stream`.
    """

    def ask() -> bytes:
        found = bytearray()
        with closing(store.stream(entry, start)) as pieces:  # type: ignore[type-var]
            for piece in pieces:
                found += piece
                if most is not None and len(found) >= most:
                    break
        return bytes(found if most is None else found[:most])

    return retried(ask, f"{store.address.root}/{entry.path}")


class RemoteFile(io.RawIOBase):
    """A file of a place as an open file, of which only what is read is fetched."""

    def __init__(self, store: Store, entry: Entry) -> None:
        self.store, self.entry, self.at = store, entry, 0

    def readable(self) -> bool:
        """Whether it can be read: yes."""
        return True

    def seekable(self) -> bool:
        """Whether it can be read from any place: yes."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a byte."""
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.entry.size}[whence]
        return self.at

    def tell(self) -> int:
        """The byte that is read next."""
        return self.at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fill a buffer, as far as the file goes."""
        want = min(len(buffer), self.entry.size - self.at)
        content = read(self.store, self.entry, self.at, want) if want > 0 else b""
        buffer[: len(content)] = content
        self.at += len(content)
        return len(content)
