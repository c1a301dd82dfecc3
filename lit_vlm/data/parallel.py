"""Work on blocks of records in several processes, with a progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from torch.utils.data import DataLoader, Dataset


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


def run_blocks(
    blocks: Sequence[Block], function: Callable[[Block], Any], workers: int, title: str, done: int = 0
) -> Iterator[Any]:
    """The result of each block, in order.

    Args:
        blocks: what is to be done.
        function: run in a worker; it pickles, and so does its result.
        workers: processes; 0 works in this one.
        title: of the progress bar, which goes to the terminal only.
        done: records that were done before.
    """
    loader = DataLoader(_Work(blocks, function), batch_size=1, num_workers=min(workers, len(blocks)), collate_fn=_one)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        total = done + sum(block.end - block.start for block in blocks)
        task = progress.add_task(title, total=total, completed=done, rate="")
        for block, result in zip(blocks, loader, strict=True):
            progress.advance(task, block.end - block.start)
            speed = progress.tasks[task].finished_speed or progress.tasks[task].speed
            progress.update(task, rate=f"{speed:,.0f}/s" if speed else "")
            yield result
