"""Sharded training with FSDP2: which modules are gathered together, and how weights reach the shards."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, wait
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed import distributed_c10d
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lit_vlm.checkpoints.weights import RAW
from lit_vlm.core.part import Part, meta_twins
from lit_vlm.model.vlm import VLM
from lit_vlm.training.frozen import Originals, narrow_meta, pack, scatter_originals
from lit_vlm.training.saving import ASYNCHRONOUS, save_shards


class FSDP2(ModelParallelStrategy):
    """Fully sharded data parallelism over all processes; a subclass only so that the right mesh is the default.

    Lightning's own default is tensor parallelism inside a node, which shards nothing here and gives every process the
    same data.

    Args:
        replicas: groups that each hold a whole sharded copy (hybrid sharding, HSDP): parameters are gathered inside a
            group and gradients averaged between groups. 1 shards over all processes; `nodes` makes one group per node.
        save_distributed_checkpoint: whether each process writes its shard (a folder), or rank 0 one whole file.
        timeout: seconds that a process waits for the others in a collective operation before the run ends with an
            error. Reading a large model on rank 0 counts, too.

    Attributes:
        under_way: the last save of a sharded checkpoint, done when that is whole on all processes; None before.

    Raises:
        ValueError: for another value of `replicas`, or a timeout that is not positive.
    """

    under_way: Future[None] | None = None
    _savers: Any = None

    def __init__(
        self, replicas: int | str = 1, save_distributed_checkpoint: bool = True, timeout: float = 1800
    ) -> None:
        if timeout <= 0:
            raise ValueError(f"FSDP2: timeout is a positive number of seconds, not {timeout}: 1800 is half an hour")
        self.timeout, self.saves_shards = timedelta(seconds=timeout), save_distributed_checkpoint
        super().__init__(save_distributed_checkpoint=save_distributed_checkpoint, timeout=self.timeout)
        if not (replicas == "nodes" or (isinstance(replicas, int) and replicas > 0)):
            raise ValueError(f"replicas is a positive number or 'nodes', not {replicas!r}")
        self.replicas = replicas

    def setup_environment(self) -> None:
        """Start the processes with one data-parallel dimension over all of them."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        self._tensor_parallel_size = 1
        super().setup_environment()

    def shard_mesh(self) -> DeviceMesh:
        """The mesh to shard over: one dimension, or (replicate, shard) for hybrid sharding.

        Raises:
            ValueError: when the processes do not divide into `replicas` groups.
        """
        mesh = self._make_mesh()
        for group in mesh.get_all_groups():  # a mesh makes groups of its own, with the backend's own timeout
            _set_timeout(self.timeout, group)
        return mesh

    # ------------------------------------------------------------------ checkpoints

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Weights for a checkpoint; shards stay where they are, and are copied once when they are saved."""
        if not self.saves_shards:
            return super().lightning_module_state_dict()
        assert self.model is not None
        return get_model_state_dict(self.model)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """State of an optimizer for a checkpoint; as for weights."""
        if not self.saves_shards:
            return super().optimizer_state(optimizer)
        assert self.model is not None
        own = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return get_optimizer_state_dict(self.model, own)

    def for_checkpoint(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a checkpoint holds of tensors that are sharded as weights are; all processes call this.

        Returns:
            the shards; where rank 0 writes one whole file, whole tensors on the CPU.
        """
        if self.saves_shards:
            return dict(tensors)
        return {name: t.full_tensor().cpu() if isinstance(t, DTensor) else t.cpu() for name, t in tensors.items()}

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Mapping[str, bool] | None = None
    ) -> None:
        """Write a checkpoint, after the one that is under way.

        Args:
            checkpoint: all of it, by Lightning's keys.
            filepath: where; that of rank 0 counts.
            storage_options: `saving.ASYNCHRONOUS` returns when shards are copied, and `under_way` tells the end.

        Raises:
            SaveFailed: for shards that are not written asynchronously, on all processes alike.
        """
        if not self.saves_shards:
            super().save_checkpoint(checkpoint, filepath)
            return
        self.wait_for_save()
        state = {"state_dict": checkpoint.pop("state_dict")}
        optimizers = checkpoint.pop("optimizer_states", [])
        state |= {f"optimizer_{index}": optimizer for index, optimizer in enumerate(optimizers)}
        if RAW in checkpoint:
            state[RAW] = checkpoint.pop(RAW)
        if self._savers is None:
            self._savers = dist.new_group(backend="gloo", timeout=self.timeout)
        asynchronous = storage_options == ASYNCHRONOUS
        path = Path(self.broadcast(str(filepath)))
        self.under_way = save_shards(state, checkpoint, path, self._savers, asynchronous)
        if not asynchronous:
            self.under_way.result()

    def wait_for_save(self) -> None:
        """Wait until the checkpoint that is under way is written, or failed, which `under_way` tells."""
        if self.under_way is not None:
            wait([self.under_way])

    def teardown(self) -> None:
        """Wait for the checkpoint that is under way, also where an error ends the run."""
        self.wait_for_save()
        super().teardown()

    # ------------------------------------------------------------------ meshes

    def _make_mesh(self) -> DeviceMesh:
        replicas = self.num_nodes if self.replicas == "nodes" else int(self.replicas)
        if replicas == 1:
            return self.device_mesh["data_parallel"]
        if self.world_size % replicas:
            raise ValueError(f"{self.world_size} processes do not divide into {replicas} replicas")
        shape = (replicas, self.world_size // replicas)
        return init_device_mesh(self.root_device.type, shape, mesh_dim_names=("replicate", "shard"))


_set_timeout: Any = getattr(dist, "set_timeout", None) or distributed_c10d._set_pg_timeout  # older name


def shard(
    model: VLM, mesh: DeviceMesh, compute_dtype: torch.dtype | None, narrow: bool = False, fill: bool = True
) -> Originals | None:
    """Shard every block on its own and the rest with the root, then fill the shards from rank 0.

    Rank 0 holds the whole model on the CPU, the others hold parameters on the meta device.

    Args:
        model: parameters on the CPU (rank 0) or on the meta device (others).
        mesh: from `FSDP2.shard_mesh`.
        compute_dtype: type that parameters are gathered in; None keeps their own. Gradients are always reduced in fp32.
        narrow: whether shards of frozen parameters are stored in `compute_dtype`, too. It needs what `Stage.freeze`
            did.
        fill: False leaves the shards without values, where a step is only planned.

    Returns:
        own values of the frozen parameters, for checkpoints; None unless `narrow`, or without values.

    Raises:
        ValueError: where one module has a parameter under two names, of which FSDP2 would shard one.
    """
    _check_names(model)
    aliases = _aliases(model)
    # One name per module, as the function that fills the shards visits each module once.
    state = {k: v for k, v in model.state_dict().items() if k not in aliases} if fill and dist.get_rank() == 0 else {}
    meta_twins(model)
    rounded = compute_dtype if narrow else None
    names = narrow_meta(model, rounded) if rounded else {}
    if rounded:
        pack(state, names, rounded)
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    for slot, parts in model.slots().items():
        for part in parts:
            blocks = list(part.blocks())
            for block in blocks:
                fully_shard(block, mesh=mesh, mp_policy=policy)
            if blocks:
                OncePerForward(f"{slot} {type(part).__name__}", part, blocks)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for method in ("logits", "next_logits", "target_nll", "check_order", "check_images", "check_cache"):
        register_fsdp_forward_method(model, method)
    _materialise(
        model,
        torch.device(mesh.device_type, torch.cuda.current_device())
        if mesh.device_type == "cuda"
        else torch.device("cpu"),
    )
    if not fill:
        return None
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    filled = set_model_state_dict(model, dict(state), options=options)  # it puts shards into the dict
    assert aliases.issuperset(filled.missing_keys), filled.missing_keys
    return scatter_originals(model, state, names, rounded) if rounded else None


def reshard(model: VLM) -> None:
    """Free the parameters that a forward pass gathered and no backward pass freed; the root unit keeps them."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


class OncePerForward:
    """Checks that each block of a part runs exactly once in each forward pass of the part, in the order of `blocks()`.

    A block's weights are gathered when it runs, by all processes together. A process whose block runs more often than
    another's, because its pictures have more sizes, would take part in gathering another block: the backend aborts or
    waits for ever, and names neither part nor block. This check needs no communication: the first pass that breaks the
    rule raises a ValueError before the block gathers anything. Blocks that are recomputed for the backward pass run
    outside of the part's forward pass.

    Args:
        name: slot and class of the part, for the message.
        part: the part; its forward pass begins and ends the count.
        blocks: its blocks, after `fully_shard`, so that the check runs before they are gathered.
    """

    def __init__(self, name: str, part: Part, blocks: list[nn.Module]) -> None:
        self._name, self._blocks = name, blocks
        self._next: int | None = None
        part.register_forward_pre_hook(self._begin, prepend=True)
        part.register_forward_hook(self._end)
        for index, block in enumerate(blocks):
            block.register_forward_pre_hook(partial(self._run, index), prepend=True)

    def _begin(self, *_: Any) -> None:
        self._next = 0

    def _run(self, index: int, *_: Any) -> None:
        if self._next is None:
            return
        if index < self._next:
            self._refuse(f"block {index} runs again")
        if index > self._next:
            self._refuse(f"block {index} runs before block {self._next}")
        self._next += 1

    def _end(self, *_: Any) -> None:
        if self._next != len(self._blocks):
            self._refuse(f"block {self._next} does not run")
        self._next = None

    def _refuse(self, what: str) -> NoReturn:
        self._next = None
        raise ValueError(
            f"{self._name}: {what} in one forward pass ({len(self._blocks)} blocks). Under sharded training each block "
            "of blocks() must run exactly once per forward pass, in their order, whatever the batch: put pictures of "
            "all sizes through the blocks together, or do not name these blocks in blocks()"
        )


def _check_names(model: VLM) -> None:
    for prefix, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False, remove_duplicate=False))
        if again := own.keys() - dict(module.named_parameters(recurse=False)).keys():
            raise ValueError(
                f"{prefix} ({type(module).__name__}) has a parameter under two names, {min(again)} is the second, and "
                "FSDP2 shards one of them. Use one name, or put the parameter into a module that is registered twice"
            )


def _aliases(model: VLM) -> set[str]:
    """Keys of the state dict under the second and later names of a module that is registered several times."""
    first = {prefix for prefix, _ in model.named_modules()}
    return {key for key in model.state_dict() if key.rpartition(".")[0] not in first}


def _materialise(model: VLM, device: torch.device) -> None:
    """Give meta parameters memory on `device`, and move buffers there; a buffer that modules share stays one tensor.

    Buffers get the values of rank 0, as a constructor may draw one at random that no state dict holds.
    """
    places = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False)
    ]
    moved = {id(buffer): buffer.to(device).contiguous() for _, _, buffer in places}
    for buffer in moved.values():
        dist.broadcast(buffer.reshape(-1).view(torch.uint8), src=0)  # bytes, as backends do not send every type
    model.to_empty(device=device)
    for module, name, buffer in places:
        setattr(module, name, moved[id(buffer)])
