"""MLflow: one run per stage, with config, versions, data and metrics, by which it can be understood later."""

from __future__ import annotations

import json
import os
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from lit_vlm.training.mlflow_run import PARENT_RUN, MLflowRun, known_run
from lit_vlm.training.mlflow_store import FAILURE, default_uri
from lit_vlm.training.reports import Report
from lit_vlm.training.run_tags import given_tags, stage_name


class MLflow(Logger, Report):
    """Logger that keeps metrics, parameters and files of a run in MLflow; training goes on if the store fails.

    Args:
        tracking_uri: where runs are kept; default: `MLFLOW_TRACKING_URI`, or sqlite:///mlflow.db.
        experiment_name: name of the experiment.
        run_name: name of the run; default: that of the folder, after the name of the run that the stage belongs to.
        tags: tags of the run, besides those that the kit sets and those of `LIT_VLM_RUN_TAGS`.

    Attributes:
        run: the MLflow run that rank 0 reports to.

    Raises:
        ValueError: for tags in `LIT_VLM_RUN_TAGS` that cannot be read.
    """

    place = "MLflow"

    def __init__(
        self,
        tracking_uri: str | None = None,
        experiment_name: str = "lit-vlm",
        run_name: str | None = None,
        tags: dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        parent = os.environ.get(PARENT_RUN)
        self._given = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        self._experiment, self._name = experiment_name, run_name
        self._tags = given_tags() | (tags or {}) | ({"mlflow.parentRunId": parent} if parent else {})
        self.run = MLflowRun(default_uri(tracking_uri), experiment_name, run_name, self._tags)
        self._left = False

    @property
    def name(self) -> str:
        """The name of the experiment."""
        return self._experiment

    @property
    def version(self) -> str | None:
        """The run's id; None until it is open."""
        return self.run.run_id

    # ------------------------------------------------------------------ as a logger of Lightning

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Report metrics of one step."""
        self.run.metrics(metrics, step or 0)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Report parameters."""
        self.run.params(vars(params) if isinstance(params, Namespace) else params)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Set the status of the run."""
        if not self._left:
            self.run.end("FAILED" if status == "failed" else "FINISHED")

    # ------------------------------------------------------------------ as a place to report to

    def belongs_to(self, folder: Path, go_on: bool) -> None:
        """Name the run, or go on with the one that the folder belongs to, unless another store was named."""
        known = known_run(folder, self._given) if go_on else None
        name = self._name or stage_name(folder)
        self.run = known or MLflowRun(self.run.uri, self._experiment, name, self._tags, folder)

    def open(self, folder: Path) -> bool:
        """Open the run, and keep its id in the folder that it belongs to."""
        self.run.open()
        self.run.owns_folder()
        if self.run.resumed:
            self.run.going_on()
        return self.run.resumed

    def settings(self, values: Mapping[str, str]) -> None:
        """Report parameters."""
        self.run.params(values)

    def tags(self, values: Mapping[str, str]) -> None:
        """Report tags."""
        for key, value in values.items():
            self.run.tag(key, value)

    def text(self, text: str, file: str) -> None:
        """Keep a text among the run's artifacts."""
        self.run.text(text, file)

    def table(self, name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Keep a table among the run's artifacts, as a list of rows in NAME.json."""
        self.run.text(json.dumps([dict(row) for row in rows], indent=2, ensure_ascii=False), f"{name}.json")

    def picture(self, file: Path, step: int) -> None:
        """Keep a picture among the run's artifacts."""
        self.run.file(file)

    def failed(self, reason: str) -> None:
        """Keep the reason in a tag; Lightning sets the status itself."""
        self.run.tag(FAILURE, reason)

    @rank_zero_only
    def preempted(self, reason: str) -> None:
        """Set the status of a run that leaves and can go on."""
        self._left = True
        self.run.preempted(reason)

    def finished(self) -> None:
        """Do nothing, as `finalize` says so."""
