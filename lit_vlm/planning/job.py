"""What is asked of a simulated or rehearsed step, and what comes back: plain data, sent between processes as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from lit_vlm.core.batch import Counts
from lit_vlm.planning.operations import Message, Operation

RECORDED, HEAVIEST, STEPS = 1, 2, 3
"""Numbers of the steps: the first makes the optimizer's states, the second is recorded, the last is the heaviest."""
MICRO = 2
"""Micro-batches of a step, at most: with two, gradients of the first are there while the second runs."""


class Device(NamedTuple):
    """The device that a step runs on.

    Attributes:
        name: name in reports.
        bytes: memory that one process may use.
        capability: NVIDIA's compute capability, major and minor.
    """

    name: str
    bytes: int
    capability: tuple[int, int] = (9, 0)


class Statistics(NamedTuple):
    """Where the statistics of a stage's published data are.

    Attributes:
        file: the file.
        stage: name of the stage in it.
        scale: scale of the recipe.
    """

    file: str
    stage: str
    scale: str | None


@dataclass(frozen=True)
class Job:
    """A stage of which a step is run.

    Attributes:
        words: arguments of `lit-vlm fit`, behind the word fit.
        device: the device of each process.
        world_size: number of processes that are planned; the step runs as the first of them.
        per_node: devices of a machine.
        record: whether operations and messages are recorded, which takes several times as long.
        waits: whether places that wait for the device are recorded.
        prepared: heads, or `encoder`, whose features are taken as prepared.
        statistics: of the published data, which made-up records follow where the data are not there; None: the stage's
            own data must be there.
    """

    words: tuple[str, ...]
    device: Device
    world_size: int = 1
    per_node: int = 8
    record: bool = False
    waits: bool = False
    prepared: tuple[str, ...] = ()
    statistics: Statistics | None = None


@dataclass
class States:
    """Bytes that one device holds between two steps.

    Attributes:
        weights: parameters and buffers, those of teachers included.
        gradients: of the parameters that train.
        optimizer: running averages of gradients, and of the weights that train where the stage averages them.
    """

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer


@dataclass
class Measured:
    """A step as it ran.

    Attributes:
        states: what the device holds between steps.
        expected_states: the same by arithmetic: sizes of parameters over the number of shards.
        peak: most bytes that were allocated at one time, in the heaviest of the steps.
        reserved: most bytes that the allocator had reserved.
        typical: what the typical micro-batch holds; its operations are the recorded ones.
        heaviest: what the heaviest one holds.
        mean: what micro-batches hold on average.
        micro_batches: of an epoch, on each process.
        model_flops: operations that the typical micro-batch needs, without recomputation.
        operations: recorded ones, of a whole step of one micro-batch.
        messages: recorded ones.
        batch_size: rows of a micro-batch.
        accumulate: micro-batches of an optimizer step.
        epochs: of the stage; None where steps end it.
        max_steps: of the stage; None where epochs end it.
        records: of the published data, where the stage's own data were not there; None where they were.
        strategy: class of the strategy.
        recompute: whether blocks of the decoder are computed again in the backward pass.
        frozen_full: whether frozen weights are stored in fp32 although the step computes in bf16.
        preparable: heads, and `encoder`, whose features could be prepared before training.
        checkpoint: bytes of a checkpoint, with optimizer states, of all processes together.
        weights_file: bytes of its weights alone.
        host_loading: bytes of the first process's memory while weights are read.
        batch_bytes: bytes of the heaviest micro-batch on the host.
        record_bytes: mean bytes of a record's pictures and text, as they are read.
        workers: loader processes of each device.
        slots: slot, class, and numbers of trained and frozen parameters.
        blocks: number of units that are gathered one at a time, the root among them; 0 without sharding.
        unsharded: names of blocks whose parameters are not sharded although the strategy shards.
        precision: in which the step ran.
        mixed: operations that took tensors of device and host.
        waits: place in the code → number of waits of a step that are not meant (`training.waits.MEANT`).
        seconds: of each step on a real device; empty in a simulation, or while operations are recorded.
    """

    states: States
    expected_states: States
    peak: int
    reserved: int
    typical: Counts
    heaviest: Counts
    mean: dict[str, float]
    micro_batches: int
    model_flops: float
    operations: list[Operation]
    messages: list[Message]
    batch_size: int
    accumulate: int
    epochs: int | None
    max_steps: int | None
    records: int | None
    strategy: str
    recompute: bool
    frozen_full: bool
    preparable: list[str]
    checkpoint: int
    weights_file: int
    host_loading: int
    batch_bytes: int
    record_bytes: float
    workers: int
    slots: list[tuple[str, str, int, int]]
    blocks: int
    unsharded: list[str]
    precision: str
    mixed: dict[str, int] = field(default_factory=dict)
    waits: dict[str, int] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> Measured:
        """From what `to_json` gave and JSON kept."""
        given = dict(data)
        for name in ("states", "expected_states"):
            given[name] = States(**given[name])
        for name in ("typical", "heaviest"):
            given[name] = Counts(*given[name])
        given["operations"] = [Operation(*row) for row in given["operations"]]
        given["messages"] = [Message(*row) for row in given["messages"]]
        given["slots"] = [tuple(row) for row in given["slots"]]
        return Measured(**given)


@dataclass
class Failed:
    """A step that did not run to its end.

    Attributes:
        reason: the error in one line.
        memory: whether the device's memory did not suffice.
        trace: the last lines of the traceback, for errors that are no ValueError.
    """

    reason: str
    memory: bool = False
    trace: str = ""


def job_line(job: Job) -> str:
    """A job as one line of JSON."""
    return json.dumps(asdict(job))


def read_job(line: str) -> Job:
    """A job from its line."""
    data = json.loads(line)
    major, minor = data["device"][2]
    name, size, _ = data["device"]
    data["device"] = Device(name, size, (major, minor))
    for name in ("words", "prepared"):
        data[name] = tuple(data[name])
    data["statistics"] = data["statistics"] and Statistics(*data["statistics"])
    return Job(**data)


def result_line(result: Measured | Failed) -> str:
    """A result as one line of JSON."""
    kind = "measured" if isinstance(result, Measured) else "failed"
    return json.dumps({kind: asdict(result)})


def read_result(line: str) -> Measured | Failed:
    """A result from its line."""
    data = json.loads(line)
    return Measured.from_json(data["measured"]) if "measured" in data else Failed(**data["failed"])


def launched(job: Job) -> list[str]:
    """The arguments of a job's stage, with its devices."""
    devices = min(job.per_node, job.world_size)
    nodes = -(-job.world_size // job.per_node)
    return [*job.words, "--trainer.devices", str(devices), "--trainer.num_nodes", str(nodes)]
