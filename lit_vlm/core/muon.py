"""Muon in the number format that the device multiplies matrices in."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from lit_vlm.core.precision import emulates_bf16


class Muon(torch.optim.Muon):
    """torch's Muon with updates of the size of AdamW's, in fp32 on processors that have to emulate bf16.

    torch orthogonalises in bf16 everywhere. Where that is emulated a product takes thirty times as long, and a step of
    a small model several times as long as its forward and backward pass together. Elsewhere steps are torch's.

    Args:
        groups: parameters or groups of them, matrices only.
        lr: learning rate, on AdamW's scale (Liu et al. 2025, "Muon is Scalable for LLM Training", section 2.2).
        weight_decay: decoupled from the gradient.
    """

    def __init__(
        self, groups: Iterable[Tensor] | Iterable[dict[str, Any]], lr: float = 1e-3, weight_decay: float = 0.1
    ) -> None:
        super().__init__(groups, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; returns the loss of `closure`, if one is given."""
        matrices = [(p, group) for group in self.param_groups for p in group["params"]]
        if not any(emulates_bf16(p.device) for p, _ in matrices):
            return super().step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for matrix, group in matrices:
            if matrix.grad is not None:
                state = self.state[matrix]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(matrix.grad)
                update = direction(matrix.grad, state["momentum_buffer"], group)
                move(matrix, orthogonal(update, group), group, matrix.shape)
        return loss


def direction(grad: Tensor, momentum: Tensor, group: dict[str, Any]) -> Tensor:
    """Add a gradient to its momentum, in place; returns what is orthogonalised, in the type that this is done in."""
    momentum.lerp_(grad, 1 - group["momentum"])
    update = grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
    return update.to(torch.float32 if emulates_bf16(grad.device) else torch.bfloat16)


def move(rows: Tensor, update: Tensor, group: dict[str, Any], shape: torch.Size) -> None:
    """Take the step of some rows of a matrix of this shape, which is given their part of the orthogonalised update."""
    rows.mul_(1 - group["lr"] * group["weight_decay"])
    # The size of AdamW's updates, torch's `match_rms_adamw`.
    rows.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(shape)))


def orthogonal(matrix: Tensor, group: dict[str, Any]) -> Tensor:
    """The orthogonalised matrix `[r, c]`, in the type that `direction` gives.

    Newton–Schulz iterations in the quintic form of Jordan et al. 2024 ("Muon: An optimizer for hidden layers"), with
    the coefficients, number and epsilon of the group; in bf16 by a step of torch's Muon, without momentum, that starts
    at zero.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    found = _by_torch(wide, group) if matrix.dtype == torch.bfloat16 else _iterated(wide, group)
    return found if wide is matrix else found.T


def _by_torch(wide: Tensor, group: dict[str, Any]) -> Tensor:
    result = torch.zeros_like(wide, requires_grad=True)  # for a wide matrix torch's own scale of the step is 1
    result.grad = wide
    iterations = {key: group[key] for key in ("ns_coefficients", "eps", "ns_steps")}
    torch.optim.Muon([result], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False, **iterations).step()
    return result.detach().neg_()


def _iterated(wide: Tensor, group: dict[str, Any]) -> Tensor:
    linear, cubic, quintic = group["ns_coefficients"]
    found = wide / wide.norm().clamp(min=group["eps"])
    for _ in range(group["ns_steps"]):
        gram = found @ found.T
        found = linear * found + (cubic * gram + quintic * gram @ gram) @ found
    return found
