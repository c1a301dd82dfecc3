"""Muon and AdamW as one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Muon, Optimizer


class MuonAdamW(Optimizer):
    """Muon (orthogonalised momentum) for groups with `muon`, AdamW for the others, on the same scale of learning rates.

    A matrix's update is scaled to the size that AdamW's has (Liu et al. 2025, "Muon is Scalable for LLM Training",
    section 2.2), so one learning rate serves all groups.

    Args:
        groups: as for AdamW, each with a bool `muon`; those where it is true hold matrices only.
        betas: decay rates of AdamW's running averages.
        eps: added to AdamW's denominator.

    Raises:
        ValueError: for sharded parameters, whose matrices are not whole on any rank.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, {})
        if any(isinstance(p, DTensor) for group in self.param_groups for p in group["params"]):
            raise ValueError("model.stage.optimizer muon needs whole matrices; train with adamw, or without sharding")
        adamw = [group for group in self.param_groups if not group["muon"]]
        muon = [group for group in self.param_groups if group["muon"]]
        self._parts: list[Optimizer] = []
        if adamw:
            self._parts.append(AdamW(adamw, betas=betas, eps=eps, fused=True))
        if muon:
            self._parts.append(Muon(muon, adjust_lr_fn="match_rms_adamw"))
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
