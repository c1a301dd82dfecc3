"""Bytes: of states by arithmetic and as they are, of checkpoints, of batches."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.default_planner import (
    create_default_global_save_plan,
    create_default_local_load_plan,
    create_default_local_save_plan,
)
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from lit_vlm.core.batch import Batch
from lit_vlm.core.narrow import narrow_operands
from lit_vlm.heads import Head
from lit_vlm.model.build import build_on_meta, quantise_slots
from lit_vlm.planning.job import Job, States, launched
from lit_vlm.planning.stages import Stages, built
from lit_vlm.teachers import EncoderTeacher
from lit_vlm.training.frozen import narrow_meta
from lit_vlm.training.module import LitVLM
from lit_vlm.training.sharding import FSDP2


def states_alone(job: Job, stages: Stages) -> States:
    """What weights, gradients and optimizer take of a device, by arithmetic: no step runs, and no GPU is needed.

    Args:
        job: the stage, and the number of devices.
        stages: how its objects are built.

    Raises:
        ValueError: for a wrong flag, or data that neither are there nor have statistics.
    """
    with tempfile.TemporaryDirectory() as folder:
        cli, _ = built(launched(job), job.statistics, job.world_size, stages, folder)
    module, strategy = cli.model, cli.trainer.strategy
    model = module.model = build_on_meta(module.slots)
    module.stage.freeze(model, module.slots.removed_heads)
    quantise_slots(model, module.slots.quantize)
    if module.stage.frozen_dtype != "full":  # a GPU computes in bf16
        if isinstance(strategy, FSDP2):
            narrow_meta(model, torch.bfloat16)
        else:
            narrow_operands(model, torch.bfloat16, "the model")
    shards = number_of_shards(strategy, job.world_size)
    return states_of(list(model.parameters()), shards, averaged=module.stage.ema is not None)


def expected_states(module: LitVLM, job: Job, sharded: bool) -> States:
    """States of one device by arithmetic: sizes of all tensors, over the number of shards.

    Args:
        module: with its model.
        job: for the number of devices.
        sharded: whether the strategy shards; hybrid sharding does so inside a node.
    """
    shards = number_of_shards(module.trainer.strategy, job.world_size) if sharded else 1
    states = states_of(list(module.vlm.parameters()), shards, averaged=module.stage.ema is not None)
    # Every process has whole copies of tables and teachers.
    states.weights += sum(b.numel() * b.element_size() for b in module.vlm.buffers())
    states.weights += sum(p.numel() * p.element_size() for p in teacher_weights(module))
    return states


def number_of_shards(strategy: Any, world_size: int) -> int:
    """Number of shards that weights are cut into."""
    if not isinstance(strategy, FSDP2):
        return 1
    return world_size // (strategy.num_nodes if strategy.replicas == "nodes" else int(strategy.replicas))


def states_of(parameters: Sequence[nn.Parameter], shards: int, averaged: bool) -> States:
    """States of the first of several shards, with AdamW's two running averages.

    Args:
        parameters: of the model.
        shards: number of shards.
        averaged: whether the stage averages what trains, in fp32; counted with the optimizer.
    """
    trained = [p for p in parameters if p.requires_grad]
    size = sum(_first_shard(p, shards) for p in trained)
    average = sum(_first_shard(p, shards, torch.float32.itemsize) for p in trained) if averaged else 0
    return States(sum(_first_shard(p, shards) for p in parameters), size, 2 * size + average)


def _first_shard(parameter: nn.Parameter, shards: int, itemsize: int | None = None) -> int:
    """Bytes of the first of several shards, which are cut between rows, the first ones larger where it must be."""
    rows = parameter.shape[0] if parameter.ndim else 1
    return -(-rows // shards) * (parameter.numel() // max(1, rows)) * (itemsize or parameter.element_size())


def weights_of(module: L.LightningModule) -> Iterator[Tensor]:
    """Parameters and buffers of the model and of its teachers."""
    assert isinstance(module, LitVLM)
    yield from module.vlm.parameters()
    yield from module.vlm.buffers()
    yield from teacher_weights(module)


def teacher_weights(module: LitVLM) -> Iterator[Tensor]:
    """Parameters of the teachers that ran: each moves to the device with the first pictures."""
    for head in module.vlm.heads.values():
        if isinstance(head, Head) and isinstance(head.teacher, EncoderTeacher):
            yield from (p for p in head.teacher.encoder.parameters() if p.is_cuda)


def device_bytes(tensors: Any) -> int:
    """Bytes of a device that these tensors take, each once; of a sharded one, those of this process."""
    found: dict[int, int] = {}
    for tensor in tensors:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if local.is_cuda:
            found[id(tensor)] = local.numel() * local.element_size()
    return sum(found.values())


def whole_bytes(tensors: Any) -> int:
    """Bytes of whole tensors, over all processes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def saved_bytes(trainer: L.Trainer) -> int:
    """Bytes of a sharded checkpoint, by the metadata that saving would write, and that loading finds all it needs in.

    The plans of the other processes, which would write the other shards, are left out: sizes are of whole tensors.
    """
    strategy, module = trainer.strategy, trainer.lightning_module
    state: Any = {"state_dict": strategy.lightning_module_state_dict()}
    state["optimizer_states"] = [strategy.optimizer_state(optimizer) for optimizer in trainer.optimizers]
    if isinstance(module, LitVLM) and module.average is not None:
        module.average.record(state, dict)
    flat, _ = flatten_state_dict(state)
    _, metadata = create_default_global_save_plan([create_default_local_save_plan(flat, is_coordinator=True)])
    create_default_local_load_plan(flat, metadata)
    tensors = [one for one in metadata.state_dict_metadata.values() if isinstance(one, TensorStorageMetadata)]
    return sum(one.size.numel() * one.properties.dtype.itemsize for one in tensors)


def loading_bytes(model: nn.Module) -> int:
    """Bytes of a whole model in fp32, which the first process holds while it reads the weights."""
    return sum(4 * parameter.numel() for parameter in model.parameters())


def batch_bytes_of(batch: Batch) -> int:
    """Bytes of a batch on the host."""
    images = [batch.images, *batch.teacher_images.values()]
    ids = (batch.input_ids, batch.labels, batch.position_ids, batch.segment_ids, batch.image_positions)
    tensors = [*ids, *(one.pixels for one in images), *(one.features for one in batch.prepared.values())]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
