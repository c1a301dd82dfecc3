"""An ablation in its folder: its runs as commands of `lit-vlm`, the stages that they share, and what is done."""

from __future__ import annotations

import argparse
import hashlib
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lit_vlm.checkpoints.folder import checkpoints_in, is_done, settle
from lit_vlm.commands.asked import Asked
from lit_vlm.commands.begin import state_of
from lit_vlm.commands.examined import Examined, examine
from lit_vlm.commands.named_runs import EVALUATION
from lit_vlm.commands.recipe import find_recipe
from lit_vlm.commands.run import stage_words
from lit_vlm.commands.runs import STATE_FILE, RunState
from lit_vlm.core.plugins import use_plugins
from lit_vlm.core.written import write_whole
from lit_vlm.experiments.asked import Evaluation, Probing
from lit_vlm.experiments.file import SEED, AblationFile, Variant, read_file
from lit_vlm.experiments.plan import STAGES, Node, Plan, RunKey, Wanted, make_plan
from lit_vlm.experiments.pool import Task

FILE = "ablation.yaml"
"""The ablation's file, in its folder."""
LOG = "log.txt"
"""What a stage printed, in its folder."""
MEASURED = ("held_out", "train", "val", "throughput", "memory", "cost")
"""What names of scores begin with that need no evaluation."""
CPU = ("--trainer.accelerator", "cpu")
"""Flags by which settings are read on a machine that does not train."""


