"""Changes of a stage's settings that take less memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from lit_vlm.planning.job import Job, Measured

SHARDED = '{"class_path": "lit_vlm.training.sharding.FSDP2"}'


@dataclass(frozen=True)
class Change:
    """A change of a stage's settings that takes less memory.

    Attributes:
        what: in words.
        flags: flags of `lit-vlm run`.
        prepared: heads, or `encoder`, whose features are prepared before.
    """

    what: str
    flags: tuple[str, ...] = ()
    prepared: tuple[str, ...] = ()

    def apply(self, job: Job) -> Job:
        """The job with this change."""
        return replace(job, words=(*job.words, *self.flags), prepared=(*job.prepared, *self.prepared))


def smaller(asked: Measured, room: int, devices: int) -> Iterator[list[Change]]:
    """Yield changes that take less memory, the smallest first, then several together.

    Sharding and smaller micro-batches change no result; recomputation takes a third more time; prepared features need
    disk space and pictures that are not augmented.

    Args:
        asked: the step on a device on which it fits.
        room: bytes that PyTorch may allocate on a device.
        devices: number of devices.
    """
    shard = Change("FSDP2 over all devices", ("--trainer.strategy", SHARDED))
    again = Change("recomputed blocks", ("--model.decoder.init_args.recompute", "true"))
    low = Change("frozen weights in bf16", ("--model.stage.frozen_dtype", "compute"))
    names = tuple(asked.preparable)
    ready = Change(f"prepared features of {', '.join(names)}", prepared=names)
    fewer = list(_micro_batches(asked))
    states_fit = asked.states.total < room
    sharding = [shard] if not asked.blocks and devices > 1 else []
    again_too = [again] if not asked.recompute else []
    preparing = [ready] if names else []
    singles = [*([low] if asked.frozen_full else []), *([*fewer, *again_too] if states_fit else [])]
    for change in [*singles, *sharding, *preparing]:
        yield [change]
    together = [*sharding, *again_too, *preparing]
    if len(together) > 1:
        yield together
    if together:  # micro-batches alone were tried
        for change in fewer:
            yield [*together, change]


def _micro_batches(asked: Measured) -> Iterator[Change]:
    """Smaller micro-batches that keep the global batch."""
    size, accumulate = asked.batch_size, asked.accumulate
    while size > 1 and size % 2 == 0:
        size, accumulate = size // 2, accumulate * 2
        yield Change(
            f"micro-batches of {size}, {accumulate} per step",
            ("--data.batch_size", str(size), "--trainer.accumulate_grad_batches", str(accumulate)),
        )
