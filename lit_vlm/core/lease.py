"""Leases: a file says which process does a piece of work that several could do, on one machine or on many.

A lease is a file with the holder's name in it, which the holder touches now and then; it asks nothing of a file
system but files, as not every shared one has locks. That of a dead process is taken over: at once on its own machine
unless the file system is NFS, elsewhere after a while without a touch.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from pathlib import Path

from filelock import SoftFileLease, Timeout


class Lease:
    """A claim on a piece of work, held until `release`, or until the object or its process is gone.

    Two processes can hold it for a moment, where one that seemed dead was not: `is_lost` tells that one.

    Args:
        path: the file.
        patience: seconds without a touch after which the holder counts as dead; all processes must give the same.
    """

    def __init__(self, path: Path, patience: float) -> None:
        self.path, self.patience = path, patience
        self._lease = SoftFileLease(path, lease_duration=patience)
        self._seen: tuple[tuple[int, int, int] | None, float] = (None, 0.0)

    def take(self) -> bool:
        """Take it if nobody has it, without waiting; whether it is this process's now.

        Raises:
            OSError: where the file cannot be written.
        """
        if self._acquired():
            return True
        # The library leaves two kinds of dead holders alone for ever: one that was killed before it wrote its name,
        # and each on a file system that cannot exchange two names in one step, as NFS.
        marker = self._untouched()
        if marker is None:
            return False
        self._remove(marker)
        return self._acquired()

    def release(self) -> None:
        """Give it up; nothing where it is not held."""
        self._lease.release()

    @property
    def is_lost(self) -> bool:
        """Whether another process has taken it over since it was taken here."""
        return self._lease.compromise is not None

    def _acquired(self) -> bool:
        try:
            self._lease.acquire(timeout=0)
        except Timeout:
            return False
        return True

    def _untouched(self) -> tuple[int, int, int] | None:
        """What tells the file from others, if this object has seen it untouched for longer than `patience`.

        Only a clock of this process counts, as the file's times are those of another machine.
        """
        try:
            marker = _identity(self.path)
        except OSError:  # it is gone, or the network has a hiccup
            return None
        now = time.monotonic()
        if marker != self._seen[0]:
            self._seen = (marker, now)
        return marker if now - self._seen[1] > self.patience else None

    def _remove(self, marker: tuple[int, int, int]) -> None:
        """Remove the file, unless it is another one by now: then it comes back."""
        aside = self.path.with_name(f"{self.path.name}.{uuid.uuid4().hex}.stale")
        try:
            self.path.rename(aside)
        except OSError:  # another process was faster, or the file is not ours to remove
            return
        try:
            judged = _identity(aside)[:2] == marker[:2]
        except OSError:  # a network's hiccup; it is the one that was judged but for a race
            judged = True
        if judged:
            aside.unlink(missing_ok=True)
            return
        try:
            os.link(aside, self.path)
            aside.unlink()
        except FileExistsError:
            aside.unlink()
        except OSError:  # a file system without links, or another user's file
            with contextlib.suppress(OSError):
                aside.rename(self.path)


def _identity(path: Path) -> tuple[int, int, int]:
    found = path.lstat()
    return found.st_ino, found.st_mtime_ns, found.st_ctime_ns
