"""A few steps of a stage, run as the first process of many, with weights that have shapes and no values."""

from __future__ import annotations

import json
import os
import tempfile
import time
import traceback
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import lightning.pytorch as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.default_planner import (
    create_default_global_save_plan,
    create_default_local_load_plan,
    create_default_local_save_plan,
)
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.testing._internal.distributed.fake_pg import FakeStore

from lit_vlm.core.batch import ENCODER, Batch
from lit_vlm.core.narrow import narrow_operands
from lit_vlm.core.part import empty_parameters
from lit_vlm.core.quantised import quantise
from lit_vlm.data import VLMData
from lit_vlm.data.feed.batching import GlobalBatch
from lit_vlm.heads import Head
from lit_vlm.model.build import build_on_meta
from lit_vlm.model.vlm import VLM
from lit_vlm.planning import no_gpu
from lit_vlm.planning.batches import Chosen, choose
from lit_vlm.planning.job import HEAVIEST, MICRO, RECORDED, STEPS, Failed, Job, Measured, States, Statistics, launched
from lit_vlm.planning.mock import mock_train
from lit_vlm.planning.operations import Recorder
from lit_vlm.planning.statistics import read_statistics
from lit_vlm.teachers import EncoderTeacher
from lit_vlm.training.frozen import narrow_meta
from lit_vlm.training.module import LitVLM
from lit_vlm.training.sharding import FSDP2
from lit_vlm.training.step_flops import StepFlops
from lit_vlm.training.waits import Waits

RECORDS = 65536
"""Made-up records, at most: enough for the lengths of a few dozen batches on hundreds of devices."""


SAMPLES_PER_ROW = 16
"""Samples that a packed row may hold."""
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


class Weightless(LitVLM):
    """The module of a stage, whose weights are memory without values."""

    has_values = False

    def build(self, only: Collection[str] | None = None) -> VLM:
        """The architecture; parameters stay on the meta device where sharding gives them memory."""
        model = build_on_meta(self.slots)
        if isinstance(self.trainer.strategy, FSDP2):
            return model
        self.stage.freeze(model, self.slots.removed_heads)
        self._quantise(model)
        if (narrow := self.narrow()) is not None:
            narrow_operands(model, narrow, "the model")
        empty_parameters(model)
        return model

    def store_frozen(self, model: VLM) -> None:
        """Quantise frozen weights; `build` did so for a model that is not sharded."""
        if isinstance(self.trainer.strategy, FSDP2):
            self._quantise(model)

    def _quantise(self, model: VLM) -> None:
        for slot, kind in self.slots.quantize.kinds().items():
            quantise(model.slots()[slot][0], kind, slot)

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
    if not torch.cuda.is_available():
        raise ValueError("PyTorch sees no GPU, neither a real nor a simulated one")
    _one_of_many(job)
    cli, records = _built(job, stages, folder)
    module, data, trainer = cli.model, cli.datamodule, cli.trainer
    assert isinstance(data, VLMData)
    module.__class__ = Weightless
    module.stage.start_from, module.stage.fresh = None, []
    settings = _Settings.of(data, trainer, records)
    chosen = _choose(module, data, job, settings.accumulate)
    micro = min(MICRO, settings.accumulate)
    _only_steps(trainer, data, chosen, micro)
    if isinstance(trainer.strategy, DDPStrategy):
        # Without the other processes it can neither compare parameters with them nor agree on an order of buckets,
        # which it leaves alone where parameters may be unused.
        trainer.strategy._ddp_kwargs.update(init_sync=False, find_unused_parameters=True)
        trainer.strategy._ddp_comm_hook = lambda _state, bucket: _reduce_alone(bucket)
    probe = _Probe(job, micro)
    trainer.callbacks.append(probe)
    trainer.fit(module, datamodule=data)
    return probe.measured(module, chosen, settings)


