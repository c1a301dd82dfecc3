"""Sharded training with FSDP2: which units are gathered, and how weights reach the shards."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from lit_vlm.model import VLM
from lit_vlm.part import meta_twins


class FSDP2(ModelParallelStrategy):
    """Fully sharded data parallelism over all processes; a subclass only so that the right mesh is the default.

    Lightning's own default is tensor parallelism inside a node, which shards nothing here and gives every process the
    same data.

    Args:
        replicas: groups that each hold a whole sharded copy (hybrid sharding, HSDP): parameters are gathered inside a
            group and gradients averaged between groups. 1 shards over all processes; `nodes` makes one group per node.
        save_distributed_checkpoint: whether each process writes its shard (a folder), or rank 0 one whole file.
    """

    def __init__(self, replicas: int | str = 1, save_distributed_checkpoint: bool = True) -> None:
        super().__init__(save_distributed_checkpoint=save_distributed_checkpoint)
        if not (replicas == "nodes" or (isinstance(replicas, int) and replicas > 0)):
            raise ValueError(f"replicas is a positive number or 'nodes', not {replicas!r}")
        self.replicas = replicas

    def setup_environment(self) -> None:
        """Start the processes with one data-parallel dimension over all of them."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        self._tensor_parallel_size = 1
        super().setup_environment()

    def shard_mesh(self) -> DeviceMesh:
        """The mesh to shard over: one dimension, or (replicate, shard) for hybrid sharding."""
        replicas = self.num_nodes if self.replicas == "nodes" else int(self.replicas)
        if replicas == 1:
            return self.device_mesh["data_parallel"]
        if self.world_size % replicas:
            raise ValueError(f"{self.world_size} processes do not divide into {replicas} replicas")
        shape = (replicas, self.world_size // replicas)
        return init_device_mesh(self.root_device.type, shape, mesh_dim_names=("replicate", "shard"))


def shard(model: VLM, mesh: DeviceMesh, compute_dtype: torch.dtype | None) -> None:
    """Shard every block on its own and the rest with the root, then fill the shards from rank 0.

    Rank 0 holds the whole model on the CPU, the others hold parameters on the meta device.

    Args:
        model: with all parameters where the paragraph above says.
        mesh: from `FSDP2.shard_mesh`.
        compute_dtype: what parameters are gathered in; gradients are always reduced in fp32. Null: their own.
    """
    first = dist.get_rank() == 0
    state: dict[str, Any] = model.state_dict() if first else {}
    meta_twins(model)
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    for parts in model.slots().values():
        for part in parts:
            for block in part.blocks():
                fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for method in ("logits", "next_logits", "target_nll", "check_order", "check_cache"):
        register_fsdp_forward_method(model, method)
    _materialise(
        model,
        torch.device(mesh.device_type, torch.cuda.current_device())
        if mesh.device_type == "cuda"
        else torch.device("cpu"),
    )
    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))


def reshard(model: VLM) -> None:
    """Let go of what a forward pass without a backward has gathered: the root of the shards keeps it otherwise."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _materialise(model: VLM, device: torch.device) -> None:
    """Give meta parameters memory on `device`; buffers keep their values, which `to_empty` would lose."""
    buffers = {name: buffer.to(device) for name, buffer in model.named_buffers()}
    model.to_empty(device=device)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
