"""The plan of a stage: what one step takes of each device and host, how long the stage lasts, and what makes it fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lit_vlm.core.devices import Card
from lit_vlm.planning.changes import Change, smaller
from lit_vlm.planning.job import MICRO, RECORDED, Device, Failed, Job, Measured
from lit_vlm.planning.roofline import Assumptions, StepTime, estimate
from lit_vlm.planning.simulation import UNLIMITED

GIB = 2**30
PREFETCH = 4
"""Batches that each loader process holds ready."""
RunStep = Callable[[Job], Measured | Failed]


@dataclass(frozen=True)
class Setup:
    """What a stage is planned on.

    Attributes:
        card: the device.
        devices: number of devices.
        per_node: devices of a machine.
        assumed: assumptions of the estimate.
        price: cost of a device hour, if wanted.
    """

    card: Card
    devices: int
    per_node: int
    assumed: Assumptions
    price: float | None = None

    @property
    def room(self) -> int:
        """Bytes that PyTorch may allocate on a device."""
        return int(self.card.memory - self.assumed.context)

    def device(self, size: int | None = None) -> Device:
        """The device of a job, with as much memory as PyTorch has there, or another size."""
        return Device(self.card.name, self.room if size is None else size, self.card.capability or (9, 0))


@dataclass
class StagePlan:
    """The plan of a stage.

    Attributes:
        stage: its name.
        setup: what it is planned on.
        measured: the step as it ran; on a device of any size where it does not fit.
        fits: whether the step runs on the device as the stage is set.
        changes: what was changed until it ran; empty where it fits, or where nothing helped.
        tried: every change that was tried, and the peak in bytes, or None where it did not run.
        changed: the step with these changes.
    """

    stage: str
    setup: Setup
    measured: Measured
    fits: bool
    changes: tuple[Change, ...] = ()
    tried: list[tuple[str, int | None]] = field(default_factory=list)
    changed: Measured | None = None

    @property
    def runs(self) -> Measured:
        """The step that is planned: the changed one where only that fits."""
        return self.changed or self.measured

    @property
    def work(self) -> float:
        """Positions of a mean micro-batch over those of the recorded one."""
        typical = self.runs.typical.positions
        return self.runs.mean["positions"] / typical if typical else 1.0

    @property
    def time(self) -> StepTime:
        """The time of a mean micro-batch: by the roofline, or by the seconds that the step took on a real device."""
        run, setup = self.runs, self.setup
        given = (run.operations, run.messages, setup.card, setup.per_node, setup.assumed)
        if not run.seconds:
            return estimate(*given, work=self.work)
        alone = estimate(*given)._replace(exposed=0.0)  # messages to nobody take no time
        pace = run.seconds[RECORDED] / alone.step(min(run.accumulate, MICRO))
        return estimate(*given, work=self.work, pace=pace)

    @property
    def step_seconds(self) -> float:
        """Seconds of an optimizer step."""
        return self.time.step(self.runs.accumulate)

    @property
    def samples_per_step(self) -> float:
        """Samples of an optimizer step on all devices."""
        return self.runs.mean["samples"] * self.runs.accumulate * self.setup.devices

    @property
    def samples(self) -> float:
        """Samples of the whole stage."""
        run = self.runs
        if run.max_steps is not None:
            return run.max_steps * self.samples_per_step
        records = run.records or run.micro_batches * run.mean["samples"] * self.setup.devices
        return records * (run.epochs or 1)

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole stage."""
        if self.runs.max_steps is not None:
            return self.runs.max_steps
        return math.ceil(self.samples / max(1e-9, self.samples_per_step))

    @property
    def hours(self) -> float:
        """Hours of the whole stage, without loading, checkpoints and evaluation."""
        return self.steps * self.step_seconds / 3600

    @property
    def flops(self) -> dict[str, float]:
        """FLOPs of an optimizer step on one device: needed, executed, and executed again for recomputation."""
        run = self.runs
        executed = sum(one.flops * one.calls for one in run.operations)
        again = sum(one.flops * one.calls for one in run.operations if one.phase == "recompute")
        factor = run.accumulate * self.work
        return {
            "model": run.model_flops * factor,
            "executed": executed * factor,
            "recomputed": again * factor,
        }

    @property
    def mfu(self) -> float:
        """Model FLOPs over what the device could do in that time."""
        return self.flops["model"] / (self.step_seconds * self.setup.card.flops)

    @property
    def activations(self) -> int:
        """Bytes of the peak that are no states: activations, gathered parameters and buffers."""
        return self.runs.peak - self.runs.states.total

    @property
    def host(self) -> dict[str, float]:
        """Bytes of a machine's memory: while weights are read, and in training with the loaders' workers."""
        run, assumed = self.runs, self.setup.assumed
        ranks = min(self.setup.devices, self.setup.per_node)
        copies = 1 if run.blocks else ranks  # sharded, the first process alone reads the weights
        workers = run.workers * (assumed.worker + PREFETCH * run.batch_bytes)
        return {
            "loading": ranks * assumed.process + copies * run.host_loading,
            "training": ranks * (assumed.process + workers + 2 * run.batch_bytes),
        }

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data: bytes in GiB, time in seconds and hours."""
        run, time, setup = self.runs, self.time, self.setup
        hours = self.hours
        return {
            "stage": self.stage,
            "device": setup.card.name,
            "devices": setup.devices,
            "strategy": run.strategy,
            "precision": run.precision,
            "own_data": run.records is None,
            "rehearsed": bool(run.seconds),
            "batch": {
                "batch_size": run.batch_size,
                "accumulate": run.accumulate,
                "samples_per_step": self.samples_per_step,
                "tokens_per_step": run.mean["tokens"] * run.accumulate * setup.devices,
                "images_per_step": run.mean["images"] * run.accumulate * setup.devices,
                "positions": run.mean["positions"],
                "heaviest_positions": run.heaviest.positions,
            },
            "memory_gib": {
                "weights": run.states.weights / GIB,
                "gradients": run.states.gradients / GIB,
                "optimizer": run.states.optimizer / GIB,
                "activations": self.activations / GIB,
                "peak": run.peak / GIB,
                "reserved": run.reserved / GIB,
                "room": setup.room / GIB,
                "left": (setup.room - run.reserved) / GIB,
            },
            "host_gib": {name: value / GIB for name, value in self.host.items()},
            "flops_per_step_and_device": self.flops,
            "mfu": self.mfu,
            "seconds": {**time._asdict(), "step": self.step_seconds},
            "steps": self.steps,
            "samples": self.samples,
            "hours": hours,
            "device_hours": hours * setup.devices,
            "cost": None if setup.price is None else hours * setup.devices * setup.price,
            "checkpoint_gib": run.checkpoint / GIB,
            "weights_gib": run.weights_file / GIB,
            "read_bytes_per_second": run.record_bytes * self.samples_per_step / self.step_seconds,
            "fits": self.fits,
            "changes": [change.what for change in self.changes],
            "flags": [flag for change in self.changes for flag in change.flags],
            "tried": [{"change": what, "peak_gib": peak and peak / GIB} for what, peak in self.tried],
        }


def plan_stage(stage: str, job: Job, setup: Setup, run: RunStep) -> StagePlan:
    """Plan a stage: run its step on the device, and where it does not fit, find the smallest change that helps.

    Args:
        stage: its name.
        job: its job; the device's memory is set here.
        setup: what it is planned on.
        run: runs a step.

    Raises:
        ValueError: where a step does not run for another reason than memory.
    """
    limited = replace(job, device=setup.device())
    result = run(replace(limited, record=True))
    if isinstance(result, Measured):
        return StagePlan(stage, setup, result, fits=True)
    _refuse_other(stage, result)
    asked = _must(stage, run(replace(job, device=setup.device(UNLIMITED), record=True)))
    tried: list[tuple[str, int | None]] = []
    for changes in smaller(asked, setup.room, setup.devices):
        changed = limited
        for change in changes:
            changed = change.apply(changed)
        result = run(replace(changed, record=True))
        what = " and ".join(change.what for change in changes)
        tried.append((what, result.peak if isinstance(result, Measured) else None))
        if isinstance(result, Measured):
            return StagePlan(stage, setup, asked, False, tuple(changes), tried, result)
        _refuse_other(stage, result)
    return StagePlan(stage, setup, asked, False, (), tried)


def _refuse_other(stage: str, failed: Failed) -> None:
    if not failed.memory:
        raise ValueError(f"{stage}: {failed.reason}")


def _must(stage: str, result: Measured | Failed) -> Measured:
    if isinstance(result, Failed):
        raise ValueError(f"{stage}: {result.reason}")
    return result


def largest_micro_batch(
    stage: str, job: Job, setup: Setup, run: RunStep, batch_size: int, accumulate: int
) -> StagePlan | None:
    """The plan with the largest micro-batch that fits, with as many per step as keep the global batch; None if none is.

    Args:
        stage: its name.
        job: its job.
        setup: what it is planned on.
        run: runs a step.
        batch_size: micro-batch of the recipe.
        accumulate: micro-batches of a step of the recipe.
    """
    total = batch_size * accumulate
    sizes = [size for size in range(1, total + 1) if total % size == 0]
    best: StagePlan | None = None
    low, high = 0, len(sizes) - 1
    while low <= high:
        middle = (low + high) // 2
        size = sizes[middle]
        flags = ("--data.batch_size", str(size), "--trainer.accumulate_grad_batches", str(total // size))
        result = run(replace(job, device=setup.device(), words=(*job.words, *flags), record=True))
        if isinstance(result, Failed):
            _refuse_other(stage, result)
            high = middle - 1
        else:
            best, low = StagePlan(stage, setup, result, fits=True), middle + 1
    return best


def totals(plans: Sequence[StagePlan]) -> dict[str, float]:
    """Hours and device hours of all stages."""
    return {
        "hours": sum(plan.hours for plan in plans),
        "device_hours": sum(plan.hours * plan.setup.devices for plan in plans),
    }
