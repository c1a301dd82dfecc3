"""Progress of blocks that any number of processes do, as the folder tells that they are written to."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from lit_vlm.core.progress import progress
from lit_vlm.data.sets.parallel import Block
from lit_vlm.data.sets.shards import read_block

POLL = 1.0
"""Seconds between two looks."""
READING = 0.05
"""Seconds of a look in which facts of blocks are read: those of thousands that were done before take some minutes."""
REASONS = 3
"""Reasons that samples were left out for, most frequent first, of which the numbers are shown."""


@contextmanager
def shown(
    title: str, blocks: Sequence[Block], out: Path, done: Callable[[], Collection[int]], here: bool
) -> Iterator[None]:
    """Show how many records of all blocks are done, whoever did them, while the context lasts.

    Args:
        title: what is being done.
        blocks: all blocks.
        out: the folder that they are written to.
        done: gives the indices of blocks that are whole.
        here: False shows nothing, for all tasks but the first.
    """
    if not here:
        yield
        return
    sizes = {block.index: block.end - block.start for block in blocks}
    before = frozenset(done())
    ended = threading.Event()

    def tell() -> None:
        facts = _Facts(out, before)
        seen = sum(sizes[index] for index in before)
        with progress(title, sum(sizes.values()), seen) as advance:
            while True:
                last = ended.wait(POLL)
                whole = done()
                now = sum(sizes[index] for index in whole)
                facts.read(whole)
                advance(now - seen, facts.text())
                seen = now
                if last:
                    return

    thread = threading.Thread(target=tell, name="progress of blocks", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@dataclass
class _Facts:
    """What whole blocks say of themselves; each is read once.

    Attributes:
        out: the folder.
        before: blocks that were whole when this began; their bytes are not of its time.
    """

    out: Path
    before: frozenset[int]
    _start: float = field(default_factory=lambda: time.perf_counter())
    _known: set[int] = field(default_factory=set)
    _bytes: int = 0
    _bad: Counter[str] = field(default_factory=Counter)

    def read(self, whole: Collection[int]) -> None:
        """Read facts of blocks that were not read before, new ones first, as long as `READING`."""
        deadline = time.perf_counter() + READING
        for index in sorted(set(whole) - self._known, key=lambda index: (index in self.before, index)):
            self._known.add(index)
            try:
                facts = read_block(self.out, index)
            except ValueError:
                continue  # another task has put the blocks together by now
            self._bad.update(sample["reason"] for sample in facts.get("bad", ()))
            if index not in self.before:
                self._bytes += facts.get("bytes", 0)
            if time.perf_counter() > deadline:
                return

    def text(self) -> str:
        """Bytes per second, and samples left out by reason; nothing where blocks say neither."""
        parts = []
        if self._bytes:
            parts.append(_bytes_per_second(self._bytes / (time.perf_counter() - self._start)))
        if self._bad:
            most = self._bad.most_common(REASONS)
            reasons = [f"{reason} {count:,}" for reason, count in most] + ["..."] * (len(self._bad) > REASONS)
            parts.append(f"{self._bad.total():,} left out ({', '.join(reasons)})")
        return ", ".join(parts)


def _bytes_per_second(speed: float) -> str:
    unit, size = next(((unit, size) for unit, size in (("GB", 1e9), ("MB", 1e6)) if speed >= size), ("kB", 1e3))
    return f"{speed / size:.1f} {unit}/s"
