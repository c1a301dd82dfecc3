"""What a run reports besides metrics, whichever logger it goes to: settings, tags, texts, tables, pictures, its end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger


class Report(ABC):
    """Where a run reports to. A logger that derives from it gets everything; only rank 0 calls `open` and what follows.

    Attributes:
        place: its name, for the user.
        lacks: what this place cannot hold, for the user to know; empty if nothing.
    """

    place: str
    lacks: str = ""

    @abstractmethod
    def belongs_to(self, folder: Path, go_on: bool) -> None:
        """Say which folder the reports are about; called once, before anything is reported.

        Args:
            folder: folder of the run.
            go_on: go on with what the folder has reported to earlier, if this place can.
        """

    @abstractmethod
    def open(self, folder: Path) -> bool:
        """Begin to report on the run of a folder. Returns whether an earlier run goes on, whose settings are known."""

    @abstractmethod
    def settings(self, values: Mapping[str, str]) -> None:
        """Report the settings that runs are compared by, under flat names."""

    @abstractmethod
    def tags(self, values: Mapping[str, str]) -> None:
        """Report what the run is a part of, and what it ran with."""

    @abstractmethod
    def text(self, text: str, file: str) -> None:
        """Report a text, under the name of a file."""

    @abstractmethod
    def table(self, name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Report a table, whose rows have the same columns in the same order; a later one of this name replaces it."""

    @abstractmethod
    def picture(self, file: Path, step: int) -> None:
        """Report a PNG file, under its name."""

    @abstractmethod
    def failed(self, reason: str) -> None:
        """Report why the run ends before its end."""

    @abstractmethod
    def preempted(self, reason: str) -> None:
        """Report that the run leaves in order and can go on."""

    @abstractmethod
    def finished(self) -> None:
        """Report that the run has come to its end, whatever ended it earlier."""


class MetricsOnly(Report):
    """A logger that is known to take metrics and settings, and nothing else.

    Args:
        logger: the logger.
    """

    lacks = "tags, texts, tables, pictures and how the run ended"

    def __init__(self, logger: Logger) -> None:
        self.logger, self.place = logger, type(logger).__name__

    def belongs_to(self, folder: Path, go_on: bool) -> None:
        """Do nothing, as the logger was given its place."""

    def open(self, folder: Path) -> bool:
        """Begin anew."""
        return False

    def settings(self, values: Mapping[str, str]) -> None:
        """Report settings."""
        self.logger.log_hyperparams(dict(values))

    def tags(self, values: Mapping[str, str]) -> None:
        """Leave tags out."""

    def text(self, text: str, file: str) -> None:
        """Leave texts out."""

    def table(self, name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Leave tables out."""

    def picture(self, file: Path, step: int) -> None:
        """Leave pictures out."""

    def failed(self, reason: str) -> None:
        """Leave the reason out."""

    def preempted(self, reason: str) -> None:
        """Leave the reason out."""

    def finished(self) -> None:
        """Leave the end out."""
