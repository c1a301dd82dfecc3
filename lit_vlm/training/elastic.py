"""Lightning's counters and intervals of micro-batches, where a run goes on with micro-batches of another size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loops.progress import _BatchProgress, _ProcessedTracker

from lit_vlm.data import VLMData
from lit_vlm.data.feed.batching import GlobalBatch
from lit_vlm.data.feed.elastic import Moved, change, same_step

COUNTING = ("limit_train_batches", "val_check_interval", "limit_val_batches")
"""Arguments of the trainer that count micro-batches where they are whole numbers."""


def move(progress: _BatchProgress, moved: Moved, batches_then: float, batches_now: float) -> None:
    """Let a count of micro-batches go on with micro-batches of another size, at the same optimizer step.

    Args:
        progress: the count of this epoch and of all.
        moved: how places of an epoch changed.
        batches_then: micro-batches of an epoch when the run stopped, as far as `limit_train_batches` lets it go.
        batches_now: the same now.

    Raises:
        ValueError: where `limit_train_batches` gives an epoch another number of optimizer steps than it had.
    """
    then, now = int(batches_then), int(batches_now)
    steps = [-(-then // moved.then.accumulate), -(-now // moved.now.accumulate)]
    if steps[0] != steps[1]:
        raise ValueError(
            f"an epoch had {steps[0]} optimizer steps when this run stopped and has {steps[1]} now: "
            "trainer.limit_train_batches counts micro-batches, and these are of another size now"
        )

    def translated(done: int) -> int:
        return now if done == then else moved.batches(done)

    current, total = progress.current, progress.total
    assert isinstance(current, _ProcessedTracker)
    assert isinstance(total, _ProcessedTracker)
    epochs, rest = divmod(total.processed - current.processed, then)
    # Counts of an event's beginning and end differ by one where a checkpoint was saved in between.
    by_total = epochs * now + translated(rest) + translated(current.processed) - total.processed
    by_current = translated(current.processed) - current.processed
    for count, by in ((total, by_total), (current, by_current)):
        count.increment_by(by)


def keep_step(trainer: Trainer, data: VLMData, place: Mapping[str, Any] | None) -> list[str]:
    """Let a run that goes on with another number of devices keep the rows of an optimizer step.

    Batch size and accumulation are changed, and with them the settings that count micro-batches. Nothing is done where
    the number of devices is the same, or the settings are not those that the run began with.

    Args:
        trainer: the trainer of the run, before it begins.
        data: its data, before its loader is made.
        place: place in the data that the checkpoint was saved at (`read_place`).

    Returns:
        lines that say what changes.

    Raises:
        ValueError: as `same_step`, and where `limit_train_batches` does not divide.
    """
    if place is None or "dealt" not in place:
        return []  # of a checkpoint of an earlier version
    began, left = GlobalBatch(*place["ordered_for"]), GlobalBatch(*place["dealt"])
    given = GlobalBatch(data.batch_size, trainer.num_nodes * trainer.num_devices, trainer.accumulate_grad_batches)
    now = same_step(began, left, given)
    if now is None:
        return []
    lines = [change(left, now)]
    for name in COUNTING:
        value = getattr(trainer, name)
        if not isinstance(value, int) or not value:
            continue
        scaled, rest = divmod(value * now.accumulate, given.accumulate)
        if rest and name == "limit_train_batches":
            raise ValueError(
                f"trainer.limit_train_batches {value} of micro-batches as this run began with is no whole number of "
                f"those that it goes on with ({now.accumulate} in the place of {given.accumulate}): set a multiple of "
                f"{given.accumulate}"
            )
        setattr(trainer, name, scaled + bool(rest))
        if scaled + bool(rest) != value:
            lines.append(f"trainer.{name} counts micro-batches: {value} → {scaled + bool(rest)}")
    data.batch_size, trainer.accumulate_grad_batches = now.batch_size, now.accumulate
    # Here too, as a sharded strategy asks for the number of steps before Lightning hands the state over.
    data.load_state_dict({"train": dict(place)})
    return lines
