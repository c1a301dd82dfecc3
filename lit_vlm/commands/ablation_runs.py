"""What the runs of an ablation have found, as a study, and its record in MLflow."""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from lit_vlm.checkpoints.folder import is_done
from lit_vlm.checkpoints.progress import Progress
from lit_vlm.cluster.status import length
from lit_vlm.commands.ablation import Ablation
from lit_vlm.commands.recipe import find_recipe
from lit_vlm.commands.run import uses_mlflow
from lit_vlm.experiments.file import BASE
from lit_vlm.experiments.live import known_seconds
from lit_vlm.experiments.plan import Node, RunKey
from lit_vlm.experiments.report import SPENT, Study, log_report, tested, write_report
from lit_vlm.experiments.results import Claim, Run
from lit_vlm.experiments.scores import read_run
from lit_vlm.experiments.statistics import Tested, judge_looks, planned_looks
from lit_vlm.training.mlflow_run import PARENT_RUN, MLflowRun, known_run
from lit_vlm.training.mlflow_store import default_uri
from lit_vlm.training.run_tags import RUN, for_children

EXPERIMENT = "lit-vlm"

log = logging.getLogger(__name__)


class Tracked:
    """The MLflow run that all stages of an ablation are children of; none where its flags name another logger.

    As a context it reports how the ablation has ended where nothing else has: an error, or a request to leave.

    Args:
        ablation: the ablation.
    """

    def __init__(self, ablation: Ablation) -> None:
        self._ablation, self._ended = ablation, False
        self.run: MLflowRun | None = None
        if not all(uses_mlflow(state.flags) for state in ablation.states.values()):
            return
        folder, file = ablation.folder, ablation.file
        tags = {"ablation": folder.name, "system": Path(file.recipe).name, "folder": str(folder), RUN: folder.name}
        known = known_run(folder, os.environ.get("MLFLOW_TRACKING_URI"))
        self.run = known or MLflowRun(default_uri(), EXPERIMENT, folder.name, tags, folder)
        self.run.owns_folder()
        self.run.going_on()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or self._ended:
            return
        if isinstance(error, SystemExit | KeyboardInterrupt):
            self.preempted("left while no stage ran")
        else:
            self.end("FAILED")

    @property
    def run_id(self) -> str | None:
        """Its id; None where there is none, or the store does not answer."""
        return self.run.run_id if self.run is not None else None

    def environment(self, node: Node) -> dict[str, str]:
        """Variables of the process that trains a stage: its tags, and that it is a child of this run."""
        run = node.runs[0]
        state = self._ablation.states[run.variant]
        variants = list(dict.fromkeys(one.variant for one in node.runs))
        more = f"+{len(variants) - 1}" if variants[1:] else ""
        tags = {
            "system": find_recipe(state.recipe).name,
            "scale": state.scale,
            "strategy": state.strategy,
            RUN: f"{self._ablation.folder.name}/{run.variant}{more}/seed-{run.seed}",
            "ablation": self._ablation.folder.name,
            "variant": ",".join(variants),
            "seed": str(run.seed),
            "flags": shlex.join(state.flags),
        }
        variables = for_children({key: value for key, value in tags.items() if value})
        if self.run is not None and self.run.run_id is not None:
            variables |= {PARENT_RUN: self.run.run_id, "MLFLOW_TRACKING_URI": self.run.uri}
        return variables

    def end(self, status: str) -> None:
        """Report the last status."""
        self._ended = True
        if self.run is not None:
            self.run.end(status)

    def preempted(self, reason: str) -> None:
        """Report that the ablation leaves in order and can go on."""
        self._ended = True
        if self.run is not None:
            self.run.preempted(reason)


def finished(ablation: Ablation, seeds: Sequence[int]) -> list[RunKey]:
    """The runs whose stages are all done, variant by variant."""
    done = {node: is_done(ablation.stage(node)) for node in ablation.plan.nodes}
    runs = [
        run for run, stages in ablation.plan.runs.items() if run.seed in seeds and all(map(done.get, stages.values()))
    ]
    order = list(ablation.states)
    return sorted(runs, key=lambda run: (order.index(run.variant), run.seed))


