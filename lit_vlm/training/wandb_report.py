"""Reports to Weights & Biases, by Lightning's own logger for it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import WandbLogger

from lit_vlm.core.written import write_report
from lit_vlm.training.reports import Report
from lit_vlm.training.run_tags import TOLD_APART, run_name, stage_name

RUN_FILE = "wandb.json"
"""File of a run's folder: the id of its W&B run."""
RECORD = "record"
"""Folder of texts among the files of a W&B run, as W&B keeps a config.yaml of its own beside it."""
VARIABLES = {
    "name": "WANDB_NAME",
    "group": "WANDB_RUN_GROUP",
    "job_type": "WANDB_JOB_TYPE",
    "id": "WANDB_RUN_ID",
    "resume": "WANDB_RESUME",
}
"""Arguments of `wandb.init` that the kit chooses, and the variables of W&B by which users choose otherwise."""


class WandbReport(Report):
    """Puts settings and tags into the config of a W&B run, texts among its files, tables and pictures beside metrics.

    Args:
        logger: Lightning's logger.
    """

    place = "W&B"
    lacks = "reports that wait for a server, a parent run, and the scores of `lit-vlm evaluate` and `probe`"

    def __init__(self, logger: WandbLogger) -> None:
        self.logger = logger

    def belongs_to(self, folder: Path, go_on: bool) -> None:
        """Name and group the W&B run, unless flags or variables of W&B do; go on with that of the folder."""
        chosen = {
            "name": stage_name(folder),
            "group": run_name(folder),
            "job_type": folder.name,
            "id": _known(folder) if go_on else None,
            "resume": "allow",
        }
        given = self.logger._wandb_init
        for key, value in chosen.items():
            if given.get(key) is None and VARIABLES[key] not in os.environ:
                given[key] = value

    def open(self, folder: Path) -> bool:
        """Open the W&B run, and keep its id in the folder."""
        known = _known(folder)
        run = self.logger.experiment
        text = json.dumps({"id": run.id, "project": self.logger.name})
        write_report(folder / RUN_FILE, lambda file: file.write_text(text, encoding="utf-8"))
        return known is not None and run.id == known

    def settings(self, values: Mapping[str, str]) -> None:
        """Put settings into the config, by which W&B filters and groups."""
        self.logger.experiment.config.update(dict(values), allow_val_change=True)

    def tags(self, values: Mapping[str, str]) -> None:
        """Put tags into the config, and variant and seed among W&B's own tags, which are words without a name."""
        run = self.logger.experiment
        run.config.update(dict(values), allow_val_change=True)
        words = (f"{key}:{values[key]}"[:64] for key in TOLD_APART if key in values)  # letters that W&B takes
        run.tags = tuple(dict.fromkeys((*(run.tags or ()), *words)))

    def text(self, text: str, file: str) -> None:
        """Put a text among the files of the run."""
        run = self.logger.experiment
        path = Path(run.dir) / RECORD / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        run.save(str(path), base_path=run.dir, policy="now")

    def table(self, name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Log a table."""
        columns = list(rows[0]) if rows else []
        self.logger.log_table(name, columns, [[row[column] for column in columns] for row in rows], step=step)

    def picture(self, file: Path, step: int) -> None:
        """Log a picture."""
        self.logger.log_image(file.name, [str(file)], step=step)

    def failed(self, reason: str) -> None:
        """Say why in the run's summary, if there is a run; W&B sees by itself that the process ends with an error."""
        if self.logger._experiment is not None:  # `experiment` would try once more to open one
            self.logger.experiment.summary["failure"] = reason

    def preempted(self, reason: str) -> None:
        """Mark the run as one that another process will go on with."""
        run = self.logger.experiment
        run.summary["preempted"] = reason
        run.mark_preempting()

    def finished(self) -> None:
        """Take back the failure of an earlier attempt."""
        summary = self.logger.experiment.summary
        if "failure" in summary.keys():  # noqa: SIM118 - which is no mapping
            del summary["failure"]


def _known(folder: Path) -> str | None:
    """The id of the W&B run that a folder belongs to; None where it tells none."""
    try:
        found = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return str(found["id"]) if isinstance(found, dict) and "id" in found else None
