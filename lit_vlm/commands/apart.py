"""Work that needs the large libraries, done in a process of its own, so that the one that waits stays small."""

from __future__ import annotations

import multiprocessing
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import TypeVar

from lit_vlm.commands.fit import in_one_line

Given = TypeVar("Given")
Result = TypeVar("Result")


def apart(function: Callable[[Given], Result], given: Given) -> Result:
    """What a function returns that runs in a fork of this process.

    Args:
        function: the work; what it returns pickles.
        given: its argument.

    Raises:
        SystemExit: where it raised a ValueError or OSError, which the process has reported in one line.
    """
    context = multiprocessing.get_context("fork")
    results, sends = context.Pipe(duplex=False)
    child = context.Process(target=_work, args=(function, given, sends))
    child.start()
    sends.close()
    try:
        found: list[Result] = [results.recv()]
    except EOFError:  # it has failed
        found = []
    child.join()
    if child.exitcode is not None and child.exitcode < 0:
        sys.stderr.write(f"\nerror: a process was ended by {signal.Signals(-child.exitcode).name}: is memory short?\n")
        raise SystemExit(128 - child.exitcode)
    if child.exitcode or not found:
        raise SystemExit(child.exitcode or 1)
    return found[0]


def _work(function: Callable[[Given], Result], given: Given, results: Connection) -> None:
    with in_one_line():
        results.send(function(given))
