"""Progress: a bar in a terminal, a line every few seconds elsewhere, so that no long work is silent."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

SECONDS = 5.0
"""Least time between two lines of progress where there is no terminal."""

PATIENCE = 2.0
"""Seconds of silence after which work of unknown length is named."""


class Advance(Protocol):
    """Says how far work has come."""

    def __call__(self, count: int, note: str = "") -> None:
        """Take note of progress.

        Args:
            count: number of items that were done since the last call.
            note: what else is to be shown behind the rate.
        """


@contextmanager
def slowly(title: str, shown: bool = True) -> Iterator[None]:
    """Name the work inside the context on the terminal, if it takes long enough to look like a hang.

    Args:
        title: what is being done; ` ...` is put behind it.
        shown: False says nothing, for all processes but the first.
    """
    teller = threading.Timer(PATIENCE, lambda: sys.stderr.write(f"{title} ...\n"))
    teller.daemon = True
    if shown:
        teller.start()
    try:
        yield
    finally:
        teller.cancel()


@contextmanager
def progress(title: str, total: int, done: int = 0, shown: bool = True) -> Iterator[Advance]:
    """Show how far work has come, as a context manager.

    Args:
        title: what is being done.
        total: number of items of the whole work.
        done: items that were done before.
        shown: False shows nothing, for all processes but the first.

    Yields:
        a function to call with the number of items that were done since its last call.
    """
    console = Console(highlight=False)
    if not shown:
        yield _nothing
    elif console.is_terminal:
        with _bar(console) as bar:
            task = bar.add_task(title, total=total, completed=done, rate="", note="")

            def advance(count: int, note: str = "") -> None:
                bar.advance(task, count)
                speed = bar.tasks[task].finished_speed or bar.tasks[task].speed
                bar.update(task, rate=_rate(speed) if speed else "", note=note)

            yield advance
    else:
        lines = _Lines(console, title, total, done)
        yield lines.advance
        lines.end()


def _nothing(count: int, note: str = "") -> None:
    """Progress that nobody sees."""


def _bar(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )


class _Lines:
    """Progress as lines of text: at the start, every few seconds, and at the end of work that took longer than that."""

    def __init__(self, console: Console, title: str, total: int, done: int) -> None:
        self.console, self.title, self.total, self.done = console, title, total, done
        self.before = done
        self.note = ""
        self.start = self.last = time.perf_counter()
        self._line()

    def advance(self, count: int, note: str = "") -> None:
        self.done += count
        self.note = note
        if time.perf_counter() - self.last > SECONDS:
            self.last = time.perf_counter()
            self._line()

    def end(self) -> None:
        if (seconds := time.perf_counter() - self.start) > SECONDS:
            self._line(f" ({seconds:.0f} s)")

    def _line(self, more: str = "") -> None:
        speed = (self.done - self.before) / (time.perf_counter() - self.start or 1)
        if speed:
            left = f", {_duration((self.total - self.done) / speed)} left" if self.done < self.total else more
            more = f", {_rate(speed)}{left}"
        if self.note:
            more += f", {self.note}"
        self.console.print(f"{self.title}: {self.done:,} of {self.total:,}{more}", soft_wrap=True)


def _rate(speed: float) -> str:
    return f"{speed:,.0f}/s" if speed >= 10 else f"{speed:.1f}/s"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
