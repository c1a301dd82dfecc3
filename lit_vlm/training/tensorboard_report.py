"""Reports to TensorBoard, by Lightning's own logger for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image

from lit_vlm.training.reports import Report
from lit_vlm.training.run_tags import stage_name

OWN_FOLDER = "tensorboard"
"""Folder of event files in a run's own folder, where `save_dir` is that."""


class TensorBoardReport(Report):
    """Puts settings among hyperparameters, tags, texts and tables among texts, pictures among images.

    Args:
        logger: Lightning's logger.
    """

    place = "TensorBoard"
    lacks = (
        "tags to filter by, the run's status, a parent run, reports that wait for a server, and the scores of "
        "`lit-vlm evaluate` and `probe`"
    )

    def __init__(self, logger: TensorBoardLogger) -> None:
        self.logger = logger

    def belongs_to(self, folder: Path, go_on: bool) -> None:
        """Name the folder of event files as the run, unless flags name it; an attempt that goes on adds to it."""
        given = self.logger._version
        if self.logger.name != "lightning_logs" or (given is not None and given != SLURMEnvironment.job_id()):
            return
        inside = Path(self.logger.save_dir).absolute() == folder.absolute()
        self.logger._name, self.logger._version = "", OWN_FOLDER if inside else stage_name(folder)

    def open(self, folder: Path) -> bool:
        """Begin a file of events."""
        return False

    def settings(self, values: Mapping[str, str]) -> None:
        """Put settings among the hyperparameters, by which TensorBoard filters."""
        self.logger.log_hyperparams(dict(values))

    def tags(self, values: Mapping[str, str]) -> None:
        """Put tags into a table."""
        self._write("tags", _table([{"tag": key, "value": value} for key, value in sorted(values.items())]), 0)

    def text(self, text: str, file: str) -> None:
        """Put a text among the texts, indented, which TensorBoard shows as it is."""
        self._write(file, "".join(f"    {line}\n" for line in text.splitlines()), 0)

    def table(self, name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Put a table among the texts."""
        self._write(name, _table(rows), step)

    def picture(self, file: Path, step: int) -> None:
        """Put a picture among the images."""
        with Image.open(file) as image:
            pixels = np.asarray(image.convert("RGB"))
        self.logger.experiment.add_image(file.name, pixels, step, dataformats="HWC")

    def failed(self, reason: str) -> None:
        """Say why among the texts."""
        self._write("end", f"FAILED: {reason}", 0)

    def preempted(self, reason: str) -> None:
        """Say why among the texts."""
        self._write("end", f"PREEMPTED: {reason}", 0)

    def finished(self) -> None:
        """Say so among the texts, where it follows the failure of an earlier attempt."""
        self._write("end", "FINISHED", 0)

    def _write(self, name: str, text: str, step: int) -> None:
        self.logger.experiment.add_text(name, text, step)
        self.logger.experiment.flush()


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table in Markdown, as TensorBoard draws it."""
    if not rows:
        return ""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([row[key] for key in rows[0]] for row in rows)]
    return "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)


def _cell(value: Any) -> str:
    text = "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    return " ".join(text.replace("|", r"\|").split())
