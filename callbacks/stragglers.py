"""Which process is slower than the others, and what takes its time."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import lightning.pytorch as L
import torch
import torch.distributed as dist
from torch.utils.hooks import RemovableHandle

from lit_vlm.core.batch import Batch
from lit_vlm.core.launcher import launch
from lit_vlm.core.transfer import on_host
from lit_vlm.training.module import LitVLM

EVERY = 4
"""One block in so many is timed."""

log = logging.getLogger(__name__)


class Stragglers(L.Callback):
    """Logs, each `log_every_n_steps`, how the slowest process compares with the others, and names one that stays slow:

    - `straggler/slowest_over_median`: its time for a batch over the median of the others;
    - `straggler/rank`: which one it is;
    - `straggler/data_share`: the share of its time that goes into waiting for data and into what runs between batches.

    Of a step, only that counts in which a process cannot wait for others: the time from the end of a batch to the start
    of the next one, and the forward passes of blocks, without what gathers their weights. On a GPU both are what the
    device spends, from events in its stream, so a loader that keeps up costs nothing. What is logged is of the interval
    before: times travel between the processors meanwhile, and no step waits for them or for a GPU.

    Args:
        factor: a process is slow if it takes more than so many times the median of the others.
        patience: it is named when it was slow in so many intervals in a row, and again when it was not in as many.

    Raises:
        ValueError: for a factor that is not above 1, or a patience below 1.
    """  # noqa: D415

    def __init__(self, factor: float = 1.2, patience: int = 5) -> None:
        if factor <= 1:
            raise ValueError(f"callbacks.Stragglers: factor is above 1, not {factor:g}")
        if patience < 1:
            raise ValueError(f"callbacks.Stragglers: patience is at least 1, not {patience}")
        self.factor, self.patience = factor, patience
        self._exchange: _Exchange | None = None
        self._episodes: Episodes | None = None
        self._cuda = False
        self._data, self._forward = Spans(), Spans()
        self._scale = 1.0
        self._mark: Any = None
        self._begun: Any = None
        self._batches = 0
        self._hooks: list[RemovableHandle] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Of several processes that train, make a group in which their processors talk to each other."""
        if stage != "fit" or trainer.world_size == 1 or not dist.is_initialized():
            return
        if self._exchange is None:
            self._exchange = _Exchange(trainer.world_size)
        self._episodes = Episodes(self.factor, self.patience, self._exchange.names(trainer.global_rank))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin to time blocks."""
        if self._exchange is None:
            return
        assert isinstance(pl_module, LitVLM)
        self._cuda = pl_module.device.type == "cuda"
        blocks = [block for parts in pl_module.vlm.slots().values() for part in parts for block in part.blocks()]
        timed = blocks[::EVERY]
        self._scale = len(blocks) / max(1, len(timed))
        self._hooks = [block.register_forward_pre_hook(self._begin) for block in timed]
        # in front of the hook with which FSDP2 gives gathered weights back
        self._hooks += [block.register_forward_hook(self._end, prepend=True) for block in timed]

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Wait for the first batch from here."""
        self._mark = self._now()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave validation out."""
        self._mark = self._now()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """The batch is there."""
        self._data.add(self._mark, self._now())
        self._mark = None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Exchange times and log those of the interval before, each `log_every_n_steps`."""
        self._batches += 1
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if self._exchange and stepped and trainer.global_step % int(getattr(trainer, "log_every_n_steps", 1)) == 0:
            self._report(trainer, pl_module, self._exchange)
        self._mark = self._now()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Time nothing any more."""
        for hook in self._hooks:
            hook.remove()

    def _report(self, trainer: L.Trainer, module: L.LightningModule, exchange: _Exchange) -> None:
        spent = [self._data.take() / self._batches, self._scale * self._forward.take() / self._batches]
        self._batches = 0
        try:
            rows = exchange.swap(spent)
        except RuntimeError as error:  # a mere report must not end training; a process that is gone ends it elsewhere
            log.warning("straggler/... is left out from here: times do not arrive (%s)", str(error).partition("\n")[0])
            self._exchange = None
            return
        if rows is None:
            return
        found = Slowest.of(rows)
        values = {"slowest_over_median": found.ratio, "rank": found.rank, "data_share": found.data_share}
        module.log_dict(on_host({f"straggler/{name}": value for name, value in values.items()}))
        assert self._episodes is not None
        news = self._episodes.take(rows)
        if news and trainer.is_global_zero:
            log.warning(news)

    def _now(self) -> Any:
        """A mark in time; None in a single process."""
        if self._exchange is None:
            return None
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _begin(self, *_: Any) -> None:
        self._begun = self._now() if self._mark is None else None  # a block of validation does not count

    def _end(self, *_: Any) -> None:
        if self._begun is not None:
            self._forward.add(self._begun, self._now())


class Spans:
    """Times between two marks; of a GPU, as soon as it has come to the second one."""

    def __init__(self) -> None:
        self._open: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._sum = 0.0

    def add(self, start: Any, end: Any) -> None:
        """Add the time between two marks; without the first, none."""
        if start is None or end is None:
            return
        if isinstance(end, torch.cuda.Event):
            self._open.append((start, end))
        else:
            self._sum += end - start

    def take(self) -> float:
        """Seconds of all times that are known and were not taken before."""
        done = 0
        for start, end in self._open:
            if not end.query():
                break
            self._sum += start.elapsed_time(end) / 1000
            done += 1
        del self._open[:done]
        taken, self._sum = self._sum, 0.0
        return taken


class _Exchange:
    """A group in which the processors of all processes swap a few numbers, while training goes on."""

    def __init__(self, world_size: int) -> None:
        self._world = world_size
        group = dist.new_group(backend="gloo")
        assert isinstance(group, dist.ProcessGroup)  # all ranks are in it
        self._group = group
        self._work: dist.Work | None = None
        self._rows = torch.empty(0)

    def names(self, rank: int) -> list[str]:
        """All processes with their machines, for messages."""
        names: list[Any] = [None] * self._world
        dist.all_gather_object(names, f"rank {rank} on node {launch().node}", group=self._group)
        return names

    def swap(self, values: Sequence[float]) -> list[list[float]] | None:
        """Send values of this process on their way, and give those of all that were sent the time before.

        Returns:
            values by rank; None the first time.
        """
        before = None
        if self._work is not None:
            self._work.wait()  # it was done long ago: all processes have met in collectives since
            before = self._rows.tolist()
        mine = torch.tensor([list(values)], dtype=torch.float64)
        self._rows = torch.empty(self._world, len(values), dtype=torch.float64)
        self._work = dist.all_gather_into_tensor(self._rows, mine, group=self._group, async_op=True)
        return before


class Slowest(NamedTuple):
    """The slowest process of an interval.

    Attributes:
        rank: which one.
        own: its seconds for a batch.
        median: the median of the others.
        data_share: share of its seconds that is not computation.
        by_data: whether it is slow because of that share.
    """

    rank: int
    own: float
    median: float
    data_share: float
    by_data: bool

    @property
    def ratio(self) -> float:
        """Its time over the median of the others."""
        return self.own / max(self.median, 1e-9)

    @staticmethod
    def of(rows: Sequence[Sequence[float]]) -> Slowest:
        """Find it in rows of (seconds between batches, seconds of blocks), one for each rank."""
        sums = [sum(row) for row in rows]
        rank = max(range(len(rows)), key=sums.__getitem__)
        others = [row for index, row in enumerate(rows) if index != rank]
        more = [rows[rank][part] - statistics.median(row[part] for row in others) for part in (0, 1)]
        median = statistics.median(sum(row) for row in others)
        return Slowest(rank, sums[rank], median, rows[rank][0] / max(sums[rank], 1e-9), more[0] > more[1])


class Episodes:
    """Tells when a process has been slow for long, and when that is over.

    Args:
        factor: a process is slow if it takes more than so many times the median of the others.
        patience: intervals in a row after which something has been so for long.
        names: of all ranks.
    """

    def __init__(self, factor: float, patience: int, names: Sequence[str]) -> None:
        self.factor, self.patience, self.names = factor, patience, list(names)
        self._slow: int | None = None
        self._times = 0
        self._named: int | None = None

    def take(self, rows: Sequence[Sequence[float]]) -> str | None:
        """The news after one more interval, a line; mostly None."""
        found = Slowest.of(rows)
        slow = found.rank if found.ratio > self.factor else None
        self._times = self._times + 1 if slow == self._slow else 1
        self._slow = slow
        if self._times < self.patience or slow == self._named:
            return None
        before, self._named = self._named, slow
        if slow is None:
            assert before is not None
            return f"straggler: {self.names[before]} is no longer slower than the others"
        why = "data, or what runs between batches" if found.by_data else "computation"
        return (
            f"straggler: {self.names[slow]} is slow, and the others wait for it: {found.own:.3f} s of its own for a "
            f"batch, {found.ratio:.1f} times the median of the others ({found.median:.3f} s); it spends more on {why}"
        )
