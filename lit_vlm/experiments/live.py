"""How an ablation is, in a table: what will train, what trains, how far it is, how long it will take."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from lit_vlm.checkpoints.folder import is_done
from lit_vlm.checkpoints.progress import AT_WORK, Progress, seconds_between
from lit_vlm.cluster.status import length
from lit_vlm.experiments.plan import Plan
from lit_vlm.experiments.pool import State, Task

COLOURS = {State.RUNNING: "green", State.FAILED: "red", State.LEFT_OUT: "red", State.LEFT: "yellow"}
SHOWN = 24
"""Rows of the live table at most."""


def plan_table(plan: Plan) -> Table:
    """What an ablation trains: per stage the runs that want it, and how often it trains."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("stage", "runs", "trained", "shared"):
        table.add_column(title, justify="left" if title == "stage" else "right")
    wanted = Counter(stage for stages in plan.runs.values() for stage in stages)
    trained = Counter(node.stage for node in plan.nodes.values())
    for stage, count in wanted.items():
        table.add_row(stage, str(count), str(trained[stage]), str(count - trained[stage]))
    return table


def known_seconds(plan: Plan, folders: Mapping[str, Path], earlier: Iterable[Path] = ()) -> dict[str, float]:
    """Seconds that a stage takes in the mean, by its name, as far as some have trained.

    Args:
        plan: the plan.
        folders: id of a node → its folder.
        earlier: folders of stages of other runs; they tell of stages of their name that none of the plan tells of.
    """
    own = _seconds((node.stage, folders[node.id]) for node in plan.nodes.values())
    return _seconds((folder.name, folder) for folder in earlier) | own


def _seconds(stages: Iterable[tuple[str, Path]]) -> dict[str, float]:
    """Mean seconds by name of a stage, of pairs of name and folder; what has not ended does not count."""
    found = defaultdict(list)
    for name, folder in stages:
        told = Progress.read(folder) if is_done(folder) else None
        if told is not None:
            found[name].append(told.seconds)
    return {name: statistics.fmean(values) for name, values in found.items()}


def cost_line(plan: Plan, seconds: Mapping[str, float]) -> str:
    """What the plan costs and what sharing saves, as far as times are known."""
    missing = sorted({node.stage for node in plan.nodes.values()} - set(seconds))
    if missing:
        return f"times are known once a run has trained {', '.join(missing)}"
    trained = sum(seconds[node.stage] for node in plan.nodes.values())
    wanted = sum(seconds[stage] for stages in plan.runs.values() for stage in stages)
    return f"{length(trained)} of training, {length(wanted - trained)} saved by sharing stages"


def live_table(
    plan: Plan, tasks: Sequence[Task], states: Mapping[str, State], folders: Mapping[str, Path], slots: int
) -> RenderableType:
    """What runs now, what failed, and what comes next.

    Args:
        plan: the plan.
        tasks: all that is to be done.
        states: name of a task → its state.
        folders: id of a node → its folder.
        slots: how many run side by side.
    """
    count = Counter(states[task.name] for task in tasks)
    words = [f"{count[state]} {state.value}" for state in State if count[state]]
    left = _seconds_left(plan, tasks, states, folders)
    eta = f"; about {length(left / max(1, slots))} to go" if left else ""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("stage", "runs", "state", "step", "left"):
        table.add_column(title, justify="right" if title in ("step", "left") else "left", no_wrap=title != "runs")
    order = (State.RUNNING, State.FAILED, State.LEFT, State.LEFT_OUT, State.WAITING)
    rows = [task for state in order for task in tasks if states[task.name] is state]
    for task in rows[:SHOWN]:
        table.add_row(*_row(plan, task, states[task.name], folders), style=COLOURS.get(states[task.name], "dim"))
    hidden = len(rows) - SHOWN
    more = [Text(f"... and {hidden} more", style="dim")] if hidden > 0 else []
    return Group(Text(f"{count[State.DONE]} of {len(tasks)} done ({', '.join(words)}){eta}"), table, *more)


def _row(plan: Plan, task: Task, state: State, folders: Mapping[str, Path]) -> Iterator[str]:
    node = plan.nodes[task.name.partition(" ")[0]]
    told = Progress.read(folders[node.id]) if task.name == node.id else None
    variants = Counter(run.variant for run in node.runs)
    seeds = sorted({run.seed for run in node.runs})
    yield task.name.replace(node.id, node.stage, 1)
    yield f"{', '.join(variants)}  seed {', '.join(map(str, seeds))}"
    at_work = state is State.RUNNING and told is not None and told.state in AT_WORK
    yield told.state if at_work and told is not None and told.state != "training" else state.value
    yield f"{told.step:,}/{told.steps:,}" if told is not None and told.steps else ""
    left = _left_of(told) if at_work and told is not None else None
    yield length(left) if left is not None else ""


def _left_of(told: Progress) -> float | None:
    """Seconds until a stage ends at the pace of this attempt; None while it is not known."""
    done = told.step - told.first_step
    if not told.steps or done < 1:
        return None
    return (told.steps - told.step) * seconds_between(told.started, told.time) / done


def _seconds_left(
    plan: Plan, tasks: Sequence[Task], states: Mapping[str, State], folders: Mapping[str, Path]
) -> float | None:
    """Seconds of one device until all stages are trained; None while a stage's time is not known."""
    known = known_seconds(plan, folders)
    total = 0.0
    for task in tasks:
        node = plan.nodes.get(task.name)
        if node is None or states[task.name] not in (State.WAITING, State.RUNNING):
            continue
        told = Progress.read(folders[node.id])
        left = _left_of(told) if told is not None and states[task.name] is State.RUNNING else None
        if left is None and node.stage not in known:
            return None
        total += (left if left is not None else known[node.stage]) * node.devices
    return total


def print_states(
    console: Console, tasks: Sequence[Task], states: Mapping[str, State], before: dict[str, State]
) -> None:
    """Print a line for each task whose state has changed, where there is no terminal to draw a table on.

    Args:
        console: where it is printed.
        tasks: all that is to be done.
        states: name of a task → its state.
        before: the states at the last call, which this one replaces.
    """
    if not before:
        done = [task for task in tasks if states[task.name] is State.DONE]
        before |= {task.name: State.DONE for task in done}
        console.print(f"{len(done)} of {len(tasks)} done already" if done else f"{len(tasks)} to do")
    for task in tasks:
        if states[task.name] is not before.get(task.name) and states[task.name] is not State.WAITING:
            console.print(f"{task.name}: {states[task.name].value}", soft_wrap=True)
    before |= states