@dataclass(frozen=True)
class Ablation:
    """An ablation that can run.

    Attributes:
        folder: its folder.
        file: what was asked for.
        states: name of a variant → what it runs, without a seed.
        plan: the stages.
        remarks: what will be missing when it has run.
    """

    folder: Path
    file: AblationFile
    states: Mapping[str, RunState]
    plan: Plan
    remarks: Sequence[str] = ()

    def state(self, run: RunKey) -> RunState:
        """What a run consists of, and which of its stages are done."""
        state = self.states[run.variant]
        flags = [*state.flags, f"--{SEED}", str(run.seed)]
        stages = self.plan.runs[run]
        done = [stage for stage in state.stages if is_done(self.stage(stages[stage]))]
        return RunState(
            state.recipe, state.scale, state.strategy, list(state.stages), flags, done, plugins=list(state.plugins)
        )

    def stage(self, node: str) -> Path:
        """The folder of a stage."""
        return self.folder / STAGES / node

    def words(self, node: Node) -> list[str]:
        """Arguments of `lit-vlm` that train a stage, from its newest checkpoint if there is one."""
        run, folder = node.runs[0], self.stage(node.id)
        state = self.state(run)
        start = self.stage(node.start) if node.start is not None else None
        words = stage_words(find_recipe(state.recipe), state, node.stage, folder, start)
        settle(folder / "checkpoints")
        found = checkpoints_in(folder)
        return [*words, *(["--ckpt_path", str(found[-1])] if found else [])]

    def earlier(self) -> Iterator[Path]:
        """Folders of stages of other runs, beside this ablation, of a recipe and scale that it has as well."""
        known = {(state.recipe, state.scale) for state in self.states.values()}
        for file in self.folder.parent.glob(f"*/{STATE_FILE}"):
            try:
                state = RunState.load(file.parent)
            except (OSError, ValueError, TypeError):  # broken, or of another version
                continue
            if (state.recipe, state.scale) in known:
                yield from (file.parent / stage for stage in state.done)

    def save(self, parent: str | None = None) -> None:
        """Write the file, the plan, and a folder for each run, with links to its stages.

        Args:
            parent: the MLflow run that the stages are children of.
        """
        content = self.file.model_dump(mode="json", exclude_unset=True)
        write_whole(self.folder / FILE, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
        self.plan.save(self.folder)
        for run, stages in self.plan.runs.items():
            folder = self.folder / run.folder
            state = self.state(run)
            state.parent_run = parent
            state.save(folder)
            for stage, node in stages.items():
                self.stage(node).mkdir(parents=True, exist_ok=True)
                _link(folder / stage, self.stage(node))

    def tasks(
        self, seeds: Sequence[int], environment: Callable[[Node], Mapping[str, str]], only: Sequence[str] = ()
    ) -> list[Task]:
        """What is to be done for some seeds: stages, and behind the last one of each run its evaluations.

        Args:
            seeds: the seeds.
            environment: variables of the processes of a stage.
            only: names of variants; default: all.
        """
        asked = [run for run in self.plan.runs if run.seed in seeds and (not only or run.variant in only)]
        wanted = {node for run in asked for node in self.plan.runs[run].values()}
        last = {self.plan.last(run).id for run in asked}
        tasks = []
        for node in self.plan.nodes.values():
            if node.id in wanted:
                tasks.append(self._training(node, environment(node)))
                if node.id in last:
                    tasks += [self._evaluation(node, one, environment(node)) for one in self.file.evaluate]
                    tasks += [self._probing(node, one, environment(node)) for one in self.file.probe]
        return tasks

    def _training(self, node: Node, environment: Mapping[str, str]) -> Task:
        folder = self.stage(node.id)
        return Task(
            node.id,
            lambda: self.words(node),
            folder / LOG,
            lambda: is_done(folder),
            (node.start,) if node.start is not None else (),
            node.devices,
            environment,
        )

    def _evaluation(self, node: Node, one: Evaluation, environment: Mapping[str, str]) -> Task:
        folder, words = self.stage(node.id), one.words()
        own = one.file.read_bytes() if one.file is not None and one.file.is_file() else b""
        key = _digest(words, own)
        # A file asks a task once with each number of demonstrations.
        name = f"{one.name.rpartition('.')[2]}-{'_'.join(map(str, one.shots))}-shot"
        mark = folder / EVALUATION / f"{name}-{key}.done"
        return _asking(node, f"{one.name} {key}", ["evaluate", str(folder), *words], mark, environment)

    def _probing(self, node: Node, one: Probing, environment: Mapping[str, str]) -> Task:
        words = one.words(self.stage(node.id))
        mark = self.stage(node.id) / one.folder / f"probe-{_digest(words)}.done"
        return _asking(node, f"probe {one.target}", ["probe", *words], mark, environment)


def _asking(node: Node, name: str, words: list[str], mark: Path, environment: Mapping[str, str]) -> Task:
    """A task on a stage that has been trained, which leaves a mark of its own when it has ended well.

    Results are kept by name, so the marks of what was asked before under that name, in another way, are removed.
    """

    def note() -> None:
        for other in mark.parent.glob(f"{mark.stem.rpartition('-')[0]}-*.done"):
            other.unlink()
        mark.touch()

    name, log = f"{node.id} {name}", mark.with_suffix(".txt")
    return Task(name, lambda: words, log, mark.is_file, (node.id,), 1, environment, note)


def _digest(words: Sequence[str], content: bytes = b"") -> str:
    """Stands for what is asked, so that something else is asked anew."""
    return hashlib.sha256(" ".join(words).encode() + content).hexdigest()[:8]


def opened(folder: Path) -> Ablation:
    """The ablation that a folder holds, as it ran last.

    Raises:
        ValueError: where the folder is not that of an ablation.
    """
    plan, file = Plan.load(folder), read_file(folder / FILE)
    first: dict[str, RunKey] = {}
    for run in plan.runs:
        first.setdefault(run.variant, run)
    return Ablation(folder, file, {name: RunState.load(folder / run.folder) for name, run in first.items()}, plan)


def make(file: AblationFile, folder: Path, here: bool = True, data: bool = True) -> Ablation:
    """Resolve the settings of all runs, and find the stages that they share.

    Args:
        file: the ablation.
        folder: its folder.
        here: whether it runs on this machine; else no GPU of it is asked for.
        data: whether the data is there; without, stages are told apart by their settings alone.

    Raises:
        ValueError: for an unknown recipe, stage or scale, or a folder that holds something else.
        SystemExit: for a wrong flag or missing data, which has been reported in one line.
    """
    _refuse_other(file, folder)
    states = {variant.name: _state(variant) for variant in file.all_variants()}
    commands, places = [], []
    for name, state in states.items():
        use_plugins(state.plugins)
        recipe = find_recipe(state.recipe)
        for stage in state.stages:
            words = stage_words(recipe, state, stage, folder / STAGES / stage, None)
            commands.append([*words, *(() if here else CPU)])
            places.append((name, stage))
    found = dict(zip(places, examine(commands, data), strict=True))
    plan = make_plan(
        _wanted(RunKey(name, seed), state, stage, found[name, stage])
        for seed in file.seeds
        for name, state in states.items()
        for stage in state.stages
    )
    last = {name: found[name, state.stages[-1]].settings for name, state in states.items()}
    return Ablation(folder, file, states, plan, unscored(file, last))


def unscored(file: AblationFile, last: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Lines on claims whose score the last stage of a variant will not have, as far as the beginning of its name tells.

    Args:
        file: the ablation.
        last: name of a variant → settings of its last stage.
    """
    lines = []
    asked = {one.name for one in file.evaluate}
    named_by_class = any("." in name for name in asked)  # whose scores have a name that only the class knows
    probed = [one.target for one in file.probe]
    for claim in file.claims:
        first, _, rest = claim.score.partition("/")
        if first == "probe":
            if (target := rest.partition("/")[0]) not in probed:
                lines.append(f"{claim.text!r} wants {claim.score}: add 'probe: [{{target: {target}}}]' to the file")
            continue
        for variant in dict.fromkeys((claim.better, claim.worse)):
            callbacks = [one["class_path"].rpartition(".")[2] for one in last[variant]["trainer"]["callbacks"] or ()]
            if first == "held_out" and "HeldOut" not in callbacks:
                lines.append(
                    f"{claim.text!r} wants {claim.score}, and the last stage of {variant} has no callbacks.HeldOut: "
                    "add trainer.callbacks+: callbacks.HeldOut to the flags, or name another score"
                )
            elif first == "held_out" and (there := _sources_but(rest, last[variant])):
                lines.append(
                    f"{claim.text!r} wants {claim.score}, and the last stage of {variant} holds out {there}: "
                    f"name one of these, or held_out/{rest.rpartition('/')[2]} for all"
                )
            elif first not in (*MEASURED, *asked) and "Evaluate" not in callbacks and not named_by_class:
                lines.append(
                    f"{claim.text!r} wants {claim.score}, which nothing asks for: name the task under evaluate"
                )
    return lines


def _sources_but(score: str, settings: Mapping[str, Any]) -> str:
    """Names of a stage's held-out sources if a score such as `SOURCE/accuracy` names none of them; else nothing."""
    source, _, _ = score.rpartition("/")
    val, split = settings["data"].get("val"), settings["data"].get("held_out")
    if source in ("", "shuffled") or split or not isinstance(val, Mapping) or "class_path" in val:
        return ""  # sources without names of their own are named by their data
    names = [name for name, one in val.items() if one is not None]
    return "" if source in names else ", ".join(names) or "none"


def _refuse_other(file: AblationFile, folder: Path) -> None:
    """Refuse the folder of a run, or of an ablation of something else.

    Raises:
        ValueError: naming both.
    """
    if (folder / STATE_FILE).is_file():
        raise ValueError(f"{folder} is the folder of a run: choose another --out")
    if (folder / FILE).is_file():
        there = read_file(folder / FILE)
        if (there.recipe, there.about) != (file.recipe, file.about):
            other = there.about or f"an ablation of {there.recipe}"
            raise ValueError(f"{folder} holds another ablation ({other}): choose another --out")


def _state(variant: Variant) -> RunState:
    """What `lit-vlm run` makes of a variant.

    Raises:
        ValueError: as `state_of`, with the variant's name.
    """
    stages = ",".join(variant.stages) if variant.stages is not None else None
    options = argparse.Namespace(scale=variant.scale, strategy=variant.strategy, stages=stages)
    try:
        return state_of(Asked(variant.recipe, options, list(variant.flags)))
    except ValueError as error:
        raise ValueError(f"variant {variant.name}: {error}") from error


def _wanted(run: RunKey, state: RunState, stage: str, found: Examined) -> Wanted:
    start = find_recipe(state.recipe).start_of(stage, state.stages)
    settings: dict[str, Any] = {**found.settings, SEED: run.seed}
    devices = found.devices if found.on_gpus else 1
    return Wanted(run, stage, start, settings, found.fingerprints, devices)


def _link(link: Path, target: Path) -> None:
    """Let a name in the folder of a run stand for a stage; a link to another one is replaced.

    Raises:
        ValueError: where a folder has the name.
    """
    if link.is_dir() and not link.is_symlink():
        raise ValueError(f"{link} is a folder, and no link to a stage of the ablation: move it away")
    scratch = link.with_name(f".{link.name}-{uuid.uuid4().hex}")
    scratch.symlink_to(os.path.relpath(target, link.parent), target_is_directory=True)
    scratch.replace(link)
