"""A few steps of a stage, run as the first process of many, with weights that have shapes and no values."""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import lightning.pytorch as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from lit_vlm.core.batch import Batch
from lit_vlm.core.narrow import narrow_operands
from lit_vlm.core.part import empty_parameters
from lit_vlm.data import VLMData
from lit_vlm.data.feed.batching import GlobalBatch
from lit_vlm.heads import Head
from lit_vlm.model.build import build_on_meta, quantise_slots
from lit_vlm.model.vlm import VLM
from lit_vlm.planning.batches import Chosen, choose
from lit_vlm.planning.job import HEAVIEST, MICRO, STEPS, Failed, Job, Measured, launched
from lit_vlm.planning.probe import Probe, Settings
from lit_vlm.planning.stages import Stages, built, only_steps
from lit_vlm.training.module import LitVLM
from lit_vlm.training.sharding import FSDP2


class Weightless(LitVLM):
    """The module of a stage, whose weights are memory without values."""

    has_values = False

    def build(self, only: Collection[str] | None = None) -> VLM:
        """The architecture; parameters stay on the meta device where sharding gives them memory."""
        model = build_on_meta(self.slots)
        if isinstance(self.trainer.strategy, FSDP2):
            return model
        self.stage.freeze(model, self.slots.removed_heads)
        quantise_slots(model, self.slots.quantize)
        if (narrow := self.narrow()) is not None:
            narrow_operands(model, narrow, "the model")
        empty_parameters(model)
        return model

    def store_frozen(self, model: VLM) -> None:
        """Quantise frozen weights; `build` did so for a model that is not sharded."""
        if isinstance(self.trainer.strategy, FSDP2):
            quantise_slots(model, self.slots.quantize)

    def load_teachers(self, model: VLM, names: Collection[str], dtype: torch.dtype | None) -> None:
        """Give the teachers' weights memory without values."""
        for name in names:
            head = model.heads[name]
            if isinstance(head, Head) and head.teacher is not None:
                head.teacher.load_empty(dtype)


def run_job(job: Job, stages: Stages) -> Measured | Failed:
    """Run the steps of a job in this process, which is of no use for anything else afterwards.

    Returns:
        what was measured, or why a step did not run to its end.
    """
    try:
        with tempfile.TemporaryDirectory() as folder:
            return _run(job, stages, folder)
    except torch.OutOfMemoryError as error:
        return Failed(str(error).partition("\n")[0], memory=True)
    except (ValueError, OSError, ImportError) as error:
        return Failed(str(error), trace=_trace(error))
    except Exception as error:  # any part may raise anything, those of users too
        return Failed(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}", trace=_trace(error))


def _trace(error: Exception) -> str:
    return "".join(traceback.format_exception(error)[-8:])


def _run(job: Job, stages: Stages, folder: str) -> Measured:
    if not torch.cuda.is_available():  # asked before `_one_of_many` answers it
        raise ValueError("PyTorch sees no GPU, neither a real nor a simulated one")
    _one_of_many(job)
    cli, records = built(launched(job), job.statistics, job.world_size, stages, folder)
    module, data, trainer = cli.model, cli.datamodule, cli.trainer
    assert isinstance(data, VLMData)
    module.__class__ = Weightless
    module.stage.start_from, module.stage.fresh = None, []
    settings = Settings.of(data, trainer, records)
    chosen = _choose(module, data, job, settings.accumulate)
    micro = min(MICRO, settings.accumulate)
    _give(trainer, data, chosen, micro)
    if isinstance(trainer.strategy, DDPStrategy):
        # Without the other processes it can neither compare parameters with them nor agree on an order of buckets,
        # which it leaves alone where parameters may be unused.
        trainer.strategy._ddp_kwargs.update(init_sync=False, find_unused_parameters=True)
        trainer.strategy._ddp_comm_hook = lambda _state, bucket: _reduce_alone(bucket)
    probe = Probe(job, micro)
    only_steps(trainer, STEPS, [probe])
    trainer.fit(module, datamodule=data)
    return probe.measured(module, chosen, settings)


def _one_of_many(job: Job) -> None:
    """Make this the first process of the job's many, as a launcher would, with a process group of nobody else."""
    if job.world_size == 1:
        return
    devices = min(job.per_node, job.world_size)
    os.environ.update(
        TORCHELASTIC_RUN_ID="plan", RANK="0", WORLD_SIZE=str(job.world_size), LOCAL_RANK="0", GROUP_RANK="0",
        LOCAL_WORLD_SIZE=str(devices), MASTER_ADDR="127.0.0.1", MASTER_PORT="29500",
    )  # fmt: skip
    torch.cuda.device_count = lambda: devices  # a rehearsal has the first of them alone
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=job.world_size)
    dist.all_gather_object = _all_alike  # type: ignore[assignment]


def _all_alike(gathered: list[Any], own: Any, group: Any = None) -> None:
    """Stands for `dist.all_gather_object` among processes that are all like this one."""
    gathered[:] = [own] * len(gathered)


def _reduce_alone(bucket: Any) -> torch.futures.Future[Tensor]:
    """Gradients of a bucket, reduced with nobody: the group of one process gives results that DDP cannot wait for."""
    dist.all_reduce(bucket.buffer())
    done: torch.futures.Future[Tensor] = torch.futures.Future(devices=[bucket.buffer().device])
    done.set_result(bucket.buffer())
    return done


def _choose(module: LitVLM, data: VLMData, job: Job, accumulate: int) -> Chosen:
    module.model = build_on_meta(module.slots)
    module.stage.freeze(module.model, module.slots.removed_heads)
    global_batch = GlobalBatch(data.batch_size, job.world_size, accumulate)
    chosen = choose(module, data, global_batch, job.prepared)
    module.model = None
    return chosen


def _give(trainer: L.Trainer, data: VLMData, chosen: Chosen, micro: int) -> None:
    """Let the trainer take the chosen batches."""
    trainer.accumulate_grad_batches = micro
    order = [chosen.typical] * (HEAVIEST * micro) + [chosen.heaviest] * micro
    data.train_dataloader = lambda: _Given(order)  # type: ignore[method-assign,assignment,return-value]


class _Given:
    """A loader of given batches; a list would count as one loader per batch."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches = [batch.pin_memory() if torch.cuda.is_available() else batch for batch in batches]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)
