"""The cache folder: results that are made once on this machine and read again by later runs.

It may be a folder of one machine, or one that several share. So whatever is put there is written aside and renamed, and
made by one process while others wait.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lit_vlm.core.lease import Lease

PATIENCE = 120.0
"""Seconds without a sign of life after which the lock of a process on another machine is taken over."""
SILENT = 2.0
"""Seconds that a process waits for a lock before it says so."""
POLL, SLOW_POLL = 0.1, 0.5
"""Seconds between two looks at the lock of another process, before a process says that it waits and after."""


def cache_dir() -> Path:
    """The folder of converted weights and rendered data sets: `LIT_VLM_CACHE`, or ~/.cache/lit-vlm; made if absent."""
    path = Path(os.environ.get("LIT_VLM_CACHE", Path.home() / ".cache" / "lit-vlm"))
    path.mkdir(parents=True, exist_ok=True)
    return path


@contextmanager
def held(lock: Path, doing: str) -> Iterator[None]:
    """Hold a lock among all processes that share a folder, as a context manager.

    It is a file that is touched now and then, as not every shared file system has locks. That of a dead process is
    taken over (`core.lease`). Two processes hold it where one that seemed dead was not, so what they write must be
    whole at once, and the same.

    Args:
        lock: the file, `.lease`: locks of earlier versions, `.lock`, stay behind and would never be given up.
        doing: what the process does that holds it, for the line of those that wait: "draws pictures".

    Raises:
        OSError: where the file cannot be written.
    """
    lease = Lease(lock, PATIENCE)
    since, silent = time.monotonic(), True
    while not lease.take():
        if silent and time.monotonic() - since > SILENT:
            silent = False
            sys.stderr.write(f"waiting for another process, which {doing}\n")
        time.sleep(POLL if silent else SLOW_POLL)
    try:
        yield
    finally:
        lease.release()
