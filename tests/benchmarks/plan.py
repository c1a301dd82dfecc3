"""What `lit-vlm plan` predicts: against authors' reports, and against measured peaks of memory on the CPU.

`python -m tests.benchmarks plan` prints the two tables of docs/planning.md.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch

from lit_vlm.commands.fit import lightning_cli, quietly
from lit_vlm.commands.plan import jobs, simulator
from lit_vlm.commands.recipe import find_recipe
from lit_vlm.core.devices import CARDS
from lit_vlm.data.feed.batching import GlobalBatch
from lit_vlm.model.build import build_on_meta
from lit_vlm.planning.batches import choose
from lit_vlm.planning.job import Device, Job, Measured
from lit_vlm.planning.plan import Setup, plan_stage
from lit_vlm.planning.roofline import Assumptions
from lit_vlm.teachers import EncoderTeacher
from tests.benchmarks.measure import added_mib

GIB, MIB = 2**30, 2**20


class Report(NamedTuple):
    """What authors say of a training."""

    what: str
    recipe: str
    scale: str | None
    stages: tuple[str, ...]
    devices: int
    card: str
    hours: float
    source: str
    flags: tuple[str, ...] = ()


DAY = 24.0
PACKED = ("--data.batching", "Packed")
"""VILA's release packs what is in a micro-batch (`llava_arch.py`), which is between padded rows and `Packed`."""
REPORTS = (
    Report("LLaVA-1.5 7B, stage 1", "llava15", "7b", ("1_align",), 8, "a100-80", 3.5, "LLaVA's README"),
    Report("LLaVA-1.5 7B, stage 2", "llava15", "7b", ("2_sft",), 8, "a100-40", 10.0, "LLaVA's README"),
    Report("VILA-1.0 7B, stage 0", "vila", "7b", ("0_align",), 8, "a100-80", 3.5, "VILA's README"),
    Report("VILA-1.0 7B, stage 0", "vila", "7b", ("0_align",), 8, "a100-80", 3.5, "VILA's README", PACKED),
    Report("VILA-1.0 7B, stage 1", "vila", "7b", ("1_pretrain",), 128, "a100-80", 30.0, "VILA's README"),
    Report("VILA-1.0 7B, stage 1", "vila", "7b", ("1_pretrain",), 128, "a100-80", 30.0, "VILA's README", PACKED),
    Report("VILA-1.0 7B, stage 2", "vila", "7b", ("2_sft",), 8, "a100-80", 25.0, "VILA's README"),
    Report("VILA-1.0 7B, stage 2", "vila", "7b", ("2_sft",), 8, "a100-80", 25.0, "VILA's README", PACKED),
    Report("VILA-1.0 13B, stage 0", "vila", "13b", ("0_align",), 8, "a100-80", 5.5, "VILA's README"),
    Report("VILA-1.0 13B, stage 0", "vila", "13b", ("0_align",), 8, "a100-80", 5.5, "VILA's README", PACKED),
    Report("VILA-1.0 13B, stage 2", "vila", "13b", ("2_sft",), 8, "a100-80", 40.0, "VILA's README"),
    Report("VILA-1.0 13B, stage 2", "vila", "13b", ("2_sft",), 8, "a100-80", 40.0, "VILA's README", PACKED),
    Report("VILA-13B, all", "vila", "13b", (), 128, "a100-80", 2 * DAY, "NVIDIA's blog on VILA"),
    Report("VILA-13B, all", "vila", "13b", (), 128, "a100-80", 2 * DAY, "NVIDIA's blog on VILA", PACKED),
    Report(
        "EVE-7B without HD", "eve", "7b", ("1_align", "2_pretrain", "3_sft"), 16, "a100-40", 9 * DAY, "EVE's README"
    ),
    Report(
        "EVE-7B without HD", "eve", "7b", ("1_align", "2_pretrain", "3_sft"), 32, "a100-40", 5 * DAY, "EVE's README"
    ),
    Report("EVE-7B, all", "eve", "7b", (), 16, "a100-40", 9 * DAY, "EVE's README"),
    Report("EVE-7B, all", "eve", "7b", (), 32, "a100-40", 5 * DAY, "EVE's README"),
    Report("OLA-VLM 8B, both", "ola_vlm", "8b", (), 16, "mi300x", 0.0, "not reported"),
)
SMALL = (
    ("llava15", "tiny", "2_sft", ("--data.batch_size", "8")),
    ("eve", "smol", "1_align", ()),
    ("eve", "smol", "3_sft", ()),
    ("hovle", "smol", "1_distill", ()),
    ("hovle", "smol", "3_sft", ()),
    ("vila", "smol", "1_pretrain", ()),
    ("ola_vlm", "smol", "1_pretrain", ()),
)
"""Stages that a CPU runs: recipe, scale, stage, flags."""
LARGER = json.dumps(
    {
        "model_type": "llama", "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8,
        "num_attention_heads": 12, "num_key_value_heads": 12,
    }
)  # fmt: skip
FLAGS = ("--trainer.precision", "32-true")
"""Both sides compute in fp32, as many CPUs do nothing else."""


def main() -> None:
    """Print both tables."""
    for line in chain(reported(), [""], peaks()):
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


