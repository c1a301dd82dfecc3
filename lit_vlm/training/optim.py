"""Muon and AdamW as one optimizer, and Muon for sharded matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.optim import AdamW, Optimizer

from lit_vlm.core.muon import Muon, direction, move, orthogonal


def group_of(members: Sequence[Tensor], slot: str, lr: float, scale: float, decay: float) -> dict[str, Any]:
    """A group of an optimizer.

    Args:
        members: its parameters.
        slot: their slot.
        lr: the slot's learning rate.
        scale: factor of the rate of these members. The group has it where it is not 1, so that checkpoints from before
            there were factors still fit.
        decay: weight decay.
    """
    group = {"params": members, "lr": lr * scale, "weight_decay": decay, "slot": slot}
    return group if scale == 1 else group | {"scale": scale}


def learning_rates(optimizer: Optimizer) -> dict[str, float]:
    """The learning rate of each slot now: with `layer_decay` the one that falls off towards its beginning."""
    return {group["slot"]: group["lr"] / group.get("scale", 1.0) for group in optimizer.param_groups}


def split_for_muon(groups: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Split each group: matrices, word tables among them, get `muon` true, and all other parameters false."""
    for group in groups:
        for muon in (True, False):
            members = [p for p in group["params"] if (p.ndim == 2) == muon]
            if members:
                yield group | {"params": members, "muon": muon}


class MuonAdamW(Optimizer):
    """Muon (orthogonalised momentum) for groups with `muon`, AdamW for the others, on the same scale of learning rates.

    A matrix's update is scaled to the size that AdamW's has (Liu et al. 2025, "Muon is Scalable for LLM Training",
    section 2.2), so one learning rate serves all groups.

    Args:
        groups: as for AdamW, each with a bool `muon`; those where it is true hold matrices only.
        betas: decay rates of AdamW's running averages.
        eps: added to AdamW's denominator.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, {})
        adamw = [group for group in self.param_groups if not group["muon"]]
        muon = [group for group in self.param_groups if group["muon"]]
        self._parts: list[Optimizer] = []
        if adamw:
            self._parts.append(AdamW(adamw, betas=betas, eps=eps, fused=True))
        if muon:
            sharded = any(isinstance(p, DTensor) for group in muon for p in group["params"])
            self._parts.append((ShardedMuon if sharded else Muon)(muon))
        self._share()

    def _share(self) -> None:
        """Let both optimizers use this one's groups and state, so that schedules and checkpoints see only one."""
        for part in self._parts:
            is_muon = isinstance(part, Muon)
            part.param_groups = [group for group in self.param_groups if group["muon"] == is_muon]
            part.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of both optimizers; returns the loss of `closure`, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            part.step()
        return loss


class ShardedMuon(Muon):
    """Muon for matrices whose rows FSDP2 has sharded: the same numbers, bit for bit, from the same gradients.

    Newton–Schulz iterations need whole matrices, and cost more than a training step when every process repeats them
    for all. So matrices are taken in rounds of as many as a shard group has processes, largest first: in a round each
    process is sent the rows of one matrix, orthogonalises it, and sends the rows of the result back. A round holds
    twice one matrix, in bf16 where the device has it. Momentum stays sharded. With hybrid sharding, each of the
    replicas does this by itself.

    All matrices are sharded by rows over the same mesh, and all processes have gradients for the same ones.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step; takes no closure."""
        assert closure is None
        matrices = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not matrices:
            return
        # The order is that of shapes and groups, alike on all processes.
        matrices.sort(key=lambda pair: (pair[0].numel(), pair[0].shape), reverse=True)
        mesh, placements = matrices[0][0].device_mesh, matrices[0][0].placements
        shards = mesh.get_group(placements.index(Shard(0)))
        for start in range(0, len(matrices), shards.size()):
            self._round(matrices[start : start + shards.size()], shards)

    def _round(self, members: list[tuple[DTensor, dict[str, Any]]], shards: dist.ProcessGroup) -> None:
        """Step of at most one matrix per process of a shard group."""
        own = [self._direction(matrix, group) for matrix, group in members]
        sent = [part.numel() for part in own] + [0] * (shards.size() - len(own))
        received = [0] * shards.size()
        if shards.rank() < len(members):
            height, width = members[shards.rank()][0].shape
            received = [rows * width for rows in _rows(height, shards.size())]
        whole = own[0].new_empty(sum(received))
        dist.all_to_all_single(whole, torch.cat([part.flatten() for part in own]), received, sent, group=shards)
        if shards.rank() < len(members):
            whole = orthogonal(whole.view(height, width), members[shards.rank()][1]).flatten()
        result = whole.new_empty(sum(sent))
        dist.all_to_all_single(result, whole, sent, received, group=shards)
        for (matrix, group), part in zip(members, result.split(sent[: len(members)]), strict=True):
            local = matrix.to_local()
            move(local, part.view_as(local), group, matrix.shape)

    def _direction(self, matrix: DTensor, group: dict[str, Any]) -> Tensor:
        """Add the own rows of a matrix's gradient to their momentum; returns what is orthogonalised."""
        assert isinstance(matrix.grad, DTensor)
        state = self.state[matrix]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(matrix.grad)
        return direction(matrix.grad.to_local(), state["momentum_buffer"].to_local(), group)


def _rows(height: int, count: int) -> list[int]:
    """Number of rows in each of `count` shards of a matrix; those at the end may be smaller, or empty."""
    full = -(-height // count)
    return [max(0, min(full, height - index * full)) for index in range(count)]
