"""Engines: who starts the processes that do blocks of records: `Local` here, `on_ray.OnRay` on a cluster."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import multiprocessing
from torch.utils.data import DataLoader, Dataset

from lit_vlm.core.devices import own_devices
from lit_vlm.core.launcher import launch
from lit_vlm.data.sets.parallel import Block, heed_parent_alone
from lit_vlm.data.sets.sweepers import Sweepers
from lit_vlm.data.sources.base import Source


class Place(NamedTuple):
    """Which of the processes that share the work this is: `number` of `total`, from 0. The first shows progress."""

    number: int
    total: int


ALONE = Place(0, 1)


class Shared(Protocol):
    """Blocks that all processes which see one folder do together, as one of these processes sees them."""

    @property
    def blocks(self) -> tuple[Block, ...]:
        """All blocks."""

    def on(self, device: str) -> Shared:
        """The same blocks for a process whose models are on a device."""

    def witness(self) -> AbstractContextManager[str]:
        """Path of a new file in the folder while the context lasts: who does not see it has another folder."""

    def missing(self) -> list[Block]:
        """Blocks that are not whole."""

    def attempt(self, block: Block) -> bool:
        """Do a block, unless somebody else does it or it is done; whether it was done here."""

    def sweep(self, place: Place) -> Iterator[Block]:
        """Do the blocks that nobody does; yields each that was done here."""

    def finish(self, place: Place) -> None:
        """Do blocks until all are whole, those of dead processes as well."""


class Engine(Protocol):
    """Starts processes that do blocks, and heeds those that die."""

    @property
    def place(self) -> Place:
        """Of this process among those that were started together, as by srun."""

    @property
    def readers(self) -> int:
        """Number of processes that may decode for each model."""

    def map(self, function: Callable[[Block], Any], blocks: Sequence[Block], needs: Sequence[str]) -> Iterator[Any]:
        """Yield the results of a function, in the order of the blocks.

        Args:
            function: block → result; both pickle.
            blocks: what it is called with.
            needs: paths that all workers must see; without them, records would be taken for unreadable.

        Raises:
            ValueError: for a worker that cannot take part, saying why.
        """

    def start(self, shared: Shared, models: bool, needs: Sequence[str]) -> Callable[[], None]:
        """Start workers, each of which does blocks as `Shared` does.

        Args:
            shared: the blocks; it pickles.
            models: whether the work holds a model, so that there is one worker for each device.
            needs: as in `map`.

        Returns:
            what returns when all blocks are whole, whoever did them, and raises what a block or a worker raises.
        """


def paths_of(*sources: Source) -> list[str]:
    """Paths that whoever reads the sources must see: absolute, of those that are in a file system."""
    named = dict.fromkeys(place for source in sources for place in source.places())
    return [os.path.abspath(place) for place in named if os.path.exists(place)]


@dataclass(frozen=True)
class Local:
    """Processes of this machine.

    Attributes:
        workers: number of processes; 0 works in this one. Models have a process for each device instead.
        place: of this process among those that share the work.
    """

    workers: int = 0
    place: Place = ALONE

    @property
    def readers(self) -> int:
        """The workers, shared out to the devices."""
        return self.workers // len(own_devices(launch()))

    def map(self, function: Callable[[Block], Any], blocks: Sequence[Block], needs: Sequence[str]) -> Iterator[Any]:
        """As `Engine.map`; all paths are seen here."""
        return iter(
            DataLoader(
                _Work(blocks, function),
                batch_size=1,
                num_workers=min(self.workers, len(blocks)),
                collate_fn=_one,
                worker_init_fn=heed_parent_alone,
            )
        )

    def start(self, shared: Shared, models: bool, needs: Sequence[str]) -> Callable[[], None]:
        """As `Engine.start`; all paths are seen here."""
        if models:
            return self._start_models(shared)
        count = min(self.workers, len(shared.missing()))
        sweepers = Sweepers(_Sweep(shared, self.place, count), count)

        def wait() -> None:
            sweepers.join()
            shared.finish(self.place)

        return wait

    def _start_models(self, shared: Shared) -> Callable[[], None]:
        devices = own_devices(launch())
        if len(devices) == 1:
            return lambda: shared.on(devices[0]).finish(self.place)
        number, total = self.place
        places = [Place(number * len(devices) + i, total * len(devices)) for i in range(len(devices))]
        given = (shared, devices, places)
        started = multiprocessing.spawn(_finish, given, nprocs=len(devices), join=False)  # type: ignore[attr-defined]

        def wait() -> None:
            while not started.join():
                continue

        return wait


HERE = Local()
"""No process but this one."""


def _finish(index: int, shared: Shared, devices: list[str], places: list[Place]) -> None:
    shared.on(devices[index]).finish(places[index])


class _Work(Dataset[Any]):
    def __init__(self, blocks: Sequence[Block], function: Callable[[Block], Any]) -> None:
        self.blocks, self.function = list(blocks), function

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> Any:
        return self.function(self.blocks[index])


def _one(items: Sequence[Any]) -> Any:
    return items[0]


@dataclass(frozen=True)
class _Sweep:
    """The blocks that one of `count` worker processes of a task finds free, as they are done (`sweepers.Sweep`)."""

    shared: Shared
    place: Place
    count: int

    def __call__(self, number: int) -> Iterator[Block]:
        own, total = self.place
        return self.shared.sweep(Place(own * self.count + number, total * self.count))
