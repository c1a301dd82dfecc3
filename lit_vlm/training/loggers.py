"""The loggers of a trainer as places to report to."""

from __future__ import annotations

import logging
import pkgutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_info

from lit_vlm.training.reports import MetricsOnly, Report
from lit_vlm.training.tensorboard_report import TensorBoardReport
from lit_vlm.training.wandb_report import WandbReport

log = logging.getLogger(__name__)


def report_of(logger: Logger) -> Report:
    """The place that a logger reports to; one of another kind than the kit knows takes metrics and settings."""
    if isinstance(logger, Report):
        return logger
    if isinstance(logger, WandbLogger):
        return WandbReport(logger)
    if isinstance(logger, TensorBoardLogger):
        return TensorBoardReport(logger)
    return MetricsOnly(logger)


def reports(trainer: L.Trainer) -> list[Report]:
    """Where a trainer reports to besides metrics; only rank 0 reports."""
    return [report_of(logger) for logger in trainer.loggers if not isinstance(logger, DummyLogger)]


def tell_folder(trainer: L.Trainer, folder: Path, go_on: bool) -> None:
    """Tell all loggers which folder they report about, and the user what they cannot hold.

    Args:
        trainer: has not reported anything yet.
        folder: folder of the run.
        go_on: go on with the runs that the folder belongs to.
    """
    places = reports(trainer)
    for report in places:
        report.belongs_to(folder, go_on)
    if places and all(report.lacks for report in places):  # none holds everything
        for report in places:
            rank_zero_info(f"{report.place} does not hold {report.lacks}. MLflow does: --trainer.logger+=MLflow")


def tell_end(trainer: L.Trainer, tell: Callable[[Report], None]) -> None:
    """Tell each logger how the run ended; an error of one, such as W&B without a login, keeps it from no other.

    Args:
        trainer: the trainer.
        tell: tells one.
    """
    for report in reports(trainer):
        try:
            tell(report)
        except Exception as error:  # whatever it raises, the user is to see what ended the run
            log.warning("%s is not told how the run ended: %s: %s", report.place, type(error).__name__, error)


def check_packages(given: Any) -> None:
    """Check that the packages of loggers are installed, before anything is built.

    Args:
        given: value of `trainer.logger` in the config: one logger, several, true, false or null.

    Raises:
        ValueError: for a logger whose package is not installed.
    """
    for one in given if isinstance(given, list) else [given]:
        if (path := getattr(one, "class_path", None)) is None:
            continue
        kind = pkgutil.resolve_name(path)
        for base, packages in ((WandbLogger, ("wandb",)), (TensorBoardLogger, ("tensorboard", "tensorboardX"))):
            if issubclass(kind, base) and not any(find_spec(package) for package in packages):
                raise ValueError(
                    f"trainer.logger: {kind.__name__} needs the package {packages[0]}, which is not installed: pip "
                    f"install {packages[0]}"
                )


@contextmanager
def refusals_in_one_line() -> Iterator[None]:
    """A context in which an error of W&B, such as a login that is missing, becomes one for the user.

    Raises:
        ValueError: for an error of W&B.
    """
    try:
        yield
    except Exception as error:
        wandb = sys.modules.get("wandb")  # without which none of its errors is raised
        if wandb is None or not isinstance(error, wandb.Error):
            raise
        said = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"trainer.logger: W&B says: {said} Log in by `wandb login`, or set "
            "WANDB_MODE=offline, which keeps everything for `wandb sync`"
        ) from error
