"""What the benchmarks share: ratios of times, peaks of memory, tables."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lit_vlm.core.precision import choose

ROUNDS = 7
PRECISION = choose("cpu")
"""What this machine is fast in: tables name it."""


def ratios(functions: Mapping[str, Callable[[], None]]) -> dict[str, float]:
    """Median time of each over that of the first, in turns."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(ROUNDS + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if turn:  # the first round warms up
                times[name].append(time.perf_counter() - start)
    base = times[next(iter(functions))]
    return {name: statistics.median(a / b for a, b in zip(own, base, strict=True)) for name, own in times.items()}


def added_mib(work: Callable[[], object]) -> float:
    """MiB by which the work raises the peak of this process, over what it holds before.

    From Linux's high-water mark, which is reset first. `resource.getrusage` will not do: it keeps the peak of the
    process that this one was started from.
    """
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    work()
    return (_status("VmHWM") - before) / 1024


def _status(key: str) -> int:
    match = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1])


def show(title: str, unit: str, values: Mapping[str, float], digits: int = 2) -> None:
    """Print a table of one number for each name."""
    table = Table(title=title)
    table.add_column("")
    table.add_column(unit, justify="right")
    for name, value in values.items():
        table.add_row(name, f"{value:,.{digits}f}")
    Console(width=130).print(table)