def runs_of(ablation: Ablation, seeds: Sequence[int]) -> list[Run]:
    """The finished runs that can be read, variant by variant; of any other, the reason is warned of.

    Args:
        ablation: the ablation.
        seeds: the seeds that count.

    Raises:
        ValueError: where runs have finished, and none of them can be read.
    """
    runs, reason = [], ""
    for run in finished(ablation, seeds):
        try:
            runs.append(read_run(ablation.folder / run.folder, run.variant))
        except ValueError as error:
            reason = str(error)
            log.warning("left out of the report: %s", error)
    if reason and not runs:
        raise ValueError(f"no finished run can be read, the last one because {reason}")
    return runs


def study_of(ablation: Ablation, runs: Sequence[Run], command: str) -> Study | None:
    """What finished runs show; None without any.

    Where seeds are added one by one, verdicts allow for that, and seeds behind the one that decided do not count.

    Args:
        ablation: the ablation.
        runs: its finished runs.
        command: the command that makes it again.
    """
    if not runs:
        return None
    file = ablation.file
    source = file.source or None
    claims = [Claim(one.text, one.better, one.worse, one.score, source) for one in file.claims]
    names = {run.variant for run in runs}
    base = BASE if BASE in names else runs[0].variant
    about = {**_about(ablation), **({} if file.sequential else _missing(ablation, runs))}
    if BASE in ablation.states and base != BASE:
        about["compared with"] = f"{base}, as no run of {BASE} has finished"
    study = Study(file.about or ablation.folder.name, base, runs, claims, (), command, about)
    return _looked(ablation, study) if file.sequential else study


def _looked(ablation: Ablation, study: Study) -> Study:
    """The study of the seeds of the latest complete look, with its verdicts; without any look, all claims are open.

    A look is complete when all its runs have finished and have what every claim is judged by.
    """
    seeds = ablation.file.seeds
    looks = planned_looks(seeds)
    rounds: list[list[Tested]] = []
    latest, lacks = study, ""
    for count in looks.seeds:
        runs = [run for run in study.runs if run.seed in seeds[:count]]
        if missing := count * len(ablation.states) - len(runs):
            lacks = f"of the look at {count} seeds {missing} runs have not finished"
            break
        then = replace(study, runs=runs)
        try:
            rounds.append(tested(then))
        except ValueError as error:
            lacks = f"the look at {count} seeds cannot be judged: {error}"
            break
        latest = replace(then, judged=judge_looks(looks, rounds))
        if is_decided(latest):
            break
    if not rounds:
        return replace(study, open=lacks)
    judged = f"{looks.seeds[len(rounds) - 1]} seeds of {len(seeds)}{f', as {lacks}' if lacks else ''}"
    return replace(latest, about={**latest.about, "judged at": judged})


def is_decided(study: Study) -> bool:
    """Whether every claim is shown or contradicted."""
    return study.judged is not None and all(one.verdict in ("shown", "contradicted") for one in study.judged)


def report(ablation: Ablation, study: Study, tracked: Tracked) -> list[Path]:
    """Write the report into the folder of the ablation, and log it; returns the files."""
    files = write_report(study, ablation.folder)
    if tracked.run is not None:
        log_report(tracked.run, study, files)
    return files


def _missing(ablation: Ablation, runs: Sequence[Run]) -> dict[str, str]:
    """The runs that the report is without; nothing where it has all."""
    there = {(run.variant, run.seed) for run in runs}
    names = [f"{run.variant} seed {run.seed}" for run in ablation.plan.runs if tuple(run) not in there]
    return {"without": ", ".join(names)} if names else {}


def _about(ablation: Ablation) -> Mapping[str, str]:
    plan = ablation.plan
    shared = plan.wanted - len(plan.nodes)
    about = {
        "stages": f"{plan.wanted} in {len(plan.runs)} runs, of which {len(plan.nodes)} trained and {shared} shared"
    }
    told = [Progress.read(ablation.stage(node)) for node in plan.nodes]
    spent = sum(one.seconds * max(1, one.devices) for one in told if one is not None)
    about[SPENT] = length(spent)
    seconds = known_seconds(plan, {node: ablation.stage(node) for node in plan.nodes})
    if all(node.stage in seconds for node in plan.nodes.values()):
        wanted = sum(seconds[stage] for stages in plan.runs.values() for stage in stages)
        trained = sum(seconds[node.stage] for node in plan.nodes.values())
        about["saved by sharing"] = f"{length(wanted - trained)} of {length(wanted)}"
    return about
