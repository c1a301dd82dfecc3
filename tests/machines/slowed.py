"""`python -m tests.machines.slowed SHARE WORDS...`: `lit-vlm WORDS` in a process that runs a share of the time."""

from __future__ import annotations

import os
import signal
import sys
import time

import lit_vlm.cluster.checkup  # noqa: F401 - what is slow to import is not to be slowed
from lit_vlm.commands.cli import main

PERIOD = 0.5
"""Seconds; long, because a busy machine lets the process run on for a while before it is stopped again."""


def throttle(pid: int, share: float) -> int:
    """Stop a process and let it go on, time and again, until it ends; returns its exit code."""
    while True:
        for number, seconds in ((signal.SIGSTOP, PERIOD * (1 - share)), (signal.SIGCONT, PERIOD * share)):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
            os.kill(pid, number)
            time.sleep(seconds)


if __name__ == "__main__":
    if child := os.fork():
        sys.exit(abs(throttle(child, float(sys.argv[1]))))
    main(sys.argv[2:])
