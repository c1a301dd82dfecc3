"""The record of a run: what it was asked for, what it ran with and on, in its folder and in all loggers."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table

from lit_vlm.checkpoints.folder import DONE_FILE
from lit_vlm.core.versions import installed
from lit_vlm.data import VLMData
from lit_vlm.training.frozen import stored_in
from lit_vlm.training.leaving import Preempted
from lit_vlm.training.loggers import reports, tell_end
from lit_vlm.training.module import LitVLM
from lit_vlm.training.run_tags import TOLD_APART, given_tags
from lit_vlm.training.stage import SlotCount

PACKAGES = ("lit-vlm", "torch", "lightning", "transformers", "timm", "peft", "mlflow")


class RunRecord(SaveConfigCallback):
    """Keeps the resolved config, environment, data and freeze table of a run, in its folder and in its loggers."""

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
        settings = _settings(self.config.as_dict())
        tags = _tags(self.config, pl_module, folder) | _versions()
        for report in reports(trainer):
            goes_on = report.open(folder)
            if not goes_on:
                report.settings(settings)
                report.text(json.dumps(_fingerprints(trainer), indent=2), "data_fingerprints.json")
                report.text(json.dumps(_provenance(trainer), indent=2), "data_provenance.json")
            report.text(text, "config-resumed.yaml" if goes_on else "config.yaml")
            report.tags(tags)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print and keep which parameters train and which are frozen, once the model is built."""
        assert isinstance(pl_module, LitVLM)
        rows = pl_module.stage.summary(pl_module.vlm)
        if trainer.is_global_zero:
            Console().print(freeze_table(pl_module.stage.name, rows))
            if line := stored_in(pl_module.vlm):
                Console(highlight=False).print(line, style="dim")
            for report in reports(trainer):
                report.table("freeze_table", [row._asdict() for row in rows], trainer.global_step)

    @rank_zero_only
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note that training has come to its end."""
        tell_end(trainer, lambda report: report.finished())

    @rank_zero_only
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Note why a run ended early; Lightning sets the status itself."""
        if isinstance(exception, Preempted):
            return
        tell_end(trainer, lambda report: report.failed(f"{type(exception).__name__}: {exception}"))


def freeze_table(stage: str, rows: list[SlotCount]) -> Table:
    """A table for the terminal of the trained and frozen parameters of each slot."""
    table = Table(title=f"stage '{stage}': what trains")
    for title in ("slot", "part", "trained", "frozen", "peak LR"):
        table.add_column(title, justify="left" if title in ("slot", "part") else "right")
    for row in rows:
        style = "green" if row.trained else "dim"
        lr = f"{row.lr:g}" if row.lr is not None else "-"
        if row.least_lr != row.lr:
            lr = f"{row.least_lr:.2g} to {lr}"
        table.add_row(row.slot, row.part, f"{row.trained:,}", f"{row.frozen:,}", lr, style=style)
    return table


def _tags(config: Any, module: LitVLM, folder: Path) -> dict[str, str]:
    """System, scale and strategy by the names of the config files, the rest by what they and the environment say."""
    own = {"stage": module.stage.name, "folder": str(folder), "seed": str(config.get("seed_everything"))}
    tags = given_tags() | own
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
    tags = {f"version.{name}": version for name, version in installed(PACKAGES).items()}
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


def _provenance(trainer: L.Trainer) -> dict[str, dict[str, str]]:
    data = getattr(trainer, "datamodule", None)
    return data.provenance() if isinstance(data, VLMData) else {}


def _settings(config: Mapping[str, Any]) -> dict[str, str]:
    """The settings that runs are compared by, flat; the whole config is kept as a file."""
    flat = {key: value for key, value in given_tags().items() if key in TOLD_APART}
    flat["seed"] = str(config.get("seed_everything"))
    flat |= _flatten({key: config.get(key) or {} for key in ("model", "data")}, "")
    trainer = config.get("trainer") or {}
    for key in ("max_steps", "max_epochs", "accumulate_grad_batches", "gradient_clip_val", "precision", "devices"):
        if trainer.get(key) is not None:
            flat[f"trainer.{key}"] = str(trainer[key])
    return flat


def _flatten(value: Any, prefix: str) -> Iterator[tuple[str, str]]:
    """Names and values of what is set: a class by its name, its arguments below; items of a list by their number."""
    if isinstance(value, Mapping):
        for key, entry in value.items():
            if key == "init_args":
                yield from _flatten(entry, prefix)
            elif key == "class_path":
                yield prefix, str(entry).rsplit(".", 1)[-1]
            else:
                yield from _flatten(entry, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        for number, item in enumerate(value):
            yield from _flatten(item, f"{prefix}.{number}")
    elif value is not None:
        yield prefix, json.dumps(value) if isinstance(value, list) else str(value)
