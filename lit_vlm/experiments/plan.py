"""The stages of an ablation: equal ones train once, as a stage is a function of its settings and those before it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import lit_vlm
from lit_vlm.core.written import write_whole

PLAN_FILE, STAGES, RUNS = "plan.json", "stages", "runs"
"""File and folders of an ablation: the plan, the stages that are trained, and the runs, which link to them."""
NO_EFFECT = {
    "trainer": (
        "accelerator",  # `auto` is another one on another machine
        "default_root_dir",
        "logger",
        "enable_progress_bar",
        "enable_model_summary",
        "log_every_n_steps",
        "profiler",
    ),
    "preemption": None,
    "watchdog": None,
}
"""Settings on which no weight and no score depends but by rounding: groups, and keys of a group."""


class RunKey(NamedTuple):
    """A run of an ablation."""

    variant: str
    seed: int

    @property
    def folder(self) -> Path:
        """Its folder in that of the ablation."""
        return Path(RUNS) / self.variant / f"seed-{self.seed}"


@dataclass(frozen=True)
class Wanted:
    """A stage of a run, as the run wants it.

    Attributes:
        run: the run.
        stage: name of the stage.
        start: the stage of the run whose weights it starts from.
        settings: all its settings, the seed among them.
        fingerprints: source → hash of its content.
        devices: devices that it trains on.
    """

    run: RunKey
    stage: str
    start: str | None
    settings: Mapping[str, Any]
    fingerprints: Mapping[str, str]
    devices: int = 1


@dataclass(frozen=True)
class Node:
    """A stage that is trained once, for one run or several.

    Attributes:
        id: name of its folder among the stages of the ablation.
        stage: name of the stage.
        start: the node whose weights it starts from.
        devices: devices that it trains on.
        runs: the runs that have it; the first one's command trains it.
    """

    id: str
    stage: str
    start: str | None
    devices: int
    runs: tuple[RunKey, ...]


@dataclass(frozen=True)
class Plan:
    """What is trained, and which run has which stage.

    Attributes:
        nodes: id → node, in an order in which each comes behind the one that it starts from.
        runs: run → stage → id of its node, in the order of stages.
    """

    nodes: dict[str, Node] = field(default_factory=dict)
    runs: dict[RunKey, dict[str, str]] = field(default_factory=dict)

    @property
    def wanted(self) -> int:
        """Stages of all runs; fewer are trained where runs share some."""
        return sum(map(len, self.runs.values()))

    def last(self, run: RunKey) -> Node:
        """The last stage of a run."""
        return self.nodes[list(self.runs[run].values())[-1]]

    def save(self, folder: Path) -> None:
        """Write the plan into the folder of the ablation."""
        nodes = [asdict(node) for node in self.nodes.values()]
        runs = [{"variant": run.variant, "seed": run.seed, "stages": stages} for run, stages in self.runs.items()]
        write_whole(folder / PLAN_FILE, json.dumps({"nodes": nodes, "runs": runs}, indent=1))

    @staticmethod
    def load(folder: Path) -> Plan:
        """Read the plan of an ablation.

        Raises:
            ValueError: when the folder has none.
        """
        file = folder / PLAN_FILE
        if not file.is_file():
            raise ValueError(f"{folder} has no {PLAN_FILE}, so it is not the folder of an ablation")
        content = json.loads(file.read_text(encoding="utf-8"))
        nodes = [Node(**node | {"runs": tuple(RunKey(*run) for run in node["runs"])}) for node in content["nodes"]]
        runs = {RunKey(run["variant"], run["seed"]): run["stages"] for run in content["runs"]}
        return Plan({node.id: node for node in nodes}, runs)


def make_plan(wanted: Iterable[Wanted]) -> Plan:
    """Find equal stages; the runs come in the order in which they were asked for.

    Args:
        wanted: the stages of all runs, each behind the one that it starts from.
    """
    plan = Plan()
    for one in wanted:
        stages = plan.runs.setdefault(one.run, {})
        start = stages[one.start] if one.start is not None else None
        name = f"{one.stage}-{identity(one.settings, one.fingerprints, start)}"
        known = plan.nodes.get(name)
        runs = (*known.runs, one.run) if known is not None else (one.run,)
        plan.nodes[name] = Node(name, one.stage, start, one.devices, runs)
        stages[one.stage] = name
    return plan


def identity(settings: Mapping[str, Any], fingerprints: Mapping[str, str], start: str | None) -> str:
    """A hash that equal stages have in common: of settings, data, the kit's version, and what came before.

    Args:
        settings: all settings of the stage.
        fingerprints: source → hash of its content.
        start: the identity of the stage whose weights it starts from.
    """
    content = [_effective(settings, start is not None), dict(sorted(fingerprints.items())), start, lit_vlm.__version__]
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _effective(settings: Mapping[str, Any], starts: bool) -> dict[str, Any]:
    """The settings on which the outcome depends."""
    kept: dict[str, Any] = {}
    for key, value in settings.items():
        left_out = NO_EFFECT.get(key, ())
        if left_out is not None:
            kept[key] = _without(value, left_out) if isinstance(value, Mapping) else value
    if starts and isinstance(stage := kept.get("model", {}).get("stage"), Mapping):
        kept["model"] = {**kept["model"], "stage": _without(stage, ("start_from",))}
    return kept


def _without(settings: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in names}
