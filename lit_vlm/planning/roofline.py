"""From operations to time: each takes what the slower of arithmetic and memory allows; messages travel beside them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

from lit_vlm.core.devices import Card
from lit_vlm.planning.operations import Message, Operation, Phase

ATTENTION = ("scaled_dot_product", "flash_attention", "efficient_attention", "cudnn_attention")
"""Parts of the names of fused attention."""
FORWARD: tuple[Phase, ...] = ("forward",)
BACKWARD: tuple[Phase, ...] = ("backward", "recompute")


@dataclass(frozen=True)
class Assumptions:
    """What is assumed of devices, the same for all.

    Attributes:
        matrix: share of the dense peak that matrix products and convolutions reach.
        attention: share of the dense peak that fused attention reaches, with all pairs counted, masked ones too.
        bandwidth: share of the memory's bandwidth that other operations reach, each reading and writing its tensors.
        kernel: least seconds of an operation.
        link: share of the links' speed that messages reach.
        network: bytes per second and device between machines, each way.
        fp32: share of the bf16 peak that products in fp32 have.
        context: bytes of a device that are gone before PyTorch allocates: driver, libraries, buffers of communication.
        worker: bytes of the host that a loader process takes besides its batches.
        process: bytes of the host that a training process takes besides weights.
    """

    matrix: float = 0.65
    attention: float = 0.4
    bandwidth: float = 0.8
    kernel: float = 5e-6
    link: float = 0.7
    network: float = 25e9
    fp32: float = 1 / 16
    context: float = 1.2 * 2**30
    worker: float = 0.25 * 2**30
    process: float = 3.0 * 2**30

    def changed(self, values: Mapping[str, float]) -> Assumptions:
        """With other values, of a measurement or a flag.

        Raises:
            ValueError: for a name that is none of them.
        """
        known = [item.name for item in fields(self)]
        if unknown := sorted(values.keys() - set(known)):
            raise ValueError(f"assumptions have no '{unknown[0]}'; they are {', '.join(known)}")
        return replace(self, **values)


class StepTime(NamedTuple):
    """Seconds of a micro-batch and of an optimizer step.

    Attributes:
        matrix: matrix products and convolutions.
        attention: fused attention.
        memory: all other operations of forward and backward pass.
        messages: of forward and backward pass, whether hidden or not.
        exposed: those of them that nothing hides.
        optimizer: the optimizer step with its messages, once per step.
    """

    matrix: float
    attention: float
    memory: float
    messages: float
    exposed: float
    optimizer: float

    @property
    def micro_batch(self) -> float:
        """Forward and backward pass of one micro-batch."""
        return self.matrix + self.attention + self.memory + self.exposed

    def step(self, micro_batches: int) -> float:
        """An optimizer step of several micro-batches."""
        return micro_batches * self.micro_batch + self.optimizer


def estimate(
    operations: Iterable[Operation],
    messages: Iterable[Message],
    card: Card,
    per_node: int,
    assumed: Assumptions,
    work: float = 1.0,
    pace: float = 1.0,
) -> StepTime:
    """The time of a recorded micro-batch and its optimizer step.

    Messages of a phase travel while its operations run; what takes longer than them is exposed, and so is the first
    message of the forward pass, which nothing runs beside. In the optimizer step nothing is hidden.

    Args:
        operations: as recorded.
        messages: as recorded.
        card: the device.
        per_node: devices of a machine, whose networks work together.
        assumed: what is assumed.
        work: work of the micro-batch that is meant over that of the recorded one.
        pace: time that operations take over what is estimated.
    """
    busy: dict[Phase, dict[str, float]] = {}
    for one in operations:
        kind = class_of(one)
        factor = pace * (1.0 if one.phase == "optimizer" else work)
        kinds = busy.setdefault(one.phase, {})
        kinds[kind] = kinds.get(kind, 0.0) + factor * one.calls * seconds(one, card, assumed)
    sent: dict[Phase, float] = {}
    first = 0.0
    for message in messages:
        one_message = travel(message, card, per_node, assumed)
        sent[message.phase] = sent.get(message.phase, 0.0) + message.calls * one_message
        if message.phase == "forward" and message.kind == "all_gather":
            first = max(first, one_message)
    exposed = first
    for phases in (FORWARD, BACKWARD):
        working = sum(sum(busy.get(phase, {}).values()) for phase in phases)
        exposed += max(0.0, sum(sent.get(phase, 0.0) for phase in phases) - working)
    passes = [busy.get(phase, {}) for phase in (*FORWARD, *BACKWARD)]
    return StepTime(
        matrix=sum(part.get("matrix", 0.0) for part in passes),
        attention=sum(part.get("attention", 0.0) for part in passes),
        memory=sum(part.get("memory", 0.0) for part in passes),
        messages=sum(seconds_sent for phase, seconds_sent in sent.items() if phase != "optimizer"),
        exposed=exposed,
        optimizer=sum(busy.get("optimizer", {}).values()) + sent.get("optimizer", 0.0),
    )


def class_of(operation: Operation) -> str:
    """`matrix`, `attention`, or `memory`, which is all else."""
    if not operation.flops:
        return "memory"
    return "attention" if any(part in operation.name for part in ATTENTION) else "matrix"


def seconds(operation: Operation, card: Card, assumed: Assumptions) -> float:
    """Seconds of one call of an operation: the larger of arithmetic, memory traffic and the start of a kernel."""
    share = assumed.attention if class_of(operation) == "attention" else assumed.matrix
    peak = card.flops * (assumed.fp32 if operation.dtype in ("float32", "float64") else 1.0)
    arithmetic = operation.flops / (share * peak)
    traffic = operation.bytes / (assumed.bandwidth * card.bandwidth)
    return max(arithmetic, traffic, assumed.kernel)


def travel(message: Message, card: Card, per_node: int, assumed: Assumptions) -> float:
    """Seconds of one message: each device sends and receives what the others hold, at the speed of the slowest link.

    Between machines all devices of a node send at the same time, each over a network of its own.
    """
    if message.ranks < 2:
        return 0.0
    rate = card.link if message.nodes == 1 else min(card.link, assumed.network * min(per_node, message.ranks))
    rounds = 2 if message.kind == "all_reduce" else 1
    return rounds * message.bytes * (message.ranks - 1) / message.ranks / (assumed.link * rate) + assumed.kernel
