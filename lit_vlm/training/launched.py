"""How many processes a run has and who starts them: what the launcher says, against what the trainer is told."""

from __future__ import annotations

import functools
import importlib
import os
from typing import Any, Literal

import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.lsf import LSFEnvironment
from lightning.fabric.plugins.environments.mpi import MPIEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from lit_vlm.core.children import GENERATION
from lit_vlm.core.launcher import Launch, launch, tasks_of_job
from lit_vlm.core.launcher import rendezvous as meeting_point

AUTO = "auto"
Devices = list[int] | str | int
ALL = (AUTO, -1, "-1")
"""What stands for all devices of a machine."""


class Launched(ClusterEnvironment):
    """Processes that a launcher has started, one per device: srun, or a program that sets RANK and WORLD_SIZE.

    Unlike Lightning's environment of SLURM it asks for no `--ntasks-per-node`, takes the machines of the step for those
    of the job, has a port per step, and leaves signals to the callback of preemption.
    """

    @property
    def creates_processes_externally(self) -> bool:
        """True: all processes are there."""
        return True

    @property
    def main_address(self) -> str:
        """The machine of rank 0."""
        return meeting_point()[0]

    @property
    def main_port(self) -> int:
        """A port of it."""
        return meeting_point()[1]

    @staticmethod
    def detect() -> bool:
        """Whether a launcher has started this process beside others."""
        return launch().world_size > 1

    def world_size(self) -> int:
        """Number of processes."""
        return launch().world_size

    def set_world_size(self, size: int) -> None:
        """Nothing: the launcher has set it."""

    def global_rank(self) -> int:
        """Number of this process."""
        return launch().rank

    def set_global_rank(self, rank: int) -> None:
        """Nothing: the launcher has set it."""

    def local_rank(self) -> int:
        """Number of this process on its machine."""
        return launch().local_rank

    def node_rank(self) -> int:
        """Number of this machine."""
        return launch().node_rank

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Refuse numbers that are not those of the launch.

        Raises:
            ValueError: with both, and both fixes.
        """
        agree(num_devices, num_nodes, launch(), (1, 1))


def environment(started: Launch) -> ClusterEnvironment:
    """Who starts the processes: the launcher has, or Lightning shall start those of this machine.

    A job script is one process even where its job has several tasks, as is a step of one task, such as a shell.
    """
    if started.by == "torchrun" and TorchElasticEnvironment.detect():
        keep_attempts_apart(started.attempt)
        return TorchElasticEnvironment()
    if started.by == "torchrun" or started.world_size > 1:
        return Launched()
    if started.by == "alone":
        for other in (LSFEnvironment, MPIEnvironment):
            if other.detect():
                return other()
    return LightningEnvironment()


def keep_attempts_apart(attempt: int) -> None:
    """Let processes meet under keys that no other attempt, and no other stage of it, has used.

    Torchrun's store outlives the processes that it starts again. What those left in it, such as the addresses of
    processes that are gone, would be taken for that of this attempt by whoever comes first (PyTorch 2.15).

    Args:
        attempt: how often the launcher has started before.
    """
    prefix = f"lit-vlm/{attempt}/{os.environ.get(GENERATION, '0')}"
    rendezvous: Any = importlib.import_module("torch.distributed.rendezvous")  # a function has this name as well
    made = rendezvous._create_c10d_store
    made = getattr(made, "__wrapped__", made)

    @functools.wraps(made)
    def create(*arguments: Any, **named: Any) -> Any:
        return PrefixStore(prefix, made(*arguments, **named))

    rendezvous._create_c10d_store = create


def spread(devices: Devices, num_nodes: int | Literal["auto"], started: Launch) -> tuple[Devices, int]:
    """Devices of a machine and number of machines, where `auto` is what the launcher has started."""
    beside = started.world_size > 1 and started.per_node > 0
    nodes = (started.nodes if beside else 1) if num_nodes == AUTO else int(num_nodes)
    return (started.per_node if beside and devices in ALL else devices), nodes


def agree(
    devices: Devices,
    num_nodes: int | Literal["auto"],
    started: Launch,
    of_job: tuple[int, int],
    visible: int | None = None,
) -> None:
    """Refuse a trainer that wants other processes than were started, which would wait for each other for ever.

    Args:
        devices: `trainer.devices`.
        num_nodes: `trainer.num_nodes`.
        started: the launch.
        of_job: numbers of tasks and of machines of SLURM's job.
        visible: number of GPUs that this process sees; None where it trains on other devices.

    Raises:
        ValueError: with what was started, what the trainer wants, and the fix on either side.
    """
    if started.by == "batch" or (started.by == "srun" and started.world_size == 1):
        _agree_alone(num_nodes, started, of_job)
    elif started.by != "alone":
        _agree_beside(devices, num_nodes, started, visible)


def _agree_alone(num_nodes: int | Literal["auto"], started: Launch, of_job: tuple[int, int]) -> None:
    """As `agree`, for one process of SLURM's, beside which Lightning starts those of its machine."""
    tasks, nodes = of_job
    if started.by == "batch" and num_nodes == AUTO and tasks > 1:
        raise ValueError(
            f"this job has {_count(tasks, 'task')} on {_count(nodes, 'node')}, but the command was started without "
            "srun, as one process: put `srun` in front of it, or add --trainer.num_nodes 1 if one process is meant"
        )
    if num_nodes != AUTO and int(num_nodes) > 1:
        how = "without srun" if started.by == "batch" else "by srun as one task"
        raise ValueError(
            f"trainer.num_nodes is {num_nodes}, but the command was started {how}: start it by `srun "
            f"--nodes={num_nodes} --ntasks-per-node=DEVICES`, or add --trainer.num_nodes 1"
        )