def _built(job: Job, stages: Stages, folder: str) -> tuple[Any, int | None]:
    """The objects of a stage, and where its data are not there, the number of the published records.

    Made-up records take the place of data that are not there, if their statistics are known.
    """
    words = [*launched(job.words, job), "--trainer.default_root_dir", folder]
    try:
        return stages.make(words), None
    except (ValueError, OSError):
        if job.statistics is None:
            raise
    made, count = made_up(words, stages, job.statistics, job.world_size)
    return stages.make([*words, *made]), count


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
    wanted = max(RECORDS, SAMPLES_PER_ROW * 4 * least) if "Packed" in str(config.data.batching) else RECORDS
    made = mock_train(Path(file), stage, min(count, wanted), tokenizer, template.as_dict(), scale, least=least)
    return ["--data.train", json.dumps(made), "--data.val", "null", "--data.held_out", "0"], count


class _Settings(NamedTuple):
    """Settings of a stage, as `Measured` reports them."""

    batch_size: int
    accumulate: int
    epochs: int | None
    max_steps: int | None
    records: int | None
    workers: int

    @staticmethod
    def of(data: VLMData, trainer: L.Trainer, records: int | None) -> _Settings:
        """Read them before the trainer is told to take a few steps."""
        steps = trainer.max_steps if trainer.max_steps >= 0 else None
        epochs = trainer.max_epochs if steps is None else None
        return _Settings(data.batch_size, trainer.accumulate_grad_batches, epochs, steps, records, data.num_workers)


def _one_of_many(job: Job) -> None:
    """Make this the first process of the job's many, as a launcher would, with a process group of nobody else."""
    if job.world_size == 1:
        return
    devices = min(job.per_node, job.world_size)
    os.environ.update(
        TORCHELASTIC_RUN_ID="plan", RANK="0", WORLD_SIZE=str(job.world_size), LOCAL_RANK="0", GROUP_RANK="0",
        LOCAL_WORLD_SIZE=str(devices), MASTER_ADDR="127.0.0.1", MASTER_PORT="29500",
    )  # fmt: skip
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
    chosen = choose(module, data, global_batch, job.prepared, job.text_only)
    module.model = None
    return chosen


def _only_steps(trainer: L.Trainer, data: VLMData, chosen: Chosen, micro: int) -> None:
    """Let the trainer take the chosen batches, and nothing that belongs to a run."""
    loop = trainer.fit_loop
    loop.epoch_loop.max_steps, loop.max_epochs = STEPS, -1
    trainer.accumulate_grad_batches = micro
    # Callbacks of a step, and none of a run: checkpoints, evaluation and records of settings.
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    callbacks[:] = [one for one in callbacks if belongs_to_steps(one)]
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


def belongs_to_steps(callback: L.Callback) -> bool:
    """Whether a callback does something in a step, and nothing at the end of one or of a run."""
    hooks = ("on_validation_end", "on_save_checkpoint", "on_train_epoch_end", "on_fit_end", "setup")
    return not any(getattr(type(callback), hook) is not getattr(L.Callback, hook) for hook in hooks)


