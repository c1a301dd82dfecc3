"""Plans as a table for the terminal, and as one line."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lit_vlm.planning.job import States
from lit_vlm.planning.plan import GIB, Setup, StagePlan, totals

Row = tuple[str, Callable[[StagePlan], str]]


def _gib(size: float) -> str:
    return f"{size / GIB:,.1f}" if size < 1000 * GIB else f"{size / GIB:,.0f}"


def _large(number: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:,.1f} {unit}"
    return f"{number:,.0f}"


def _span(hours: float) -> str:
    return f"{hours * 60:.0f} min" if hours < 1 else f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"


ROWS: dict[str, list[Row]] = {
    "per GPU, GiB": [
        ("weights", lambda p: _gib(p.runs.states.weights)),
        ("gradients", lambda p: _gib(p.runs.states.gradients)),
        ("optimizer", lambda p: _gib(p.runs.states.optimizer)),
        ("activations, gathered weights", lambda p: _gib(p.activations)),
        ("peak allocated", lambda p: _gib(p.runs.peak)),
        ("peak reserved", lambda p: _gib(p.runs.reserved)),
        ("left", lambda p: _gib(p.setup.room - p.runs.reserved)),
    ],
    "per machine, GiB of host memory": [
        ("while loading", lambda p: _gib(p.host["loading"])),
        ("while training", lambda p: _gib(p.host["training"])),
    ],
    "step": [
        ("micro-batch × accumulation", lambda p: f"{p.runs.batch_size} × {p.runs.accumulate}"),
        ("samples", lambda p: f"{p.samples_per_step:,.0f}"),
        ("tokens", lambda p: _large(p.runs.mean["tokens"] * p.runs.accumulate * p.setup.devices)),
        ("images", lambda p: f"{p.runs.mean['images'] * p.runs.accumulate * p.setup.devices:,.0f}"),
        ("longest micro-batch, positions", lambda p: f"{p.runs.heaviest.positions:,}"),
        ("TFLOP per GPU, needed", lambda p: f"{p.flops['model'] / 1e12:,.0f}"),
        ("TFLOP per GPU, executed", lambda p: f"{p.flops['executed'] / 1e12:,.0f}"),
        ("of these recomputed", lambda p: f"{p.flops['recomputed'] / 1e12:,.0f}"),
        ("seconds", lambda p: f"{p.step_seconds:.2f}"),
        ("MFU", lambda p: f"{100 * p.mfu:.0f} %"),
        ("messages, seconds (not hidden)", lambda p: f"{p.time.messages:.2f} ({p.time.exposed:.2f})"),
    ],
    "stage": [
        ("steps", lambda p: f"{p.steps:,}"),
        ("samples", lambda p: _large(p.samples)),
        ("time", lambda p: _span(p.hours)),
        ("GPU-hours", lambda p: f"{p.hours * p.setup.devices:,.0f}"),
        ("checkpoint, GiB", lambda p: _gib(p.runs.checkpoint)),
        ("data read, MB/s", lambda p: f"{p.runs.record_bytes * p.samples_per_step / p.step_seconds / 1e6:,.1f}"),
    ],
}


def show(plans: Sequence[StagePlan], console: Console) -> None:
    """Print a table with a column per stage, then what fits and what does not."""
    first = plans[0].setup
    title = f"{first.devices} × {first.card.name} ({_gib(first.room)} GiB for PyTorch), {plans[0].runs.precision}"
    table = Table("", *(escape(plan.stage) for plan in plans), title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    table.columns[0].no_wrap = True
    for heading, rows in ROWS.items():
        table.add_row(f"[bold]{heading}[/]")
        for name, value in rows:
            table.add_row(f"  {name}", *(value(plan) for plan in plans))
    if first.price is not None:
        costs = (plan.hours * plan.setup.devices * (plan.setup.price or 0) for plan in plans)
        table.add_row("  cost", *(f"{cost:,.0f}" for cost in costs))
    console.print(table)
    for plan in plans:
        console.print(f"{plan.stage}: {verdict(plan)}", soft_wrap=True, highlight=False)
    if len(plans) > 1:
        whole = totals(plans)
        console.print(f"all stages: {_span(whole['hours'])}, {whole['device_hours']:,.0f} GPU-hours", highlight=False)
    _say_assumptions(plans, console)


def show_states(found: Mapping[str, States], setup: Setup, console: Console) -> None:
    """Print what states take by arithmetic, a column per stage."""
    title = f"{setup.devices} × {setup.card.name} ({_gib(setup.room)} GiB for PyTorch), by arithmetic"
    table = Table("per GPU, GiB", *map(escape, found), title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for name in ("weights", "gradients", "optimizer", "total"):
        table.add_row(name, *(_gib(getattr(states, name)) for states in found.values()))
    table.add_row("activations", *("not known" for _ in found))
    console.print(table)


def verdict(plan: StagePlan) -> str:
    """Whether a stage fits, or which change makes it fit."""
    if plan.fits:
        return f"[green]fits[/], {_gib(plan.setup.room - plan.runs.reserved)} GiB left"
    asked = plan.measured
    needs = f"needs {_gib(asked.peak)} GiB of {_gib(plan.setup.room)}"
    if not plan.changes:
        found = f"; tried: {', '.join(what for what, _ in plan.tried)}" if plan.tried else ""
        return f"[red]does not fit[/]: {needs}{found}"
    flags = " ".join(flag for change in plan.changes for flag in change.flags)
    named = sorted({name for change in plan.changes for name in change.prepared})
    prepare = f" after lit-vlm prepare targets ({', '.join(named)})" if named else ""
    what = " and ".join(change.what for change in plan.changes)
    return f"[yellow]does not fit[/]: {needs}; fits with {what}{prepare}" + (f": {escape(flags)}" if flags else "")


def _say_assumptions(plans: Sequence[StagePlan], console: Console) -> None:
    assumed, card = plans[0].setup.assumed, plans[0].setup.card
    lengths = (
        "the data" if all(plan.runs.records is None for plan in plans) else "published statistics, as data are not here"
    )
    said = [
        f"Time is an estimate: matrix products at {100 * assumed.matrix:.0f} % of {card.flops / 1e12:,.0f} TFLOP/s",
        f"attention at {100 * assumed.attention:.0f} %",
        f"other operations at {100 * assumed.bandwidth:.0f} % of {card.bandwidth / 1e12:.2f} TB/s",
        f"messages at {100 * assumed.link:.0f} % of {card.link / 1e9:,.0f} GB/s in a machine and of "
        f"{assumed.network / 1e9:,.0f} GB/s per GPU between machines",
        f"with lengths and pictures of {lengths}.",
    ]
    console.print(f"[dim]{', '.join(said)}[/]", highlight=False)
