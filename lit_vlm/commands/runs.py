"""Folders of runs: where a run goes, what `lit-vlm run` keeps in run.json, and which process writes it."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lit_vlm.core.launcher import launch, launch_name
from lit_vlm.core.written import write_whole

RUN_FOLDER = "LIT_VLM_RUN_FOLDER"
"""Environment variable: the folder that the first process of a stage chose, for those that it starts."""
STATE_FILE = "run.json"


@dataclass
class RunState:
    """The state of a run, kept in run.json of its folder, so that `--resume` needs no other argument.

    Attributes:
        recipe: folder or name of the recipe, as it was given.
        scale: the scale, or None.
        strategy: the strategy.
        stages: the stages to run, in order.
        flags: flags that are passed on to every stage.
        done: stages that have ended.
        parent_run: the MLflow run that the stages are children of.
        plugins: modules whose classes flags may name by bare names.
    """

    recipe: str
    scale: str | None
    strategy: str
    stages: list[str]
    flags: list[str]
    done: list[str] = field(default_factory=list)
    parent_run: str | None = None
    plugins: list[str] = field(default_factory=list)

    def save(self, folder: Path) -> None:
        """Write run.json, whole or not at all; of several processes of a launcher, only the first does."""
        if not launch().is_first:
            return
        write_whole(folder / STATE_FILE, json.dumps(asdict(self), indent=2))

    @staticmethod
    def load(folder: Path) -> RunState:
        """Read run.json of a folder.

        Raises:
            ValueError: when the folder is not that of a run.
        """
        file = folder / STATE_FILE
        if not file.is_file():
            raise ValueError(f"{folder} has no {STATE_FILE}, so it is not the folder of a `lit-vlm run`")
        return RunState(**json.loads(file.read_text()))


def run_name(recipe: str, scale: str | None) -> str:
    """The name of a run's folder: recipe, scale, and the launch, or where nobody launched it the time."""
    return "-".join(filter(None, (recipe, scale, launch_name())))


def run_folder_for(stage: str) -> str:
    """A new folder for a run that was given none; the same in all processes of the run."""
    if RUN_FOLDER not in os.environ:
        os.environ[RUN_FOLDER] = str(Path("runs") / f"{stage}-{launch_name()}")
    return os.environ[RUN_FOLDER]