class _Probe(L.Callback):
    """Measures the steps.

    Args:
        job: what is asked for.
        micro: micro-batches of a step.
    """

    def __init__(self, job: Job, micro: int) -> None:
        self.job, self.micro = job, micro
        self.recorder: Recorder | None = None
        self.waits = Waits()
        self.states = States()
        self.seconds: list[float] = []
        self._waiting = False
        self._start = 0.0

    def _ends(self, batch_idx: int, step: int) -> bool:
        return batch_idx == (step + 1) * self.micro - 1

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin to record, in the last micro-batch of the step that is recorded."""
        if batch_idx == self.micro:
            torch.cuda.reset_peak_memory_stats()
        if self.job.record and self._ends(batch_idx, RECORDED):
            self.recorder = Recorder(self.job.per_node)
            self.recorder.__enter__()
        if batch_idx % self.micro == 0:
            self._start = time.perf_counter()

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Look at the gradients."""
        if self.recorder is not None:
            self.recorder.stepping = True
        self.states.gradients = _bytes(p.grad for p in pl_module.parameters() if p.grad is not None)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """End the recording; look at all that stays."""
        if self.job.record and self._ends(batch_idx, RECORDED) and self.recorder is not None:
            self.recorder.__exit__(None, None, None)
        if self._ends(batch_idx, RECORDED):
            self._stop_waits()
        if self._ends(batch_idx, 0) and self.job.waits:
            self._waiting = True
            self.waits.__enter__()
        if (batch_idx + 1) % self.micro == 0:
            torch.cuda.synchronize()
            self.seconds.append(time.perf_counter() - self._start)
        optimizer = trainer.optimizers[0]
        states = (value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor))
        self.states.optimizer = _bytes(states)
        self.states.weights = _bytes(_weights(pl_module))

    def _stop_waits(self) -> None:
        if self._waiting:
            self.waits.__exit__(None, None, None)
            self._waiting = False

    def measured(self, module: LitVLM, chosen: Chosen, settings: _Settings) -> Measured:
        """All that was measured."""
        trainer, model = module.trainer, module.vlm
        sharded = isinstance(trainer.strategy, FSDP2)
        weights = _global_bytes(model.state_dict().values())
        optimizer = trainer.optimizers[0]
        states = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
        blocks = [block for parts in model.slots().values() for part in parts for block in part.blocks()]
        recorder = self.recorder or Recorder(self.job.per_node)
        return Measured(
            states=self.states,
            expected_states=expected_states(module, self.job, sharded),
            peak=torch.cuda.max_memory_allocated(),
            reserved=torch.cuda.max_memory_reserved(),
            typical=chosen.typical.counts,
            heaviest=chosen.heaviest.counts,
            mean=chosen.mean,
            micro_batches=chosen.per_epoch,
            model_flops=StepFlops(model, module.slots, module.stage.losses)(chosen.typical),
            operations=recorder.operations,
            messages=recorder.messages,
            batch_size=settings.batch_size,
            accumulate=settings.accumulate,
            epochs=settings.epochs,
            max_steps=settings.max_steps,
            records=settings.records,
            strategy=type(trainer.strategy).__name__,
            recompute=bool(model.decoder.recompute),
            frozen_full=module.stage.frozen_dtype == "full" and module.trainer.precision != "32-true",
            preparable=_preparable(module, self.job),
            checkpoint=_saved_bytes(trainer) if sharded else weights + _global_bytes(states),
            weights_file=weights,
            host_loading=_loading_bytes(model),
            batch_bytes=_batch_bytes(chosen.heaviest),
            record_bytes=chosen.record_bytes,
            workers=settings.workers,
            slots=[(row.slot, row.part, row.trained, row.frozen) for row in module.stage.summary(model)],
            blocks=len(blocks) + 1 if sharded else 0,
            unsharded=[n for n, p in model.named_parameters() if not isinstance(p, DTensor)] if sharded else [],
            precision=str(trainer.precision),
            mixed=dict(recorder.mixed),
            waits=self.waits.unwanted(),
            seconds=[] if no_gpu.loaded() or self.job.record else self.seconds,
        )


def states_alone(job: Job, stages: Stages) -> States:
    """What weights, gradients and optimizer take of a device, by arithmetic: no step runs, and no GPU is needed.

    Args:
        job: the stage, and the number of devices.
        stages: how its objects are built.

    Raises:
        ValueError: for a wrong flag, or data that neither are there nor have statistics.
    """
    with tempfile.TemporaryDirectory() as folder:
        cli, _ = _built(job, stages, folder)
    module, strategy = cli.model, cli.trainer.strategy
    model = module.model = build_on_meta(module.slots)
    module.stage.freeze(model, module.slots.removed_heads)
    for slot, kind in module.slots.quantize.kinds().items():
        quantise(model.slots()[slot][0], kind, slot)
    if module.stage.frozen_dtype != "full":  # a GPU computes in bf16
        if isinstance(strategy, FSDP2):
            narrow_meta(model, torch.bfloat16)
        else:
            narrow_operands(model, torch.bfloat16, "the model")
    return _states(list(model.parameters()), _shards(strategy, job.world_size))


def expected_states(module: LitVLM, job: Job, sharded: bool) -> States:
    """States of one device by arithmetic: sizes of all tensors, over the number of shards.

    Args:
        module: with its model.
        job: for the number of devices.
        sharded: whether the strategy shards; hybrid sharding does so inside a node.
    """
    shards = _shards(module.trainer.strategy, job.world_size) if sharded else 1
    states = _states(list(module.vlm.parameters()), shards)
    # Every process has whole copies of tables and teachers.
    states.weights += sum(b.numel() * b.element_size() for b in module.vlm.buffers())
    states.weights += sum(p.numel() * p.element_size() for p in _teacher_weights(module))
    return states


