"""Measurements as JSON and as tables, with what the plan had said beside them."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lit_vlm.core.versions import installed
from lit_vlm.planning.bench.job import WARMUP, Benched, Reference, Spread
from lit_vlm.planning.bench.kernels import implied
from lit_vlm.planning.plan import GIB, StagePlan

PACKAGES = ("lit-vlm", "torch", "lightning", "transformers", "flash-attn", "peft", "timm")
PLANNED = ("step_seconds", "tokens_per_s", "mfu", "allocated_gib", "reserved_gib")
"""Figures that the plan predicts."""


@dataclass
class Row:
    """A stage: what was measured, and what it is held against.

    Attributes:
        measured: the measurement.
        plan: its plan on the same devices; or why there is none.
        reference: transformers on the same samples, if asked for.
    """

    measured: Benched
    plan: StagePlan | str
    reference: Reference | None = None

    @property
    def figures(self) -> dict[str, float | None]:
        """The figures that a plan predicts, as measured; None where this machine does not tell."""
        one = self.measured
        return {
            "step_seconds": one.mean_seconds,
            "tokens_per_s": one.rate("tokens"),
            "mfu": one.mfu,
            "allocated_gib": one.memory["allocated"] / GIB if one.cuda else None,
            "reserved_gib": one.memory["reserved"] / GIB if one.cuda else None,
        }

    @property
    def planned(self) -> dict[str, float]:
        """The same as the plan says; empty without one."""
        if isinstance(self.plan, str):
            return {}
        run = self.plan.runs
        tokens = run.mean["tokens"] * run.accumulate * self.plan.setup.devices
        return {
            "step_seconds": self.plan.step_seconds,
            "tokens_per_s": tokens / self.plan.step_seconds,
            "mfu": self.plan.mfu,
            "allocated_gib": run.peak / GIB,
            "reserved_gib": run.reserved / GIB,
        }

    def deviation(self, name: str) -> float | None:
        """By how many percent the plan is above the measurement; None where one of them is missing."""
        measured, planned = self.figures[name], self.planned.get(name)
        return 100 * (planned / measured - 1) if measured and planned is not None else None

    @property
    def ratio(self) -> float | None:
        """Tokens a second over those of transformers."""
        slow = self.reference.tokens_per_s if self.reference is not None else 0.0
        return self.measured.rate("tokens") / slow if slow else None

    def to_json(self) -> dict[str, Any]:
        """All figures as plain data."""
        one = self.measured
        spreads = {phase: Spread(values).to_json() for phase, values in one.phases.items()}
        found: dict[str, Any] = {
            "stage": one.stage,
            "strategy": one.strategy,
            "precision": one.precision,
            "processes": one.processes,
            "own_data": one.own_data,
            "batch_size": one.batch_size,
            "accumulate": one.accumulate,
            "steps": one.steps,
            **self.figures,
            "samples_per_s": one.rate("samples"),
            "images_per_s": one.rate("images"),
            "fill": one.counts["tokens"] / max(1.0, one.counts["positions"]),
            "supervised": one.counts["supervised"] / max(1.0, one.counts["tokens"]),
            "model_flops_per_step": None if one.model_flops is None else one.model_flops / one.steps,
            "peak_flops": one.peak_flops,
            "memory": one.memory,
            "data_wait": one.data_wait,
            "step": Spread(one.step_seconds).to_json(),
            "split": spreads,
            "messages": one.messages and dict(zip(("kernels", "exposed"), one.messages, strict=True)),
            "kernels": {kind: {"seconds": k.seconds, "best": k.best} for kind, k in one.kernels.items()},
            "assumptions_from": one.assumptions_from,
        }
        deviations = {name: self.deviation(name) for name in PLANNED}
        found["plan"] = {"note": self.plan} if isinstance(self.plan, str) else self.planned | {"percent": deviations}
        if self.reference is not None:
            found["transformers"] = {
                "tokens_per_s": self.reference.tokens_per_s,
                "step": Spread(self.reference.seconds).to_json(),
                "allocated_gib": self.reference.allocated / GIB,
                "reserved_gib": self.reference.reserved / GIB,
                "attention": self.reference.attention,
                "ratio": self.ratio,
            }
        return found


def report(rows: Sequence[Row], flags: Mapping[str, Any]) -> dict[str, Any]:
    """All measurements as plain data.

    Args:
        rows: a stage each.
        flags: of the command.
    """
    first = rows[0].measured
    shares = implied(row.measured.kernels for row in rows)
    factors = [row.measured.assumptions for row in rows if row.measured.assumptions]
    return {
        "device": first.device,
        "simulated": first.simulated,
        "devices": first.processes,
        "versions": versions(),
        "flags": dict(flags),
        "warmup": WARMUP,
        "stages": [row.to_json() for row in rows],
        "assumptions": shares or _means(factors),
    }


def _means(factors: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = factors[0] if factors else {}
    return {name: sum(one[name] for one in factors) / len(factors) for name in names}


def versions() -> dict[str, str]:
    """Versions of what was measured with."""
    found = {"python": platform.python_version(), **installed(PACKAGES)}
    return found | ({"cuda": torch.version.cuda} if torch.version.cuda else {})


def show(row: Row, console: Console) -> None:
    """Print a table of a stage, and notes."""
    one = row.measured
    data = "its own data" if one.own_data else "drawn data with its published statistics"
    title = (
        f"{one.stage}: {one.processes} × {one.device}, {one.strategy}, {one.precision}, "
        f"{one.batch_size} × {one.accumulate} rows, {one.steps} steps on {data}"
    )
    table = Table("", "measured", "plan", "deviation", title=escape(title), title_justify="left", box=box.SIMPLE_HEAD)
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    texts: dict[str, tuple[str, Callable[[float], str]]] = {
        "step_seconds": ("seconds of a step", _seconds),
        "tokens_per_s": ("tokens/s, without padding", lambda value: f"{value:,.0f}"),
        "mfu": ("MFU", lambda value: f"{100 * value:.1f} %"),
        "allocated_gib": ("peak allocated, GiB", lambda value: f"{value:.2f}"),
        "reserved_gib": ("peak reserved, GiB", lambda value: f"{value:.2f}"),
    }
    for name, (label, text) in texts.items():
        measured, planned, off = row.figures[name], row.planned.get(name), row.deviation(name)
        if measured is not None:
            shown = (text(planned) if planned is not None else "–", f"{off:+.0f} %" if off is not None else "–")
            table.add_row(label, text(measured), *shown)
    table.add_row("samples/s", f"{one.rate('samples'):,.1f}")
    table.add_row("images/s", f"{one.rate('images'):,.1f}")
    if not one.cuda:
        table.add_row("memory of the process, GiB", f"{one.memory['process'] / GIB:.2f}")
    table.add_row("waiting for data", f"{100 * one.data_wait:.1f} %")
    table.add_row("step, median (10 to 90 %)", _spread(one.step_seconds))
    for phase, values in one.phases.items():
        table.add_row(f"  {phase}", _spread(values))
    if one.messages is not None:
        table.add_row("messages of a micro-batch (alone)", " ".join(map(_seconds, one.messages)))
    console.print(table)
    if one.simulated:
        console.print("[red]the device is simulated[/]: memory is real, and no time or speed means anything")
    if isinstance(row.plan, str):
        console.print(f"no plan beside it: {row.plan}", soft_wrap=True, highlight=False)
    if row.reference is not None:
        console.print(_compared(row, row.reference), soft_wrap=True, highlight=False)


def _compared(row: Row, reference: Reference) -> str:
    ratio = f"{row.ratio:.2f}×" if row.ratio is not None else "–"
    memory = f", peak {reference.allocated / GIB:.2f} GiB" if reference.allocated else ""
    return (
        f"against transformers' LlavaForConditionalGeneration ({reference.attention}, unpacked, plain training step, "
        f"loading not timed): {reference.tokens_per_s:,.0f} tokens/s{memory}; lit-vlm is {ratio} as fast"
    )


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.1f} ms"


def _spread(values: Sequence[float]) -> str:
    spread = Spread(values)
    if spread.median >= 1:
        return f"{spread.median:.2f} s ({spread.low:.2f}–{spread.high:.2f})"
    return f"{1000 * spread.median:.1f} ms ({1000 * spread.low:.1f}–{1000 * spread.high:.1f})"
