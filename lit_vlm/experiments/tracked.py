"""What MLflow keeps of a stage: curves, versions, fingerprints of its data."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_vlm.core.metric_names import ALLOCATED, HOST, RESERVED
from lit_vlm.training.mlflow_run import QUICK, RUN_FILE
from lit_vlm.training.mlflow_store import SQLITE, connect, first_line, read_lines, sqlite_file

TOKENS = "throughput/tokens_per_s"
PEAKS = (RESERVED, ALLOCATED, HOST)
"""Peaks of memory in GiB; the first that a stage has is taken."""
KEPT = ("train/loss", "val/", "task/", TOKENS, *PEAKS)
"""Beginnings of the names of metrics whose curves are read."""
ORIGIN = ("version.", "git.commit")
FINGERPRINTS = "data_fingerprints.json"
PROVENANCE = "data_provenance.json"
LARGEST = 1.7e308
QUIET = {"MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tracked:
    """What MLflow keeps of a stage.

    Attributes:
        curves: name of a metric → optimizer step of the stage, and value.
        origin: versions, commit and fingerprints of sources, by name.
        provenance: `train/NAME` or `val/NAME` of a source → its licence, origin and revision, where they are known.
    """

    curves: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)
    origin: Mapping[str, str] = field(default_factory=dict)
    provenance: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


def read_tracked(stage: Path, kept: tuple[str, ...] = KEPT) -> Tracked:
    """Read the MLflow run that the folder of a stage belongs to.

    Args:
        stage: the folder, with mlflow.json.
        kept: beginnings of the names of metrics whose curves are read.

    Returns:
        what there is; nothing, with a warning where there should be something, without the file or its store.
    """
    found = read_lines(stage / RUN_FILE)
    if not found or not found[0].get("run_id"):
        return Tracked()
    uri, run_id = found[0]["tracking_uri"], found[0]["run_id"]
    if uri.startswith(SQLITE) and not sqlite_file(uri).is_file():  # asking would make an empty one
        log.warning("%s: its MLflow store %s is gone; curves are left out", stage, uri)
        return Tracked()
    for variable, value in (QUICK | QUIET).items():
        os.environ.setdefault(variable, value)
    try:
        client = connect(uri)
        run = client.get_run(run_id)
        names = [name for name in run.data.metrics if name.startswith(kept)]
        curves = {name: _curve(client, run_id, name) for name in names}
        origin = {key: value for key, value in run.data.tags.items() if key.startswith(ORIGIN)}
    except Exception as error:  # whatever the store raises: a report can do without
        log.warning("%s: MLflow at %s does not tell its curves (%s)", stage, uri, first_line(error))
        return Tracked()
    prints = {f"data.{source}": str(value) for source, value in _artifact(client, run_id, FINGERPRINTS).items()}
    return Tracked(curves, origin | prints, _artifact(client, run_id, PROVENANCE))


def _curve(client: Any, run_id: str, name: str) -> list[tuple[int, float]]:
    """Values by step; of a step that was taken again after an interruption, the last one."""
    history = sorted(client.get_metric_history(run_id, name), key=lambda metric: metric.timestamp)
    return sorted({metric.step: _value(metric.value) for metric in history}.items())


def _value(stored: float) -> float:
    """A value as it was logged, as stores write the largest number in place of infinity."""
    return math.copysign(math.inf, stored) if abs(stored) >= LARGEST else stored


def _artifact(client: Any, run_id: str, name: str) -> dict[str, Any]:
    """What a JSON file of the run holds; nothing where it cannot be read."""
    from tempfile import TemporaryDirectory

    try:
        with TemporaryDirectory() as folder:
            file = client.download_artifacts(run_id, name, folder)
            found: dict[str, Any] = json.loads(Path(file).read_text(encoding="utf-8"))
    except Exception as error:  # artifacts are kept apart from the store, and may be gone
        log.info("no %s: %s", name, first_line(error))
        return {}
    return found
