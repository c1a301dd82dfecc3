"""Processes that a command starts: they die with it."""

from __future__ import annotations

import ctypes
import signal
import sys

GENERATION = "LIT_VLM_GENERATION"
"""Environment variable: number of a stage among those that a process has started."""


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent dies, so that no orphan goes on writing into a run.

    For `preexec_fn`. The parent is the thread that started it, so only one that stays may do so.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
