"""Going on with another number of ranks: the rows of each optimizer step stay, and are dealt out anew."""

from __future__ import annotations

from dataclasses import dataclass

from lit_vlm.data.feed.batching import GlobalBatch


@dataclass(frozen=True)
class Moved:
    """Places of an epoch, for a run that goes on with other micro-batches and the same rows per optimizer step.

    Attributes:
        then: how rows were dealt out when the run stopped.
        now: how they are dealt out.
        rows: rows of an epoch, on all ranks.
    """

    then: GlobalBatch
    now: GlobalBatch
    rows: int

    def batches(self, done: int) -> int:
        """The number of micro-batches that hold the rows which `done` micro-batches held then.

        Raises:
            ValueError: when they end inside an optimizer step, whose gradients no checkpoint holds.
        """
        if done >= self.length(self.then):
            return self.length(self.now)
        steps, rest = divmod(done, self.then.accumulate)
        if rest:
            raise ValueError(
                f"the checkpoint was saved {rest} micro-batches into an optimizer step of {self.then.accumulate}, so "
                f"it can only go on as it was dealt out: {described(self.then)}, not {described(self.now)}. Take a "
                "checkpoint of a step's end"
            )
        return steps * self.now.accumulate

    def length(self, dealt: GlobalBatch) -> int:
        """Micro-batches of an epoch."""
        return -(-self.rows // dealt.rows)


def same_step(began: GlobalBatch, left: GlobalBatch, now: GlobalBatch) -> GlobalBatch | None:
    """How to deal rows out on another number of ranks, so that an optimizer step has the rows that it had.

    The batch size does not grow, as nobody knows whether more would fit into memory.

    Args:
        began: how rows were dealt out when the run began.
        left: how they were when it stopped, which differs if the number of ranks changed before.
        now: the present number of ranks, with the batch size and accumulation of the settings.

    Returns:
        the batch size and accumulation to take; None where the settings are fine as they are, or are new ones, which
        the user wants or which the loader refuses.

    Raises:
        ValueError: when the rows of a step do not divide by the number of ranks, with numbers that would work.
    """
    before = next((one for one in (began, left) if one[::2] == now[::2] and one.world_size != now.world_size), None)
    if now.step == left.step or before is None:
        return None
    rows, left_over = divmod(left.step, now.world_size)
    if left_over:
        raise ValueError(
            f"{left.step} rows per optimizer step, as this run began with ({described(left)}), do not divide by "
            f"{now.world_size} devices: take {nearest_divisors(left.step, now.world_size)}, or start a new run from "
            "its weights with model.stage.start_from"
        )
    size = max(size for size in range(1, now.batch_size + 1) if rows % size == 0)
    return GlobalBatch(size, now.world_size, rows // size)


def nearest_divisors(number: int, near: int) -> str:
    """The divisors of a number that come before and after another number, as `4 or 8`."""
    divisors = [one for one in range(1, number + 1) if number % one == 0]
    found = [max((one for one in divisors if one < near), default=0), min((d for d in divisors if d > near), default=0)]
    return " or ".join(str(one) for one in found if one)


def described(dealt: GlobalBatch) -> str:
    """How rows are dealt out, in words."""
    micro = f" × {dealt.accumulate} micro-batches" if dealt.accumulate > 1 else ""
    return f"{dealt.batch_size} rows × {dealt.world_size} {'device' if dealt.world_size == 1 else 'devices'}{micro}"


def change(left: GlobalBatch, now: GlobalBatch) -> str:
    """A line about another number of ranks at the same rows per optimizer step."""
    ratio = left.world_size / now.world_size
    return (
        f"{left.world_size} → {now.world_size} devices: {described(left)} → {described(now)} = {now.step} rows per "
        f"optimizer step as before; each device has {ratio:.2f} times the rows per step"
        + (", so a step takes about as much longer" if ratio > 1 else "")
    )
