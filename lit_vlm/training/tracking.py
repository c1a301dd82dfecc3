"""MLflow: one run per stage, with config, versions, data and metrics, by which it can be understood later."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
from argparse import Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table

from lit_vlm.checkpoints.folder import DONE_FILE
from lit_vlm.data import VLMData
from lit_vlm.training.frozen import stored_in
from lit_vlm.training.leaving import Preempted
from lit_vlm.training.mlflow_run import PARENT_RUN, MLflowRun, known_run
from lit_vlm.training.mlflow_store import default_uri
from lit_vlm.training.module import LitVLM
from lit_vlm.training.stage import SlotCount

PACKAGES = ("lit-vlm", "torch", "lightning", "transformers", "timm", "peft", "mlflow")


class MLflow(Logger):
    """Logger that keeps metrics, parameters and files of a run in MLflow; training goes on if the store fails.

    Args:
        tracking_uri: where runs are kept; default: `MLFLOW_TRACKING_URI`, or sqlite:///mlflow.db.
        experiment_name: name of the experiment.
        run_name: name of the run; default: the name of the stage.
        tags: tags of the run, besides those that the kit sets.

    Attributes:
        run: the MLflow run that rank 0 reports to.
    """

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
        self._tags = (tags or {}) | ({"mlflow.parentRunId": parent} if parent else {})
        self.run = MLflowRun(default_uri(tracking_uri), experiment_name, run_name, self._tags)
        self._left = False

    def belongs_to(self, folder: Path, run_name: str, go_on: bool) -> None:
        """Say which folder the reports are about; called once, before the first report.

        Args:
            folder: folder of the run.
            run_name: the name of a new run, if none was given.
            go_on: go on with the MLflow run that the folder belongs to, unless another store was named.
        """
        known = known_run(folder, self._given) if go_on else None
        self.run = known or MLflowRun(self.run.uri, self._experiment, self._name or run_name, self._tags, folder)

    @property
    def name(self) -> str:
        """The name of the experiment."""
        return self._experiment

    @property
    def version(self) -> str | None:
        """The run's id; None until it is open."""
        return self.run.run_id

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

    @rank_zero_only
    def preempted(self, reason: str) -> None:
        """Set the status of a run that leaves and can go on."""
        self._left = True
        self.run.preempted(reason)


class RunRecord(SaveConfigCallback):
    """Keeps the resolved config, environment, data and freeze table of a run, in its folder and in MLflow."""

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Keep the config, and the tags by which runs are told apart; rank 0 only, before the model is built."""
        assert isinstance(pl_module, LitVLM)
        text = self.parser.dump(self.config, skip_none=False)
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        if stage == "fit":
            (folder / DONE_FILE).unlink(missing_ok=True)  # of a stage that goes on beyond its former end
            # The config that started the run stays; the one that resumes it is written beside it.
            resumed = bool(self.config.get("ckpt_path")) and (folder / "config.yaml").exists()
            (folder / ("config-resumed.yaml" if resumed else "config.yaml")).write_text(text, encoding="utf-8")
        for logger in _mlflow(trainer):
            logger.run.open()
            logger.run.owns_folder()
            if logger.run.resumed:
                logger.run.going_on()
            else:
                logger.log_hyperparams(_parameters(self.config.as_dict()))
                logger.run.text(json.dumps(_fingerprints(trainer), indent=2), "data_fingerprints.json")
            logger.run.text(text, "config-resumed.yaml" if logger.run.resumed else "config.yaml")
            for key, value in (_tags(self.config, pl_module) | _versions()).items():
                logger.run.tag(key, value)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print and keep which parameters train and which are frozen, once the model is built."""
        assert isinstance(pl_module, LitVLM)
        rows = pl_module.stage.summary(pl_module.vlm)
        if trainer.is_global_zero:
            Console().print(freeze_table(pl_module.stage.name, rows))
            if line := stored_in(pl_module.vlm):
                Console(highlight=False).print(line, style="dim")
            for logger in _mlflow(trainer):
                logger.run.text(json.dumps([row._asdict() for row in rows], indent=2), "freeze_table.json")

    @rank_zero_only
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Note why a run ended early; Lightning sets the status itself."""
        if isinstance(exception, Preempted):
            return
        for logger in _mlflow(trainer):
            logger.run.tag("failure", f"{type(exception).__name__}: {exception}")


def freeze_table(stage: str, rows: list[SlotCount]) -> Table:
    """A table for the terminal of the trained and frozen parameters of each slot."""
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
    """System, scale and strategy from the names of the config files, the stage from what they say."""
    tags = {"stage": module.stage.name}
    for path in config.get("config") or ():
        file = Path(str(getattr(path, "absolute", path)))
        if file.name == "model.yaml" or (file.parent / "recipe.yaml").is_file():  # files of a recipe's base come first
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
    return flat


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