def _shards(strategy: Any, world_size: int) -> int:
    """Number of shards that weights are cut into."""
    if not isinstance(strategy, FSDP2):
        return 1
    return world_size // (strategy.num_nodes if strategy.replicas == "nodes" else int(strategy.replicas))


def _states(parameters: Sequence[nn.Parameter], shards: int) -> States:
    trained = sum(_first_shard(p, shards) for p in parameters if p.requires_grad)
    return States(sum(_first_shard(p, shards) for p in parameters), trained, 2 * trained)


def _first_shard(parameter: nn.Parameter, shards: int) -> int:
    """Bytes of the first of several shards, which are cut between rows, the first ones larger where it must be."""
    rows = parameter.shape[0] if parameter.ndim else 1
    return -(-rows // shards) * (parameter.numel() // max(1, rows)) * parameter.element_size()


def _weights(module: L.LightningModule) -> Iterator[Tensor]:
    """Parameters and buffers of the model and of its teachers."""
    assert isinstance(module, LitVLM)
    yield from module.vlm.parameters()
    yield from module.vlm.buffers()
    yield from _teacher_weights(module)


def _teacher_weights(module: LitVLM) -> Iterator[Tensor]:
    """Parameters of the teachers that ran: each moves to the device with the first pictures."""
    for head in module.vlm.heads.values():
        if isinstance(head, Head) and isinstance(head.teacher, EncoderTeacher):
            yield from (p for p in head.teacher.encoder.parameters() if p.is_cuda)


def _preparable(module: LitVLM, job: Job) -> list[str]:
    """Networks whose features could be prepared before training, and are not."""
    names = [ENCODER] if module.vlm.encoder.frozen() and any(True for _ in module.vlm.encoder.parameters()) else []
    for name, head in module.vlm.heads.items():
        if isinstance(head, Head) and isinstance(head.teacher, EncoderTeacher) and module.stage.losses.get(name):
            names.append(name)
    return [name for name in names if name not in job.prepared]


def _bytes(tensors: Any) -> int:
    """Bytes of a device that these tensors take, each once; of a sharded one, those of this process."""
    found: dict[int, int] = {}
    for tensor in tensors:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if local.is_cuda:
            found[id(tensor)] = local.numel() * local.element_size()
    return sum(found.values())


def _global_bytes(tensors: Any) -> int:
    """Bytes of whole tensors, over all processes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _saved_bytes(trainer: L.Trainer) -> int:
    """Bytes of a sharded checkpoint, by the metadata that saving would write, and that loading finds all it needs in.

    The plans of the other processes, which would write the other shards, are left out: sizes are of whole tensors.
    """
    strategy = trainer.strategy
    state: Any = {"state_dict": strategy.lightning_module_state_dict()}
    state["optimizer"] = [strategy.optimizer_state(optimizer) for optimizer in trainer.optimizers]
    flat, _ = flatten_state_dict(state)
    _, metadata = create_default_global_save_plan([create_default_local_save_plan(flat, is_coordinator=True)])
    create_default_local_load_plan(flat, metadata)
    tensors = [one for one in metadata.state_dict_metadata.values() if isinstance(one, TensorStorageMetadata)]
    return sum(one.size.numel() * one.properties.dtype.itemsize for one in tensors)


def _loading_bytes(model: nn.Module) -> int:
    """Bytes of a whole model in fp32, which the first process holds while it reads the weights."""
    return sum(4 * parameter.numel() for parameter in model.parameters())


def _batch_bytes(batch: Batch) -> int:
    """Bytes of a batch on the host."""
    images = [batch.images, *batch.teacher_images.values()]
    ids = (batch.input_ids, batch.labels, batch.position_ids, batch.segment_ids, batch.image_positions)
    tensors = [*ids, *(one.pixels for one in images), *(one.features for one in batch.prepared.values())]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
