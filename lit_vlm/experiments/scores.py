"""Reading finished runs: settings, scores, curves and costs, from the folder of a run or of one stage."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from lit_vlm.checkpoints.folder import DONE_FILE, checkpoints_in, is_done, step_of
from lit_vlm.checkpoints.progress import Progress
from lit_vlm.experiments.results import Cost, Run, Score
from lit_vlm.experiments.stage_scores import HELD_OUT, read_object, stage_scores
from lit_vlm.experiments.tracked import PEAKS, TOKENS, Tracked, read_tracked

RUN_FILE, CONFIG_FILE = "run.json", "config.yaml"
SEED_FLAG, DEFAULT_SEED = "--seed_everything", "0"
GIB = 2**30
LOSSES = ("train/loss", "val/loss")
MAIN_LOSSES = ("val/loss", "train/loss")
"""Which loss stands for a run that has no other score, the first that there is."""
FINAL_SHARE = 0.1
"""Share of the last stage's logged training losses whose mean is its final one."""
MINE = (
    "seed_everything",
    "config",
    "ckpt_path",
    "trainer.default_root_dir",
    "trainer.logger",
    "model.stage.start_from",
)
"""Keys of a stage's config, and beginnings of keys, that tell where it ran and not what it is."""


@dataclass(frozen=True)
class _Folders:
    """Where a run lies and what its command line says."""

    seed: int
    settings: tuple[str, ...]
    stages: tuple[Path, ...]


def read_run(folder: Path, variant: str = "") -> Run:
    """Read a finished run; curves, final losses, versions and fingerprints are those that MLflow keeps.

    Args:
        folder: folder of a `lit-vlm run`, or of one stage. Folders of stages may be links.
        variant: the name of its settings.

    Raises:
        ValueError: when the folder is not that of a run, or the run has not ended, has no scores, or a seed that is no
            number.
    """
    found = _of_run(folder) if (folder / RUN_FILE).is_file() else _of_stage(folder)
    known = [read_tracked(stage) for stage in found.stages]
    last = found.stages[-1]
    steps = [_steps(stage) for stage in found.stages]
    cost = _cost(found.stages, steps, known[-1])
    measured = _measured(known[-1], cost)
    scores = stage_scores(last)
    if not scores and not any(name.startswith(LOSSES) for name in measured):
        raise ValueError(
            f"{last / HELD_OUT} holds no scores: the last stage of the run needs callbacks.HeldOut, or lit-vlm evaluate"
        )
    if not scores and (loss := next((name for name in MAIN_LOSSES if name in measured), None)) is not None:
        measured[loss] = replace(measured[loss], main=True)
    origin = {key: value for one in known for key, value in one.origin.items()}
    curves = _joined(known, steps)
    return Run(variant, found.seed, folder, found.settings, scores | measured, curves, cost, origin)


def by_settings(runs: Sequence[Run], names: Iterator[str]) -> list[Run]:
    """The runs, with equal variants for those that differ only in the seed.

    Args:
        runs: in any order. Two of the same settings and seed belong to different variants.
        names: of the variants, in the order in which they are found.
    """
    known: dict[tuple[tuple[str, ...], int], str] = {}
    found, times = [], dict[tuple[tuple[str, ...], int], int]()
    for run in runs:
        time = times[run.flags, run.seed] = times.get((run.flags, run.seed), 0) + 1
        if (run.flags, time) not in known:
            known[run.flags, time] = next(names)
        found.append(replace(run, variant=known[run.flags, time]))
    return found


# ---------------------------------------------------------------------- folders and settings


def _of_run(folder: Path) -> _Folders:
    state = _state(folder / RUN_FILE)
    stages, done = state["stages"], state["done"]
    if missing := [stage for stage in stages if stage not in done and not is_done(folder / stage)]:
        raise ValueError(f"{folder} has not ended: {', '.join(missing)} to go; lit-vlm run --resume --out {folder}")
    return _with_flags(folder, state, stages)


def _state(file: Path) -> dict[str, Any]:
    """What run.json says.

    Raises:
        ValueError: when it is not what `lit-vlm run` writes.
    """
    state = read_object(file, "it is written by lit-vlm run")
    if lacking := [key for key in ("recipe", "scale", "strategy", "stages", "flags", "done") if key not in state]:
        raise ValueError(f"{file} has no {lacking[0]!r}: it is written by lit-vlm run")
    return state


def _with_flags(folder: Path, state: Mapping[str, Any], stages: Sequence[str]) -> _Folders:
    seed, flags = _without_seed(state["flags"])
    scale = [f"--scale {state['scale']}"] if state["scale"] else []
    strategy = f"--strategy {state['strategy']}"  # which sets devices and precision as well
    settings = (state["recipe"], *scale, strategy, f"--stages {','.join(stages)}", *flags)
    return _Folders(_number(seed, folder), settings, tuple(folder / stage for stage in stages))


