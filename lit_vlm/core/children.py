"""Processes of `lit-vlm` that a command starts: they die with it."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

GENERATION = "LIT_VLM_GENERATION"
"""Environment variable: number of a stage among those that a process has started."""
PARENT = "LIT_VLM_PARENT"
"""Environment variable: id of the process that this one is to die with; it is gone once the process has read it."""


def start_lit_vlm(
    words: Sequence[str], environment: Mapping[str, str], log: IO[bytes] | None = None
) -> subprocess.Popen[bytes]:
    """Start `lit-vlm` in a process that dies with the thread which calls this.

    Args:
        words: its arguments.
        environment: variables besides those of this process.
        log: file that gets what it prints. Such a process reads nothing and gets no signal of the terminal; without a
            log it shares all that with this one.
    """
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "lit_vlm", *words],
        env={**os.environ, **environment, PARENT: str(os.getpid())},
        stdin=None if log is None else subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=log is not None,
    )


def die_with_parent() -> None:
    """Ask Linux to kill this process when the one dies that started it, so that no orphan goes on writing into a run.

    The process asks for itself: code that runs between a fork and the new program (`preexec_fn`) waits for ever where
    another thread of the parent held a lock at that moment.
    """
    parent = os.environ.pop(PARENT, None)
    if parent is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    # It may have died before; a wrapper of the interpreter may stand in between.
    if int(parent) != os.getppid() and int(parent) not in _living_ancestors():
        sys.stderr.write("lit-vlm: the process that started this one has ended, and so does this one\n")
        sys.stderr.flush()
        os.kill(os.getpid(), signal.SIGKILL)


def _living_ancestors() -> set[int]:
    """Ids of the parent, its parent and so on, up to one that is dead and only waits to be noticed."""
    found: set[int] = set()
    process = os.getppid()
    while process > 0:
        try:
            state, above = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[:2]
        except OSError:  # it ended just now
            break
        if state in "ZX":
            break
        found.add(process)
        process = int(above)
    return found
