"""Processes of this machine that do shared blocks; one that dies costs the block that it was at, and is replaced."""

from __future__ import annotations

import os
import pickle
import sys
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from torch import multiprocessing

DEATHS = 3
"""How often processes may die until that is an error, if no other one ended well in between."""

Sweep = Callable[[int], Iterator[Any]]
"""(number of the process) → what it does, one step at a time; it pickles."""


class Sweepers:
    """Processes that each do a `Sweep`; they start at once.

    Args:
        sweep: what they do.
        count: how many there are.
    """

    def __init__(self, sweep: Sweep, count: int) -> None:
        self._sweep = sweep
        # Forked before this process has threads of its own; those that come later are made afresh.
        self._running = dict(self._started(number, "fork") for number in range(count))

    def _started(self, number: int, method: str) -> tuple[Connection, tuple[int, Any]]:
        context: Any = multiprocessing.get_context(method)
        own, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_run, args=(self._sweep, number, theirs, os.getpid()), daemon=True)
        process.start()
        theirs.close()
        return own, (number, process)

    def join(self) -> None:
        """Return when all have ended.

        Raises:
            ValueError: when they died again and again.
            Exception: what one of them raised; the others are ended then.
        """
        deaths = 0
        try:
            while self._running:
                ready: list[Any] = wait(list(self._running))
                for pipe in ready:
                    number, process = self._running.pop(pipe)
                    ended = _answered(pipe)
                    process.join()
                    deaths = 0 if ended else deaths + 1
                    if not ended:
                        self._replace(number, process.exitcode, deaths)
        finally:
            for _, process in self._running.values():
                process.terminate()
                process.join()

    def _replace(self, number: int, code: int, deaths: int) -> None:
        how = f"was ended by signal {-code}" if code < 0 else f"ended with status {code}"
        if deaths >= DEATHS:
            raise ValueError(
                f"worker processes died {DEATHS} times, the last one {how} (9: often for want of memory, so take fewer "
                "--workers); blocks that are whole are kept, and the same command goes on"
            )
        sys.stderr.write(f"a worker process {how}; another one does its block again\n")
        pipe, entry = self._started(number, "spawn")
        self._running[pipe] = entry


def _answered(pipe: Connection) -> bool:
    """Whether a process ended well, and did not die; raises what it raised."""
    try:
        error, text = pickle.loads(pipe.recv_bytes())
    except EOFError:
        return False
    finally:
        pipe.close()
    if error is None:
        return True
    error.add_note(f"in a worker process:\n{text}")
    raise error


def _run(sweep: Sweep, number: int, pipe: Connection, parent: int) -> None:
    torch.set_num_threads(1)
    try:
        for _ in sweep(number):
            if os.getppid() != parent:  # nobody waits for it any more
                return
    except KeyboardInterrupt:  # the terminal asks all processes; the first one says so
        return
    except Exception as error:
        pipe.send_bytes(_pickled(error))
    else:
        pipe.send_bytes(pickle.dumps((None, "")))


def _pickled(error: Exception) -> bytes:
    """The error and its traceback; an error that cannot be made again becomes a RuntimeError with its text."""
    text = traceback.format_exc()
    try:
        content = pickle.dumps((error, text))
        pickle.loads(content)
    except Exception:
        return pickle.dumps((RuntimeError(f"{type(error).__name__}: {error}"), text))
    return content