def _of_stage(folder: Path) -> _Folders:
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise ValueError(
            f"{folder} has no {RUN_FILE}, so it is not the folder of a `lit-vlm run`, and no {CONFIG_FILE}, so it is "
            "not that of a stage"
        )
    if not is_done(folder):
        raise ValueError(f"{folder} has not ended: it has no {DONE_FILE}; go on with the command that began it")
    above = folder.absolute().parent / RUN_FILE
    if above.is_file():
        state = _state(above)
        if folder.name in state["stages"]:
            whole = _with_flags(above.parent, state, state["stages"][: state["stages"].index(folder.name) + 1])
            return replace(whole, stages=(folder,))
    config = yaml.safe_load(file.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise ValueError(f"{file} holds no settings of a stage: the stage has to be trained anew")
    flat = dict(_flat(config, ""))
    settings = tuple(f"--{key} {shlex.quote(value)}" for key, value in flat.items() if not key.startswith(MINE))
    return _Folders(_number(str(config.get("seed_everything", DEFAULT_SEED)), folder), settings, (folder,))


def _flat(value: Any, prefix: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for key, entry in value.items():
            yield from _flat(entry, f"{prefix}.{key}" if prefix else str(key))
    elif value is not None:
        yield prefix, value if isinstance(value, str) else json.dumps(value)


def _without_seed(flags: Sequence[str]) -> tuple[str, list[str]]:
    """The seed, and the other flags with their values, by name; of one that comes again, the last value counts."""
    rest: list[str] = []
    seed, index = DEFAULT_SEED, 0
    while index < len(flags):
        name, _, value = flags[index].partition("=")
        index += 1
        if not value and index < len(flags) and not flags[index].startswith("--"):
            value = flags[index]
            index += 1
        if name == SEED_FLAG:
            seed = value
        else:
            rest.append(f"{name} {shlex.quote(value)}" if value else name)
    return seed, sorted(rest, key=lambda flag: flag.partition(" ")[0])


def _number(seed: str, folder: Path) -> int:
    if not seed.isdecimal():
        raise ValueError(f"{folder}: its {SEED_FLAG} is {seed!r}, and runs are paired by seeds that are numbers")
    return int(seed)


# ---------------------------------------------------------------------- curves and costs


def _steps(stage: Path) -> int:
    """Optimizer steps of a stage; 0 where nothing tells them."""
    if is_done(stage):
        return int(read_object(stage / DONE_FILE, "its stage has to be trained anew")["step"])
    return max((step_of(path) for path in checkpoints_in(stage)), default=0)


def _joined(known: Sequence[Tracked], steps: Sequence[int]) -> dict[str, list[tuple[int, float]]]:
    """The curves of all stages, one after the other."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for stage, before in zip(known, (sum(steps[:index]) for index in range(len(steps))), strict=True):
        for name, points in stage.curves.items():
            curves.setdefault(name, []).extend((before + step, value) for step, value in points)
    return curves


def _cost(stages: Sequence[Path], steps: Sequence[int], last: Tracked) -> Cost:
    written = [Progress.read(stage) for stage in stages]
    told = [one for one in written if one is not None]
    whole = len(told) == len(stages)
    peaks = [one.peak_bytes for one in told if one.peak_bytes is not None]
    rates = [value for _, value in last.curves.get(TOKENS, ())]
    tracked_peak = next((max(value for _, value in last.curves[name]) for name in PEAKS if name in last.curves), None)
    if tracked_peak is not None:
        peaks.append(round(tracked_peak * GIB))
    return Cost(
        seconds=math.fsum(one.seconds for one in told) if whole else math.nan,
        devices=max((one.devices for one in told), default=0),
        trained=written[-1].trained if written[-1] is not None else 0,
        steps=sum(steps),
        tokens_per_second=fmean(rates) if rates else written[-1].tokens_per_s if written[-1] is not None else None,
        peak_bytes=max(peaks, default=None),
        device_seconds=math.fsum(one.seconds * max(1, one.devices) for one in told) if whole else math.nan,
    )


def _measured(last: Tracked, cost: Cost) -> dict[str, Score]:
    """The last stage's final losses, speed and memory, as scores that may be asked for."""
    found: dict[str, Score] = {}
    for name, points in last.curves.items():
        if not name.startswith(LOSSES) or not points:
            continue
        kept = max(1, round(FINAL_SHARE * len(points))) if name.startswith("train/") else 1
        found[name] = Score(fmean(value for _, value in points[-kept:]), "lower", share=False)
    if cost.tokens_per_second is not None:
        found[TOKENS] = Score(cost.tokens_per_second, share=False)
    if cost.peak_bytes is not None:
        found["memory/peak_gib"] = Score(cost.peak_bytes / GIB, "lower", share=False)
    if not math.isnan(cost.seconds):
        found["cost/seconds"] = Score(cost.seconds, "lower", share=False)
    return found
