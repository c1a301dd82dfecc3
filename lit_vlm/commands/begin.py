"""How `lit-vlm run` begins: a new run, or one that goes on; the first process decides, and the others follow it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from lit_vlm.checkpoints.folder import checkpoints_in, is_done, settle
from lit_vlm.commands.asked import Asked
from lit_vlm.commands.recipe import find_recipe, shipped_recipes
from lit_vlm.commands.runs import STATE_FILE, RunState, run_name
from lit_vlm.core.launcher import launch, launch_name, rendezvous
from lit_vlm.core.plugins import named_plugins, nearest
from lit_vlm.core.written import write_whole

KEYS = ("model", "data", "trainer", "checkpoint", "preemption", "watchdog")
"""What flags begin with that are of no single stage."""
DEVICES = ("--trainer.devices", "--trainer.num_nodes")
"""Flags that may change when a run goes on."""
LAUNCHES = ".launches"
"""Folder beside those of runs, in which the first process of a launch tells the others what it has decided."""
SKEW = 30.0
"""Seconds by which clocks of machines, and starts of processes that torchrun brings together, may differ."""
WAIT = 600.0
"""Seconds that a process waits for the first one's decision, which checks all flags before."""


class Begin(NamedTuple):
    """What the first process has decided.

    Attributes:
        folder: folder of the run.
        state: what runs in it.
        goes_on: whether the run was begun before.
        checkpoints: stage → the checkpoint that it goes on from.
    """

    folder: Path
    state: RunState
    goes_on: bool
    checkpoints: dict[str, str] = {}  # noqa: RUF012 - nobody changes it


def decide(asked: Asked) -> Begin:
    """A new run, or, where the folder holds the run of the same command, that run.

    Raises:
        ValueError: for a wrong recipe, stage or flag, nothing to resume, or a folder that holds the run of another
            command.
    """
    if asked.options.resume:
        return _resumed(asked)
    state = state_of(asked)
    if asked.options.out is not None:
        return into(asked.options.out, state)
    name = run_name(find_recipe(state.recipe).name, state.scale)
    folder = Path("runs") / name
    number = 2
    while (folder / STATE_FILE).is_file() and _differences(RunState.load(folder), state):
        folder = Path("runs") / f"{name}-{number}"  # a second experiment in one job has a folder of its own
        number += 1
    return into(folder, state)


def into(folder: Path, state: RunState) -> Begin:
    """A new run in a folder, or the one that it holds.

    Raises:
        ValueError: where it holds the run of another command, with the differences.
    """
    if not (folder / STATE_FILE).is_file():
        return Begin(folder, state, goes_on=False)
    saved = RunState.load(folder)
    if differences := _differences(saved, state):
        raise ValueError(
            f"{folder} holds the run of another command: {'; '.join(differences)}. Choose another --out, or go on with "
            f"that run: lit-vlm run --resume --out {folder}"
        )
    return Begin(folder, _going_on(saved, folder, state.flags), goes_on=True)


def found(begin: Begin) -> Begin:
    """Tidy the folder of a run that goes on, and find the checkpoints of its stages, for all processes alike.

    Another machine may not see yet what is in the folder.
    """
    checkpoints = {}
    for stage in begin.state.stages:
        if stage not in begin.state.done:
            settle(begin.folder / stage / "checkpoints")
            if there := checkpoints_in(begin.folder / stage):
                checkpoints[stage] = str(there[-1])
    return begin._replace(checkpoints=checkpoints)


def _resumed(asked: Asked) -> Begin:
    options = asked.options
    other = [flag for flag in _flags(asked.flags) if flag not in DEVICES]
    if other or options.scale or options.strategy or options.stages:
        raise ValueError(
            "--resume goes on with what the run was started with; besides --out it takes "
            f"{' and '.join(DEVICES)}{f', not {other[0]}' if other else ''}"
        )
    folder = options.out or _newest_unfinished(asked.recipe)
    saved = RunState.load(folder)
    flags = [*_without(saved.flags, DEVICES, asked.flags), *asked.flags]
    return Begin(folder, _going_on(saved, folder, flags), goes_on=True)


def _newest_unfinished(recipe: str | None) -> Path:
    found = sorted(Path("runs").glob(f"*/{STATE_FILE}"), key=lambda file: file.stat().st_mtime, reverse=True)
    for file in found:
        state = RunState.load(file.parent)
        left = [stage for stage in state.stages if stage not in state.done and not is_done(file.parent / stage)]
        if left and recipe in (None, state.recipe):
            return file.parent
    raise ValueError(f"there is no unfinished run{f' of {recipe}' if recipe else ''} in runs/")


def _going_on(saved: RunState, folder: Path, flags: list[str]) -> RunState:
    """The state of a run that goes on: a stage is done where its training has ended, whatever ended the process."""
    done = [stage for stage in saved.stages if stage in saved.done or is_done(folder / stage)]
    return replace(saved, flags=list(flags), done=done)