def _agree_beside(devices: Devices, num_nodes: int | Literal["auto"], started: Launch, visible: int | None) -> None:
    """As `agree`, for several processes that a launcher has started."""
    there = f"{started.by} started {_count(started.world_size, 'process')} on {_count(started.nodes, 'node')}"
    if started.per_node == 0:
        most = -(-started.world_size // started.nodes)
        raise ValueError(
            f"{there}, not as many on each: start {_flags(started.by, started.nodes, most)}, so that each node has as "
            "many as it has devices"
        )
    if visible is not None and visible < started.per_node:
        few = f"{there} ({started.per_node} on each), but this one sees {_count(visible, 'GPU')}"
        if started.by == "srun":
            raise ValueError(
                f"{few}: if the node has more, ask for them by --gpus-per-node={started.per_node} --gpu-bind=none in "
                f"place of --gpus-per-task; if not, start {_flags('srun', started.nodes, visible)}"
            )
        raise ValueError(f"{few}: start {_flags(started.by, started.nodes, visible)}")
    nodes = started.nodes if num_nodes == AUTO else int(num_nodes)
    wanted = (visible or started.per_node) if devices in ALL else _number(devices)
    if (nodes, wanted) != (started.nodes, started.per_node):
        more = f", of which there are {visible}" if devices in ALL and visible else ""
        raise ValueError(
            f"{there} ({started.per_node} on each), but trainer.num_nodes is {num_nodes} and trainer.devices "
            f"is {devices}{more}: start "
            f"{_flags(started.by, nodes, wanted)}, or add --trainer.num_nodes {started.nodes} --trainer.devices "
            f"{started.per_node}"
        )


def _flags(by: str, nodes: int, per_node: int) -> str:
    if by == "srun":
        return f"`srun --nodes={nodes} --ntasks-per-node={per_node}`"
    return f"`torchrun --nnodes={nodes} --nproc-per-node={per_node}`"


def _number(devices: Devices) -> int:
    """How many devices a value of `trainer.devices` names; raises ValueError where it names none."""
    if isinstance(devices, list):
        return len(devices)
    words = [word for word in str(devices).split(",") if word.strip()]
    if not words:
        raise ValueError(f"trainer.devices is {devices!r}: give a number, a list such as 0,1, or auto")
    return len(words) if "," in str(devices) else int(words[0])


def _count(number: int, what: str) -> str:
    plural = "es" if what.endswith("s") else "s"
    return f"{number} {what}{'' if number == 1 else plural}"


def agree_settings(trainer: Any, device_type: str) -> None:
    """Refuse a trainer's config that does not fit how this process was started; a user's own plugins decide alone.

    Args:
        trainer: the key `trainer` of a parsed config.
        device_type: type of the devices that it trains on.

    Raises:
        ValueError: as of `agree`.
    """
    if not trainer.get("plugins"):
        visible = torch.cuda.device_count() if device_type == "cuda" else None
        agree(trainer.devices, trainer.num_nodes, launch(), tasks_of_job(), visible)
