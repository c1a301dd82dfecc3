"""A stage is measured: steps of its own loader and trainer on the devices of this machine, with drawn weights."""

from __future__ import annotations

import math
import resource
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import lightning.pytorch as L
import torch

from callbacks.throughput import known_peak
from lit_vlm.core.batch import Counts
from lit_vlm.core.devices import Card, card_of
from lit_vlm.core.progress import progress
from lit_vlm.data import VLMData
from lit_vlm.planning import no_gpu
from lit_vlm.planning.bench.job import WARMUP, Benched, BenchJob
from lit_vlm.planning.bench.kernels import exposed, kernel_times, recorded, scaled
from lit_vlm.planning.bench.look import Look, per_node
from lit_vlm.planning.bench.step import Clock, Timed
from lit_vlm.planning.roofline import Assumptions, estimate
from lit_vlm.planning.stages import Stages, built, only_steps

MACHINE = 8
"""Processes, at most, that made-up data hold batches for."""


def run_bench(job: BenchJob, stages: Stages) -> Benched | None:
    """Measure a stage in this process, which is of no use for anything else afterwards.

    Args:
        job: the stage.
        stages: builds its objects.

    Returns:
        what was measured; None on all processes but the first.

    Raises:
        ValueError: for wrong flags, and for anything that training refuses.
    """
    with tempfile.TemporaryDirectory() as folder:
        cli, records = built(job.words, job.statistics, MACHINE, stages, folder)
        module, data, trainer = cli.model, cli.datamodule, cli.trainer
        module.__class__ = Timed
        module.stage.start_from, module.stage.fresh = None, []
        with _telling(job, trainer) as tell:
            clock, look = Clock(WARMUP, job.steps, tell), Look(job, trainer)
            module.clock = clock
            only_steps(trainer, WARMUP + job.steps + look.steps, [look, clock])
            trainer.fit(module, datamodule=data)
        return _result(job, module, data, clock, look, records is None)


def _telling(job: BenchJob, trainer: L.Trainer) -> AbstractContextManager[Callable[[int], None]]:
    return progress(f"{job.stage}: steps", WARMUP + job.steps, shown=trainer.global_rank == 0)


def device_name(device: torch.device) -> str:
    """Name of a GPU or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), device.type)


def _result(job: BenchJob, module: Timed, data: VLMData, clock: Clock, look: Look, own_data: bool) -> Benched | None:
    trainer = module.trainer
    device = trainer.strategy.root_device  # the module has left it
    cuda = device.type == "cuda"
    *values, flops = _sums([*clock.counts, clock.flops], trainer)
    if trainer.global_rank != 0:
        return None
    memory = {
        "allocated": clock.allocated,
        "reserved": clock.reserved,
        "device": clock.device_used,
        "total": clock.device_bytes,
    }
    result = Benched(
        stage=job.stage,
        device=device_name(device),
        cuda=cuda,
        processes=trainer.world_size,
        per_node=per_node(trainer),
        strategy=type(trainer.strategy).__name__,
        precision=str(trainer.precision),
        own_data=own_data,
        batch_size=data.batch_size,
        accumulate=trainer.accumulate_grad_batches,
        seconds=max(clock.seconds, 1e-9),
        counts=dict(zip(Counts._fields, values, strict=True)),
        phases=clock.phases(),
        model_flops=None if math.isnan(flops) else flops,
        peak_flops=known_peak(device),
        memory=memory if cuda else {"process": peak_of_process()},
        simulated=no_gpu.loaded(),
    )
    _explain(result, look, card_of(device))
    return result


def _sums(values: Sequence[float], trainer: L.Trainer) -> list[float]:
    """Sums over all processes."""
    if trainer.world_size == 1:
        return list(values)
    local = torch.tensor(values, dtype=torch.float64, device=trainer.strategy.root_device)
    return list(trainer.strategy.reduce(local, reduce_op="sum").tolist())


def _explain(result: Benched, look: Look, card: Card | None) -> None:
    """What the step that was looked into says of the roofline's assumptions."""
    launches, spans = recorded(look.events)
    result.kernels = kernel_times(launches, look.recorder.operations, card)
    result.messages = exposed(spans) if spans else None
    if result.simulated:
        result.assumptions_from = "nothing: the device is simulated"
    elif not result.cuda:
        result.assumptions_from = "nothing: the roofline is one of GPUs"
    elif card is None:
        result.assumptions_from = f"nothing: the peaks of {result.device} are not known"
    elif result.kernels:
        result.assumptions_from = "kernels of one step"  # their shares are taken over all stages
    else:
        micro_batches = result.steps * result.accumulate * result.processes
        work = result.counts["positions"] / micro_batches / max(1, look.counts.positions)
        done = (look.recorder.operations, look.recorder.messages)
        time = estimate(*done, card, result.per_node, Assumptions(), work=work)
        factor = time.step(result.accumulate) / result.mean_seconds
        result.assumptions = scaled(factor)
        result.assumptions_from = "one factor for all, as no kernel was seen"


def peak_of_process() -> int:
    """Most bytes of memory that this process has had."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
