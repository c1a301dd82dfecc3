"""Work on blocks of records in several processes, with a progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader, Dataset

from lit_vlm.core.progress import progress


@dataclass(frozen=True)
class Block:
    """Records `start` to `end` (exclusive), the `index`-th block."""

    index: int
    start: int
    end: int


def blocks_of(count: int, size: int) -> list[Block]:
    """Blocks of `size` records; the last may be shorter."""
    return [Block(i, start, min(start + size, count)) for i, start in enumerate(range(0, count, size))]


class _Work(Dataset[Any]):
    def __init__(self, blocks: Sequence[Block], function: Callable[[Block], Any]) -> None:
        self.blocks, self.function = list(blocks), function

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> Any:
        return self.function(self.blocks[index])


def _one(items: Sequence[Any]) -> Any:
    return items[0]


@contextmanager
def progress_bar(title: str, blocks: Sequence[Block], missing: Sequence[Block]) -> Iterator[Callable[[Block], None]]:
    """Show progress over the records of blocks, as a context manager.

    Args:
        title: what is being done.
        blocks: all blocks.
        missing: the blocks that were not done before.

    Yields:
        a function to call with each block that is done.
    """
    total, left = (sum(block.end - block.start for block in some) for some in (blocks, missing))
    with progress(title, total, total - left) as advance:
        yield lambda block: advance(block.end - block.start)


def map_blocks(
    blocks: Sequence[Block],
    function: Callable[[Block], Any],
    workers: int,
    title: str,
    done: Sequence[Block] = (),
) -> Iterator[Any]:
    """Yield the result of each block, in order.

    Args:
        blocks: blocks that are to be done.
        function: block → result, run in a worker; it pickles, and so does its result.
        workers: number of processes; 0 works in this one.
        title: of the progress bar.
        done: blocks that were done before.
    """
    loader = DataLoader(_Work(blocks, function), batch_size=1, num_workers=min(workers, len(blocks)), collate_fn=_one)
    with progress_bar(title, [*done, *blocks], blocks) as advance:
        for block, result in zip(blocks, loader, strict=True):
            advance(block)
            yield result
