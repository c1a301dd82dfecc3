"""Blocks on a cluster of Ray: its actors do what worker processes of this machine do, over the same folder.

The process that gives out blocks keeps no state. If it is killed, the blocks that are whole stay, and the same command
goes on. Blocks are given out one by one, so that an actor that dies costs its block alone, which another one then does.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lit_vlm
from lit_vlm.core.devices import cores
from lit_vlm.core.plugins import VARIABLE
from lit_vlm.core.progress import slowly
from lit_vlm.data.sets import ray_worker
from lit_vlm.data.sets.engine import ALONE, Place, Shared
from lit_vlm.data.sets.parallel import Block

ADDRESS = "RAY_ADDRESS"
"""Environment variable with the address of a cluster, as `host:6379`, or `auto` for one that this machine is in."""
REACHED = 5.0
"""Seconds in which a cluster must take a connection."""
DEATHS = 3
"""How often workers may die of one block, or before they begin, until that counts as an error."""
AHEAD = 4
"""Blocks per worker that are done, at most, before the results of earlier ones are there."""
OPENING, ASKED = -1, -2
"""What an actor is at that does no block: it opens the work, or says that it is alive."""
POLL = 1.0
"""Seconds between two looks at the blocks of others."""

Open = Callable[[str], Callable[[Block], Any]]
"""(device) → what does a block, on that device."""


@dataclass(frozen=True)
class _Function:
    """What does a block alike on all devices."""

    function: Callable[[Block], Any]

    def __call__(self, device: str) -> Callable[[Block], Any]:
        return self.function


@dataclass(frozen=True)
class _Attempts:
    shared: Shared

    def __call__(self, device: str) -> Callable[[Block], bool]:
        return self.shared.on(device).attempt


@dataclass(frozen=True)
class OnRay:
    """Actors of a Ray cluster that this process is connected to; `on_ray` connects.

    Attributes:
        workers: number of actors, each with a CPU. Models have one for each GPU instead, or for each node without GPUs.
        place: of this process, which gives out all blocks.
    """

    workers: int
    place: Place = ALONE

    @property
    def readers(self) -> int:
        """The workers, shared out to the actors that hold a model."""
        return self.workers // _for_models()[0]

    def map(self, function: Callable[[Block], Any], blocks: Sequence[Block], needs: Sequence[str]) -> Iterator[Any]:
        """As `Engine.map`."""
        done: dict[int, Any] = {}
        following = 0
        with _Pool(_Function(function), min(self.workers, len(blocks)), {"num_cpus": 1}, needs) as pool:
            for index, result in pool.results(blocks, AHEAD * self.workers):
                done[index] = result
                while following in done:
                    yield done.pop(following)
                    following += 1

    def start(self, shared: Shared, models: bool, needs: Sequence[str]) -> Callable[[], None]:
        """As `Engine.start`."""

        def wait() -> None:
            if not (missing := shared.missing()):
                return
            count, resources = _for_models() if models else (self.workers, {"num_cpus": 1.0})
            with (
                shared.witness() as file,
                _Pool(_Attempts(shared), min(count, len(missing)), resources, [file, *needs]) as pool,
            ):
                while missing := shared.missing():
                    # Nothing was free where all of it is done by others, or was by such that are dead.
                    if not any([done for _, done in pool.results(missing)]):
                        time.sleep(POLL)

        return wait


@contextmanager
def on_ray(workers: int | None, variables: Mapping[str, str] = os.environ) -> Iterator[OnRay]:
    """Connect to the cluster at `RAY_ADDRESS`, or start one on this machine that ends with the context.

    Args:
        workers: number of actors; None takes one for each CPU.
        variables: the environment.

    Raises:
        ValueError: without Ray, for a cluster that does not answer or has another version of it, or without workers.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"--workers {workers} works in this process, which --on ray never does: leave it out")
    os.environ.setdefault("RAY_py_gcs_connect_timeout_s", str(int(2 * REACHED)))  # read when Ray is imported
    try:
        import ray
    except ImportError as error:
        raise ValueError("--on ray needs the package ray: pip install 'lit-vlm[ray]'") from error
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address := variables.get(ADDRESS):
        _reach(address)
        try:
            ray.init(address=address, **quiet)
        except (RuntimeError, ConnectionError, ValueError) as error:
            said = " ".join(str(error).split())
            raise ValueError(f"{ADDRESS}={address}: the Ray cluster cannot be used: {said}") from error
    else:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody asked for it
        with slowly("starting Ray on this machine"):
            ray.init(address="local", num_cpus=workers or len(cores()), include_dashboard=False, **quiet)
    try:
        yield OnRay(workers or max(1, int(ray.cluster_resources().get("CPU", 1))))
    finally:
        ray.shutdown()


def _reach(address: str) -> None:
    """Raise ValueError unless something answers at the address: Ray itself would try for minutes."""
    if address == "auto":
        return
    host, colon, port = address.rpartition(":")
    if "//" in address or not colon or not port.isdecimal():
        raise ValueError(
            f"{ADDRESS}={address} is no address of a cluster's head, such as 10.0.0.1:6379; the command must run on a "
            "machine of the cluster, as it does by `ray job submit`"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), REACHED).close()
    except OSError as error:
        raise ValueError(
            f"{ADDRESS}={address}: no Ray cluster answers there ({error}); start one by `ray start --head`, or unset "
            f"{ADDRESS} to start one on this machine"
        ) from error


