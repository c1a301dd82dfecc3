"""MLflow: one run per stage, with everything needed to know afterwards what it was."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table

from lit_vlm.data import VLMData
from lit_vlm.module import LitVLM
from lit_vlm.stage import SlotCount

DEFAULT_URI = "sqlite:///mlflow.db"
PARENT_RUN = "LIT_VLM_PARENT_RUN"
"""Environment variable: the MLflow run that `lit-vlm run` opened for all stages."""
RUN_FILE = "mlflow.json"
PACKAGES = ("lit-vlm", "torch", "lightning", "transformers", "timm", "peft", "mlflow")


def default_uri(uri: str | None = None) -> str:
    """The given URI, or `MLFLOW_TRACKING_URI`, or mlflow.db in the current folder."""
    return uri or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_URI


def metric_name(text: str) -> str:
    """A name that MLflow takes: what it refuses becomes an underscore."""
    return "".join(letter if letter.isalnum() or letter in "_-./ " else "_" for letter in text)


class MLflow(MLFlowLogger):
    """Lightning's MLflow logger with a database as its default store, and resume.

    Args:
        tracking_uri: where runs are kept; default: `MLFLOW_TRACKING_URI`, or sqlite:///mlflow.db.
        experiment_name: the experiment.
        run_name: name of the run; default: the stage.
        tags: more tags.
    """

    def __init__(
        self,
        tracking_uri: str | None = None,
        experiment_name: str = "lit-vlm",
        run_name: str | None = None,
        tags: dict[str, str] | None = None,
    ) -> None:
        parent = os.environ.get(PARENT_RUN)
        super().__init__(
            experiment_name=experiment_name,
            run_name=run_name,
            tracking_uri=default_uri(tracking_uri),
            tags=(tags or {}) | ({"mlflow.parentRunId": parent} if parent else {}),
        )
        self.resumed = False

    def belongs_to(self, folder: Path, run_name: str) -> None:
        """Go on with the MLflow run of this folder if it has one; otherwise name the new run after the stage.

        Called before anything asks for the run: Lightning opens it as soon as training is set up.
        """
        file = folder / RUN_FILE
        known = json.loads(file.read_text()) if file.exists() else {}
        self.resumed = known.get("tracking_uri") == self._tracking_uri
        if self.resumed:
            self._run_id = known["run_id"]
        self._run_name = self._run_name or run_name

    def note(self, folder: Path) -> None:
        """Mark the run as going on, and remember it in the folder."""
        run_id = self.run_id
        if self.resumed:
            self.experiment.update_run(run_id, status="RUNNING")
        (folder / RUN_FILE).write_text(json.dumps({"tracking_uri": self._tracking_uri, "run_id": run_id}))


class RunRecord(SaveConfigCallback):
    """Keeps what a run was: the resolved config, environment, data and freeze table, in its folder and in MLflow."""

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Before anything is built: the config, and the tags by which runs are told apart. Rank 0 only."""
        assert isinstance(pl_module, LitVLM)
        text = self.parser.dump(self.config, skip_none=False)
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        if stage == "fit":
            # What the run was started with stays; what it was resumed with stands beside it.
            name = "config-resumed.yaml" if (folder / "config.yaml").exists() else "config.yaml"
            (folder / name).write_text(text)
        for logger in _mlflow(trainer):
            if stage == "fit":
                logger.note(folder)
            run = logger.experiment
            run.log_text(logger.run_id, text, "config-resumed.yaml" if logger.resumed else "config.yaml")
            for key, value in (_tags(self.config, pl_module) | _versions()).items():
                run.set_tag(logger.run_id, key, value)
            if not logger.resumed:
                logger.log_hyperparams(_parameters(self.config.as_dict()))
                run.log_dict(logger.run_id, _fingerprints(trainer), "data_fingerprints.json")

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Once the model stands: print and keep what trains and what is frozen."""
        assert isinstance(pl_module, LitVLM)
        rows = pl_module.stage.summary(pl_module.vlm)
        if trainer.is_global_zero:
            Console().print(freeze_table(pl_module.stage.name, rows))
            for logger in _mlflow(trainer):
                logger.experiment.log_dict(logger.run_id, [row._asdict() for row in rows], "freeze_table.json")

    @rank_zero_only
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Note why a run ended early; Lightning sets the status itself."""
        for logger in _mlflow(trainer):
            reason = f"{type(exception).__name__}: {exception}"
            logger.experiment.set_tag(logger.run_id, "failure", reason[:4000])


def freeze_table(stage: str, rows: list[SlotCount]) -> Table:
    """What trains and what is frozen, as a table for the terminal."""
    table = Table(title=f"stage '{stage}': what trains")
    for title in ("slot", "part", "trained", "frozen", "peak LR"):
        table.add_column(title, justify="left" if title in ("slot", "part") else "right")
    for row in rows:
        style = "green" if row.trained else "dim"
        lr = f"{row.lr:g}" if row.lr is not None else "-"
        table.add_row(row.slot, row.part, f"{row.trained:,}", f"{row.frozen:,}", lr, style=style)
    return table


def _mlflow(trainer: L.Trainer) -> list[MLflow]:
    return [logger for logger in trainer.loggers if isinstance(logger, MLflow)]


def _tags(config: Any, module: LitVLM) -> dict[str, str]:
    """System and scale from the names of the config files, stage and strategy from what they say."""
    tags = {"stage": module.stage.name}
    for path in config.get("config") or ():
        file = Path(str(getattr(path, "absolute", path)))
        if file.name == "model.yaml":
            tags["system"] = file.parent.name
        elif file.parent.name == "scales":
            tags["scale"] = file.stem
        elif file.parent.name == "strategies":
            tags["strategy"] = file.stem
    return tags


def _versions() -> dict[str, str]:
    tags = {f"version.{name}": importlib.metadata.version(name) for name in PACKAGES}
    folder = Path(__file__).parent
    commit = _git(folder, "rev-parse", "HEAD")
    if commit:
        dirty = bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))
        tags["git.commit"] = commit + ("-dirty" if dirty else "")
    return tags


def _git(folder: Path, *arguments: str) -> str:
    try:
        result = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return result.stdout.strip()


def _fingerprints(trainer: L.Trainer) -> dict[str, str]:
    data = getattr(trainer, "datamodule", None)
    return data.fingerprints() if isinstance(data, VLMData) else {}


def _parameters(config: Mapping[str, Any]) -> dict[str, str]:
    """The settings that runs are compared by, flat; the whole config is kept as a file."""
    flat = dict(_flatten({key: config.get(key) or {} for key in ("model", "data")}, ""))
    trainer = config.get("trainer") or {}
    for key in ("max_steps", "max_epochs", "accumulate_grad_batches", "gradient_clip_val", "precision", "devices"):
        if trainer.get(key) is not None:
            flat[f"trainer.{key}"] = str(trainer[key])
    return {key: value[:250] for key, value in flat.items()}


def _flatten(value: Any, prefix: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, entry in value.items():
            if key == "init_args":
                yield from _flatten(entry, prefix)
            elif key == "class_path":
                yield prefix, str(entry).rsplit(".", 1)[-1]
            else:
                yield from _flatten(entry, f"{prefix}.{key}" if prefix else str(key))
    elif value is not None:
        yield prefix, json.dumps(value) if isinstance(value, list) else str(value)