def state_of(asked: Asked) -> RunState:
    """What a command runs.

    Raises:
        ValueError: for a wrong recipe, scale, strategy or stage, or a flag of no stage.
    """
    if asked.recipe is None:
        raise ValueError(f"name a recipe, as the first argument: {', '.join(shipped_recipes())}")
    recipe = find_recipe(asked.recipe)
    scale = asked.options.scale or recipe.scale
    stages = asked.stages or recipe.stages_for(scale)
    plugins = list(dict.fromkeys([*recipe.plugins, *named_plugins()]))
    strategy = asked.options.strategy or recipe.strategy_for(scale)
    for stage in stages:
        recipe.configs(stage, scale, strategy)
    for flag in asked.flags:
        first = flag.removeprefix("--").partition(".")[0]
        other = flag.startswith("--") and "." in flag and first not in (*KEYS, *recipe.stages)
        if other and (near := nearest(first, recipe.stages)):
            raise ValueError(f"{flag}: '{first}' is no stage{near}; stages: {', '.join(recipe.stages)}")
    return RunState(asked.recipe, scale, strategy, stages, asked.flags, plugins=plugins)


def _differences(saved: RunState, given: RunState) -> list[str]:
    """In what two commands differ, but for the flags that may change."""
    found = []
    for name in ("recipe", "scale", "strategy", "stages", "plugins"):
        before, now = getattr(saved, name), getattr(given, name)
        if before != now:
            found.append(f"{name} {_words(before)} then, {_words(now)} now")
    before, now = (_pairs(_without(state.flags, DEVICES)) for state in (saved, given))
    found += [f"{pair} then, not now" for pair in before if pair not in now]
    found += [f"{pair} now, not then" for pair in now if pair not in before]
    if not found and before != now:
        found.append(f"flags in another order, {' '.join(before)} then")
    return found


def _words(value: object) -> str:
    return ", ".join(value) or "none" if isinstance(value, list) else str(value)


def _pairs(flags: Sequence[str]) -> list[str]:
    """Flags with their values, `--name=value` and `--name value` alike."""
    pairs: list[str] = []
    for flag in flags:
        if flag.startswith("--"):
            pairs.append(flag.replace("=", " ", 1))
        else:
            pairs[-1] += f" {flag}"
    return pairs


def _flags(flags: Sequence[str]) -> list[str]:
    return [flag.partition("=")[0] for flag in flags if flag.startswith("--")]


def _without(flags: Sequence[str], names: Sequence[str], only: Sequence[str] | None = None) -> list[str]:
    """Flags without some and their values; of those, `only` the ones that are among other flags."""
    gone = set(names) if only is None else set(names) & set(_flags(only))
    kept: list[str] = []
    mine = True
    for flag in flags:
        if flag.startswith("--"):
            mine = flag.partition("=")[0] not in gone
        if mine:
            kept.append(flag)
    return kept


# ---------------------------------------------------------------------------- several processes of a launcher


@contextmanager
def together(asked: Asked, decided: Callable[[Asked], Begin]) -> Iterator[Begin]:
    """A context of what the first process decides; the others wait for it, end if it refuses, and end after it.

    The decision goes by a file beside the run's folder, which the processes share, as they share the run.

    Args:
        asked: the command, alike in all processes.
        decided: decides, and checks whatever may refuse the command.

    Raises:
        ValueError: on the first process, what `decided` raises; on others, that it refused, or does not answer.
    """
    mine = launch()
    if mine.world_size == 1:
        yield decided(asked)
        return
    parent = asked.options.out.parent if asked.options.out is not None else Path("runs")
    name = launch_name() if mine.id is not None or mine.nodes == 1 else "{}-{}".format(*rendezvous())
    file = parent / LAUNCHES / f"{name}-{mine.attempt}.json"
    if not mine.is_first:
        since = time.time() - SKEW if mine.by == "torchrun" else 0.0
        begin = _told(file, mine.rank, since)
        try:
            yield begin
        finally:  # a launcher kills what is left when one of its processes ends with an error
            until(lambda: "ended" in _read(file), 20.0)
        return
    said: dict[str, object] = {}
    try:
        begin = decided(asked)
        said = begin._asdict() | {"folder": str(begin.folder), "state": asdict(begin.state)}
        write_whole(file, json.dumps(said))
        yield begin
    except BaseException as error:
        if not said:
            said = {"refused": str(error) if isinstance(error, ValueError | OSError) else "see its own message"}
        raise
    finally:
        write_whole(file, json.dumps(said | {"ended": True}))


def _told(file: Path, rank: int, since: float) -> Begin:
    """The decision of the first process.

    Args:
        file: where it is written.
        rank: of this process.
        since: a file of before is that of another launch of the same name.
    """

    def written() -> bool:
        return file.is_file() and file.stat().st_mtime >= since

    if not until(written, WAIT):
        raise ValueError(
            f"process {rank} waited {WAIT:.0f} s for the first one, which writes {file}: the folder of a run must be "
            "shared by all machines"
        )
    said = _read(file)
    if "refused" in said:
        raise ValueError(f"process {rank} ends, as the first one refused: {said['refused']}")
    return Begin(Path(said["folder"]), RunState(**said["state"]), said["goes_on"], said["checkpoints"])


def _read(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


def until(met: Callable[[], bool], seconds: float) -> bool:
    """Wait until a condition is met; whether it was."""
    end = time.monotonic() + seconds
    while not met():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True
