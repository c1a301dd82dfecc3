"""`lit-vlm plan`: memory, time and cost of each stage of a recipe, from a step that runs on simulated devices."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from lit_vlm.commands.asked import FLAGS_OF_RUN, Asked, ask, flags_for, recipe_parser
from lit_vlm.commands.fit import quietly
from lit_vlm.commands.recipe import Recipe, find_recipe, shipped_recipes
from lit_vlm.core.devices import CARDS, Card, card_of, short_name
from lit_vlm.core.plugins import named_plugins, nearest, use_plugins
from lit_vlm.planning import no_gpu
from lit_vlm.planning.job import Job, Statistics
from lit_vlm.planning.plan import Setup, largest_micro_batch, plan_stage
from lit_vlm.planning.published import shipped
from lit_vlm.planning.report import show, show_states
from lit_vlm.planning.roofline import Assumptions
from lit_vlm.planning.simulation import Rehearsal, Simulator
from lit_vlm.planning.sizes import states_alone
from lit_vlm.planning.statistics import find_statistics
from lit_vlm.planning.survey import Stage, markdown

DEFAULT_CARD = "h100"
PER_NODE = 8
EVERY = "all"
"""In the place of a recipe: all of them."""
OWN_DATA = ("tiny", "tiny_deep", "mini", "smol")
"""Scales whose data are made here, and not described by the statistics of published ones."""
WORKER = (sys.executable, "-P", "-m", "lit_vlm.commands.simulated")


def main(argv: Sequence[str]) -> None:
    """Plan the stages of a recipe and print a table, or JSON.

    Raises:
        ValueError: for a wrong argument or flag, or a machine that cannot simulate devices.
        SystemExit: where a stage does not fit, with code 1.
    """
    asked = ask(_parser(), argv)
    if asked.recipe is None:
        raise ValueError(f"name a recipe, as the first argument, or all: {', '.join(shipped_recipes())}")
    if asked.recipe == EVERY:
        _survey(_setup(asked.options, None), asked)
        return
    recipe, arguments = find_recipe(asked.recipe), asked.options
    use_plugins([*recipe.plugins, *named_plugins()])
    console = Console()
    plans = []
    present = _present_card()
    setup = _setup(arguments, present)
    if not (present or no_gpu.can_simulate()):
        _states_alone(recipe, asked, setup, console)
        return
    with _runner(setup, present) as run:
        for stage, job in jobs(recipe, arguments.scale, arguments.strategy, asked.stages, asked.flags, setup):
            with console.status(f"planning {stage} ...") if not arguments.json else _silent():
                plan = plan_stage(stage, job, setup, run.run)
                if arguments.search:
                    base = plan.measured
                    found = largest_micro_batch(stage, job, setup, run.run, base.batch_size, base.accumulate)
                    plan = found or plan
            plans.append(plan)
    if arguments.json:
        sys.stdout.write(json.dumps([plan.to_json() for plan in plans], indent=1) + "\n")
    else:
        show(plans, console)
    if not all(plan.fits or plan.changes for plan in plans):
        raise SystemExit(1)


def _survey(setup: Setup, asked: Asked) -> None:
    """Print the table of all recipes at their published scales."""
    arguments = asked.options
    if asked.flags or arguments.scale or arguments.strategy or arguments.stages or arguments.json or arguments.search:
        raise ValueError(f"lit-vlm plan {EVERY} takes --device, --devices, --per-node and --measured alone")
    with simulator(setup) as process:
        for line in markdown(_published(setup), setup, process.run):
            sys.stdout.write(line + "\n")
            sys.stdout.flush()


def _published(setup: Setup) -> Iterator[Stage]:
    """Stages of all recipes at the scales whose data have statistics."""
    for name in shipped_recipes():
        recipe = find_recipe(name)
        for scale in dict.fromkeys([recipe.scale, *recipe.scales]):
            strategy = recipe.strategy_for(scale)
            for stage in () if scale in OWN_DATA else recipe.stages_for(scale):
                if _statistics(recipe, stage, scale) is None:
                    continue
                job = partial(_job_on, recipe, scale, strategy, stage, setup)
                yield Stage(name, scale or "", stage, job)


def _job_on(recipe: Recipe, scale: str | None, strategy: str, stage: str, setup: Setup, count: int) -> Job:
    """The job of a stage on a number of devices; a single one shards nothing."""
    how = strategy if count > 1 else "single"
    return next(jobs(recipe, scale, how, [stage], [], replace(setup, devices=count)))[1]


@contextmanager
def _silent() -> Iterator[None]:
    yield


def _parser() -> argparse.ArgumentParser:
    parser = recipe_parser(
        "plan",
        "RECIPE [options] [flags for all stages or one]\nall [--device ...]",
        "Say what each stage of a recipe takes: memory of devices and hosts, time, cost, and what makes it fit. A step "
        "of each stage runs on simulated GPUs, without weights, data or network. all in place of RECIPE prints a table "
        "of every recipe at its published scales, in Markdown.",
        FLAGS_OF_RUN,
    )
    parser.add_argument("--devices", type=int, default=8, help="number of GPUs (default: 8)")
    parser.add_argument("--per-node", type=int, default=PER_NODE, help=f"GPUs of a machine (default: {PER_NODE})")
    parser.add_argument(
        "--device",
        help=f"the GPU: {', '.join(CARDS)}; or its memory in GiB, with the speed of an {DEFAULT_CARD} (default: this "
        f"machine's, on which the step then runs for real, or {DEFAULT_CARD})",
    )
    parser.add_argument("--price", type=float, help="cost of a GPU hour")
    parser.add_argument(
        "--measured", type=Path, help="a file that lit-vlm bench wrote: what it measured replaces what is assumed"
    )
    parser.add_argument("--search", action="store_true", help="find the largest micro-batch that fits")
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    return parser


def _setup(arguments: argparse.Namespace, present: str | None) -> Setup:
    if arguments.devices < 1 or arguments.per_node < 1:
        raise ValueError("--devices and --per-node are at least 1")
    if arguments.devices > arguments.per_node and arguments.devices % arguments.per_node:
        raise ValueError(
            f"--devices {arguments.devices} does not divide into machines of --per-node {arguments.per_node}"
        )
    assumed = Assumptions()
    if arguments.measured is not None:
        assumed = assumed.changed(_measured(arguments.measured))
    card = _card(arguments.device or present or DEFAULT_CARD)
    return Setup(card, arguments.devices, arguments.per_node, assumed, price=arguments.price)


def _card(name: str) -> Card:
    """The card of a name, or one of a size in GiB."""
    if name in CARDS:
        return CARDS[name]
    try:
        size = float(name)
    except ValueError:
        raise ValueError(
            f"--device {name} is no GPU that is known{nearest(name, list(CARDS))} and no number of GiB; known: "
            f"{', '.join(CARDS)}"
        ) from None
    if size < 1:
        raise ValueError("--device takes at least 1 GiB")
    return replace(CARDS[DEFAULT_CARD], name=f"GPU of {size:g} GiB", marketed=round(size))


def _measured(file: Path) -> dict[str, float]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return {str(name): float(value) for name, value in content["assumptions"].items()}
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"--measured {file} is no file of lit-vlm bench --json: it has no 'assumptions'") from error


def _present_card() -> str | None:
    """Short name of the GPU of this machine; None without one, or for one that is not known."""
    card = card_of(torch.device("cuda", 0)) if torch.cuda.is_available() else None
    return short_name(card) if card is not None else None


@contextmanager
def _runner(setup: Setup, present: str | None) -> Iterator[Simulator | Rehearsal]:
    """What runs steps: the GPU of this machine where that is what is planned for, else simulated ones."""
    if present is None or CARDS[present] is not setup.card:
        with simulator(setup) as process:
            yield process
    elif no_gpu.can_simulate():
        with simulator(setup) as process:
            yield Rehearsal((*WORKER, "one"), _environment(), process)
    else:
        yield Rehearsal((*WORKER, "one"), _environment(), None)


def _states_alone(recipe: Recipe, asked: Asked, setup: Setup, console: Console) -> None:
    """Print what weights, gradients and optimizer take by arithmetic, and what is missing for a plan."""
    from lit_vlm.commands.simulated import Commands

    try:
        no_gpu.library()
    except no_gpu.NoSimulation as error:
        console.print(f"[yellow]No step can run: {error}. What follows is arithmetic of states alone.[/]")
    found = {}
    arguments = asked.options
    for stage, job in jobs(recipe, arguments.scale, arguments.strategy, asked.stages, asked.flags, setup):
        with shipped(), quietly():
            found[stage] = states_alone(job, Commands())
    if arguments.json:
        states = {stage: vars(one) | {"arithmetic": True} for stage, one in found.items()}
        sys.stdout.write(json.dumps(states, indent=1) + "\n")
    else:
        show_states(found, setup, console)


def _environment() -> dict[str, str]:
    return {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }


@contextmanager
def simulator(setup: Setup) -> Iterator[Simulator]:
    """A process that runs steps on simulated devices.

    Args:
        setup: what kind of device, and how many a machine has.

    Raises:
        NoSimulation: where devices cannot be simulated; a ValueError that says what is missing.
    """
    with Simulator(WORKER, _environment() | no_gpu.environment(setup.device(), setup.per_node)) as process:
        yield process


def jobs(
    recipe: Recipe,
    scale: str | None,
    strategy: str | None,
    stages: Sequence[str] | None,
    flags: Sequence[str],
    setup: Setup,
) -> Iterator[tuple[str, Job]]:
    """Yield each stage and its job.

    Args:
        recipe: the recipe.
        scale: a scale of it; None: its own.
        strategy: a strategy; None: that of the scale.
        stages: stages; None: all.
        flags: flags for all stages, or for one.
        setup: number of devices.
    """
    scale = scale or recipe.scale
    for stage in stages or recipe.stages_for(scale):
        words: list[str] = ["--plugins", ",".join(plugins)] if (plugins := named_plugins()) else []
        for config in recipe.configs(stage, scale, strategy or recipe.strategy_for(scale)):
            words += ["--config", os.path.abspath(config)]
        words += flags_for(stage, flags, recipe.stages)
        # Data that flags name must be there; those of the recipe may not be on this machine.
        named = any(flag.partition("=")[0].startswith("--data.train") for flag in words)
        known = None if named else _statistics(recipe, stage, scale)
        yield stage, Job(tuple(words), setup.device(), setup.devices, setup.per_node, statistics=known)


def _statistics(recipe: Recipe, stage: str, scale: str | None) -> Statistics | None:
    """Where the statistics of a stage's published data are; None for a stage without."""
    try:
        file, name = find_statistics(recipe.statistics(stage), recipe.name)
    except ValueError:
        return None
    return Statistics(str(file.resolve()), name, scale)
