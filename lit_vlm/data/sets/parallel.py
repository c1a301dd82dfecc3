"""Work on blocks of records in several processes, with a progress bar."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lit_vlm.core.launcher import ASKING
from lit_vlm.core.progress import progress

if TYPE_CHECKING:
    from lit_vlm.data.sets.engine import Engine


@dataclass(frozen=True)
class Block:
    """Records `start` to `end` (exclusive), the `index`-th block."""

    index: int
    start: int
    end: int


def blocks_of(count: int, size: int) -> list[Block]:
    """Blocks of `size` records; the last may be shorter."""
    return [Block(i, start, min(start + size, count)) for i, start in enumerate(range(0, count, size))]


def heed_parent_alone(worker: int) -> None:
    """Let a loader process ignore signals that ask a run to leave, unless its parent ends it: `worker_init_fn`.

    A launcher signals all processes of a job. The one that trains saves first, and needs its data until then.

    Args:
        worker: number of the process.
    """
    for one in ASKING:
        if one != signal.SIGTERM:
            signal.signal(one, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS, where a worker goes with the signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        continue
    os._exit(0)


def map_blocks(
    blocks: Sequence[Block],
    function: Callable[[Block], Any],
    engine: Engine,
    title: str,
    needs: Sequence[str] = (),
) -> Iterator[Any]:
    """Yield the result of each block, in order.

    Args:
        blocks: blocks that are to be done.
        function: block → result, run in a worker; it pickles, and so does its result.
        engine: starts the workers.
        title: of the progress bar.
        needs: paths that all workers must see (`engine.paths_of`).

    Raises:
        ValueError: for a worker that cannot take part, saying why.
    """
    results = engine.map(function, blocks, needs)
    with progress(title, sum(block.end - block.start for block in blocks)) as advance:
        for block, result in zip(blocks, results, strict=True):
            advance(block.end - block.start)
            yield result
