"""`lit-vlm sync`: sends reports that are waiting for their MLflow server."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from lit_vlm.training.mlflow_run import UNSENT, MLflowRun


def main(argv: Sequence[str]) -> None:
    """Send the unsent reports of each folder and of those below it.

    Raises:
        ValueError: when a folder does not exist, a server still does not answer, or a file of reports is broken.
    """
    parser = argparse.ArgumentParser(
        prog="lit-vlm sync",
        description="Send the metrics, parameters and files that runs could not report while their MLflow server did "
        f"not answer. They are kept in {UNSENT.format('*')} of the run's folder.",
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="of a run, or of several")
    console = Console(highlight=False)
    left = broken = 0
    for folder in parser.parse_args(argv).folders:
        if not folder.is_dir():
            raise ValueError(f"there is no folder {folder}")
        found = sorted(folder.rglob(UNSENT.format("*")))
        if not found:
            console.print(f"{folder}: nothing waits", soft_wrap=True)
        for file in found:
            try:
                waiting = MLflowRun.of_unsent(file).flush()
            except ValueError as error:
                console.print(f"[red]{error}[/]", soft_wrap=True)
                broken += 1
                continue
            left += waiting
            console.print(f"{file.parent}: {f'{waiting} reports still wait' if waiting else 'sent'}", soft_wrap=True)
    if left or broken:
        raise ValueError(f"{left} reports could not be sent, and {broken} files not read; they stay where they are")