def reported() -> Iterator[str]:
    """Lines of the table of what authors report."""
    yield "| what | GPUs | reported | planned | deviation | peak reserved, GiB | source |"
    yield "|---|---|---|---|---|---|---|"
    for one in REPORTS:
        setup = Setup(CARDS[one.card], one.devices, 8, Assumptions())
        with simulator(setup) as process:
            found = jobs(find_recipe(one.recipe), one.scale, None, one.stages or None, one.flags, setup)
            plans = [plan_stage(stage, job, setup, process.run) for stage, job in found]
        hours = sum(plan.hours for plan in plans)
        deviation = f"{100 * (hours / one.hours - 1):+.0f} %" if one.hours else ""
        most = max(plan.runs.reserved for plan in plans) / GIB
        fits = "" if all(plan.fits for plan in plans) else ", does not fit"
        what = f"{one.what}, packed" if one.flags else one.what
        yield (
            f"| {what} | {one.devices} × {setup.card.name} | {_span(one.hours)} | {_span(hours)} | {deviation} | "
            f"{most:.1f} of {setup.room / GIB:.1f}{fits} | {one.source} |"
        )


def _span(hours: float) -> str:
    return "" if not hours else f"{hours:.1f} h" if hours < 2 * DAY else f"{hours / DAY:.1f} days"


def peaks() -> Iterator[str]:
    """Lines of the table of planned and measured peaks."""
    yield "| stage | states planned, MiB | measured | deviation | peak planned, MiB | measured | deviation |"
    yield "|---|---|---|---|---|---|---|"
    setup = Setup(CARDS["h100"], 1, 1, Assumptions())
    with simulator(setup) as process:
        for recipe, scale, stage, flags in SMALL:
            job = _job(recipe, scale, stage, flags, setup)
            planned = process.run(job)
            assert isinstance(planned, Measured), planned
            states, peak = measure(job)
            own = planned.states.total / MIB, planned.peak / MIB
            yield (
                f"| {recipe} {scale} {stage} | {own[0]:,.0f} | {states:,.0f} | {100 * (own[0] / states - 1):+.1f} % | "
                f"{own[1]:,.0f} | {peak:,.0f} | {100 * (own[1] / peak - 1):+.1f} % |"
            )


def _job(recipe: str, scale: str, stage: str, flags: tuple[str, ...], setup: Setup) -> Job:
    found = find_recipe(recipe)
    words = (*flags, *FLAGS)
    if scale == "tiny":
        words += ("--model.decoder.init_args.config", LARGER, "--model.decoder.init_args.tokenizer", "bytes")
    made = next(jobs(found, scale, "single", [stage], words, setup))[1]
    return replace(made, device=Device("H100", 100 * GIB), statistics=None)


def measure(job: Job) -> tuple[float, float]:
    """MiB of states, and of the peak, of the heaviest step on the CPU, in a process of its own."""
    # Memory that is freed goes back to the system at once, so that the process's peak is that of its tensors.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = os.environ["MALLOC_TRIM_THRESHOLD_"] = "65536"
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=_measure, args=(job, send))
    child.start()
    result: tuple[float, float] = receive.recv()
    child.join()
    return result


def _measure(job: Job, send: Connection) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, quietly():
        words = [*job.words, "--trainer.logger", "false", "--trainer.default_root_dir", folder]
        cli: Any = lightning_cli(words, run=False)
        module, data = cli.model, cli.datamodule
        module.stage.start_from, module.stage.fresh = None, []
        module.model = build_on_meta(module.slots)
        module.stage.freeze(module.model, module.slots.removed_heads)
        batch = choose(module, data, GlobalBatch(data.batch_size, 1), ()).heaviest
        module.model = None
        send.send(_steps(module, batch))


def _steps(module: Any, batch: Any) -> tuple[float, float]:
    """MiB that states and a step add to this process."""
    losses = module.stage.losses
    held: dict[str, Any] = {}

    def build() -> None:
        held["model"] = model = module.build()
        module._leave_out(model)
        module.stage.freeze(model, module.slots.removed_heads)
        for name, head in model.heads.items():
            if losses.get(name) and getattr(head, "teacher", None) is not None:
                head.teacher.load()
        model.train()
        held["optimizer"] = module.stage.make_optimizer(model)

    def step() -> None:
        held["optimizer"].zero_grad()
        sums = held["model"](batch, losses)
        sum(losses[name] * value for name, value in sums.items()).backward()
        held["optimizer"].step()

    build()
    model, optimizer = held["model"], held["optimizer"]
    step()
    asked = [
        head.teacher for head in model.heads.values() if isinstance(getattr(head, "teacher", None), EncoderTeacher)
    ]
    teachers = [teacher.encoder for teacher in asked]
    tensors = [*model.parameters(), *model.buffers(), *(p for teacher in teachers for p in teacher.parameters())]
    tensors += [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    kept = _mib(tensors)
    gradients = _mib([p.grad for p in model.parameters() if p.grad is not None])
    optimizer.zero_grad()
    return kept + gradients, kept + added_mib(step)


def _mib(tensors: list[torch.Tensor]) -> float:
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors if not t.is_meta}.values()) / MIB


if __name__ == "__main__":
    main()
