"""Peak memory of a piece of work."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path


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