def _for_models() -> tuple[int, dict[str, float]]:
    """Number of actors that hold a model, and what each asks for: a GPU, or the CPUs of the smallest node."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if gpus := int(sum(node.get("GPU", 0) for node in nodes)):
        return gpus, {"num_gpus": 1, "num_cpus": 1}
    cpus = [int(node.get("CPU", 0)) for node in nodes if node.get("CPU", 0) >= 1] or [1]
    return sum(count // min(cpus) for count in cpus), {"num_cpus": min(cpus)}


class _Pool:
    """Actors that do blocks; one that dies is replaced, and its block given to another.

    Args:
        work: what each actor opens; it pickles.
        count: number of actors. Those that the cluster has no room for take part once there is some.
        resources: that each actor asks for.
        needs: paths that all of them must see.
    """

    def __init__(self, work: Open, count: int, resources: dict[str, float], needs: Sequence[str]) -> None:
        import ray
        from ray import cloudpickle

        self._ray = ray
        cloudpickle.register_pickle_by_value(ray_worker)
        self._actor = ray.remote(max_restarts=0, **resources)(ray_worker.Worker)
        told = ray_worker.Told(
            version=lit_vlm.__version__,
            folder=os.getcwd(),
            variables={VARIABLE: os.environ.get(VARIABLE, "")},
            needs=list(needs),
            device="cuda:0" if resources.get("num_gpus") else "cpu",
        )
        self._opening = (told, ray.put(cloudpickle.dumps(work)))
        self._idle: list[Any] = []
        self._busy: dict[Any, tuple[Any, int]] = {}
        self._died_early = 0
        for _ in range(count):
            self._hire()

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *error: object) -> None:
        for actor in (*self._idle, *(actor for actor, _ in self._busy.values())):
            self._ray.kill(actor)

    def results(self, blocks: Sequence[Block], ahead: int | None = None) -> Iterator[tuple[int, Any]]:
        """Yield (index, result) for each of `blocks`, as they come; `index` is the place in `blocks`.

        Args:
            blocks: are given out in this order.
            ahead: a block waits while one that is this many before it is not done; None never waits.

        Raises:
            ValueError: for a worker that cannot take part, or a block that workers die of.
            Exception: what the work raises.
        """
        waiting, missing, deaths = deque(range(len(blocks))), len(blocks), Counter[int]()
        while missing:
            while waiting and self._idle and (ahead is None or waiting[0] - self._oldest(waiting[0]) < ahead):
                # The one that was idle last: it has seen the claims of the dead before, and can judge of them.
                actor, index = self._idle.pop(), waiting.popleft()
                self._busy[actor.do.remote(blocks[index])] = (actor, index)
            actor, given, result, death = self._next()
            if death is not None:
                self._replace()
                if given == OPENING:
                    self._died_early = _counted(self._died_early, "before they begin", death)
                elif given >= 0:
                    deaths[given] = _counted(deaths[given], f"of {_name(blocks[given])}", death)
                    waiting.appendleft(given)
                continue
            self._idle.append(actor)
            self._died_early = 0
            if given >= 0:
                missing -= 1
                yield given, result

    def _oldest(self, waiting: int) -> int:
        """Place of the first block that is not done, given that of the first one that waits."""
        return min((given for _, given in self._busy.values() if given >= 0), default=waiting)

    def _next(self) -> tuple[Any, int, Any, Exception | None]:
        """The next actor that answers, what it did, with what result, and what it died of, if it did."""
        errors = self._ray.exceptions
        begins = not self._idle and all(given == OPENING for _, given in self._busy.values())
        with slowly("waiting for workers of Ray", begins):
            (ready, *_), _ = self._ray.wait(list(self._busy), num_returns=1)
        actor, index = self._busy.pop(ready)
        try:
            return actor, index, self._ray.get(ready), None
        except errors.RayTaskError as error:
            self._ray.kill(actor)
            raise error.cause from None
        except errors.RayError as error:  # the actor, its node, or what carries its answer is gone
            self._ray.kill(actor)
            return actor, index, None, error

    def _hire(self) -> None:
        actor = self._actor.remote()
        self._busy[actor.open.remote(*self._opening)] = (actor, OPENING)

    def _replace(self) -> None:
        """Hire for an actor that died, and ask the idle ones: if its node is gone, so are they, and of no block."""
        self._hire()
        for actor in self._idle:
            self._busy[actor.ask.remote()] = (actor, ASKED)
        self._idle.clear()


def _counted(before: int, of: str, death: Exception) -> int:
    if before + 1 >= DEATHS:
        said = " ".join(str(death).split())
        raise ValueError(f"workers of Ray died {DEATHS} times {of}; blocks that are whole are kept. The last: {said}")
    return before + 1


def _name(block: Block) -> str:
    return f"records {block.start:,} to {block.end - 1:,}"
