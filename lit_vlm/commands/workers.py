"""The flags `--on` and `--workers` of commands that do blocks of records: where, and in how many processes."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager

from lit_vlm.core.devices import cores
from lit_vlm.core.launcher import launch
from lit_vlm.data.sets.engine import Engine, Local, Place

LOCAL, RAY = "local", "ray"


def add_on(parser: argparse.ArgumentParser) -> None:
    """Add the flag `--on`."""
    parser.add_argument(
        "--on",
        choices=(LOCAL, RAY),
        default=LOCAL,
        help="where the work runs: on this machine, or on the Ray cluster at RAY_ADDRESS, which is started here where "
        "that is not set (local)",
    )


def add_workers(parser: argparse.ArgumentParser) -> None:
    """Add the flags `--on` and `--workers`."""
    add_on(parser)
    parser.add_argument(
        "--workers",
        type=int,
        help="processes: of each task (default: one per core), or in all of a Ray cluster (default: one per CPU)",
    )


@contextmanager
def engine_of(on: str, workers: int | None = None) -> Iterator[Engine]:
    """The engine that the flags name, as a context that ends what it started.

    Args:
        on: `local` or `ray`.
        workers: number of processes; None takes one for each core or CPU.

    Raises:
        ValueError: for a negative number, for Ray under a launcher of several tasks, or as `on_ray`.
    """
    if workers is not None and workers < 0:
        raise ValueError(f"--workers must be at least 0, not {workers}")
    started = launch()
    if on == LOCAL:
        yield Local(len(cores()) if workers is None else workers, Place(started.rank, started.world_size))
        return
    if started.world_size > 1:
        raise ValueError(
            f"--on ray is one command that gives work to all nodes, but {started.by} started {started.world_size} of "
            "it: start one, or leave --on ray out, as tasks share the blocks without it"
        )
    from lit_vlm.data.sets.on_ray import on_ray

    with on_ray(workers) as engine:
        yield engine
