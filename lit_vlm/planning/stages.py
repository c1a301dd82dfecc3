"""How a stage's objects are built, and made-up data in the place of its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from pydoc import locate
from typing import Any, Protocol

import lightning.pytorch as L

from lit_vlm.data.feed.batching import Batching
from lit_vlm.planning.job import Statistics
from lit_vlm.planning.mock import mock_train
from lit_vlm.planning.statistics import read_statistics

RECORDS = 65536
"""Made-up records, at most: enough for the lengths of a few dozen batches on hundreds of devices."""
SAMPLES_PER_ROW = 16
"""Samples that a packed row may hold."""
WITHOUT_A_RUN = (
    *("--trainer.logger", "false"),
    *("--trainer.enable_progress_bar", "false"),
    *("--trainer.limit_val_batches", "0"),
)
"""Flags of a stage that is not a run."""
BATCHES = 2
"""Batches of each source on each process, at least, as far as it has records."""


class Stages(Protocol):
    """How a stage's objects come from the arguments of its command."""

    def make(self, words: Sequence[str]) -> Any:
        """A LightningCLI with its objects built and nothing run.

        Raises:
            ValueError: for a wrong flag, or data that are not there.
        """

    def parse(self, words: Sequence[str]) -> Any:
        """The config alone.

        Raises:
            ValueError: for a wrong flag.
        """


def built(
    words: Sequence[str], statistics: Statistics | None, world_size: int, stages: Stages, folder: str
) -> tuple[Any, int | None]:
    """The objects of a stage, and where its data are not there, the number of the published records.

    Made-up records take the place of data that are not there, if their statistics are known.

    Args:
        words: arguments of `lit-vlm fit`.
        statistics: of the published records; None: the stage's own data must be there.
        world_size: number of processes.
        stages: builds the objects.
        folder: of the run.

    Raises:
        ValueError: for a wrong flag, or data that are not there.
    """
    alone = [*words, *WITHOUT_A_RUN, "--trainer.default_root_dir", folder]
    try:
        return stages.make(alone), None
    except (ValueError, OSError):
        if statistics is None:
            raise
    made, count = made_up(alone, stages, statistics, world_size)
    return stages.make([*alone, *made]), count


def only_steps(trainer: L.Trainer, steps: int, added: Sequence[L.Callback]) -> None:
    """Let a trainer take some steps, and do nothing that belongs to a run.

    Args:
        trainer: before it begins.
        steps: number of optimizer steps.
        added: callbacks besides those of a step.
    """
    trainer.fit_loop.epoch_loop.max_steps, trainer.fit_loop.max_epochs = steps, -1
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    callbacks[:] = [*(one for one in callbacks if _belongs_to_steps(one)), *added]


def _belongs_to_steps(callback: L.Callback) -> bool:
    """Whether a callback does something in a step, and nothing that a run keeps, such as checkpoints and scores."""
    hooks = ("on_validation_end", "on_save_checkpoint", "on_train_epoch_end", "on_fit_end", "setup")
    return not any(getattr(type(callback), hook) is not getattr(L.Callback, hook) for hook in hooks)


def made_up(words: Sequence[str], stages: Stages, statistics: Statistics, world_size: int) -> tuple[list[str], int]:
    """Flags that put made-up records in the place of a stage's own, and the number of the published ones.

    Args:
        words: arguments of `lit-vlm fit`.
        stages: parses them.
        statistics: of the published records.
        world_size: number of processes: each gets a few batches of each source, as far as it has them.

    Raises:
        ValueError: for a wrong flag.
    """
    config = stages.parse(words)
    file, stage, scale = statistics
    template, decoder = config.data.template, config.model.decoder.init_args
    tokenizer = decoder.get("tokenizer") or decoder.get("name") or "bytes"
    count = sum(source.records for source in read_statistics(Path(file), stage, scale).values())
    least = BATCHES * world_size * config.data.batch_size
    wanted = max(RECORDS, SAMPLES_PER_ROW * 4 * least) if _packs(config.data.batching) else RECORDS
    made = mock_train(Path(file), stage, min(count, wanted), tokenizer, template.as_dict(), scale, least=least)
    return ["--data.train", json.dumps(made), "--data.val", "null", "--data.held_out", "0"], count


def _packs(batching: Any) -> bool:
    """Whether the batching of a config packs rows: an instance, as the default is, or a class path with arguments."""
    kind = type(batching) if isinstance(batching, Batching) else locate(batching.class_path)
    return bool(getattr(kind, "packs", False))
