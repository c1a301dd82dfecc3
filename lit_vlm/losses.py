"""Losses: next-token cross-entropy over supervised positions only, and distances for distillation.

Every loss is returned as a *sum*. The LightningModule divides it by a count over the whole global batch (all ranks and
all accumulated micro-batches), so that data parallelism and gradient accumulation do not change the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Head = Callable[[Tensor], Tensor]
CHUNK_BYTES = 128 * 2**20


def chunk_rows(vocab_size: int) -> int:
    """Rows of fp32 logits that fill about 128 MiB."""
    return max(64, CHUNK_BYTES // (4 * vocab_size))


def token_nll(hidden: Tensor, targets: Tensor, head: Head, chunk: int) -> Tensor:
    """Negative log-likelihood of each target, in nats, without a graph.

    Args:
        hidden: `[k, d]`.
        targets: `[k]`.
        head: `[m, d]` → logits `[m, v]`.
        chunk: rows whose logits are alive at one time.

    Returns:
        fp32 `[k]`.
    """
    with torch.no_grad():
        parts = [
            F.cross_entropy(head(rows).float(), ids, reduction="none")
            for rows, ids in zip(hidden.split(chunk), targets.split(chunk), strict=True)
        ]
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)


def next_token_loss(hidden: Tensor, targets: Tensor, head: Head, params: Sequence[Tensor], chunk: int) -> Tensor:
    """Sum of the cross-entropy over k supervised positions; at most `chunk` rows of logits are alive at one time.

    The gradient of each chunk is taken right after its forward, while its logits exist, so logits are computed once and
    never stored: memory is O(chunk · v) instead of O(k · v), at the price of three matrix products, as without chunks.

    Args:
        hidden: `[k, d]`, states of the positions whose next token is supervised.
        targets: `[k]`.
        head: `[m, d]` → logits `[m, v]`.
        params: the trainable parameters that `head` uses.
        chunk: rows per chunk.

    Returns:
        fp32 scalar, in nats.
    """
    if not torch.is_grad_enabled() or not (hidden.requires_grad or params):
        return token_nll(hidden, targets, head, chunk).sum()
    return _ChunkedCrossEntropy.apply(hidden, targets, head, chunk, *params)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: Head, chunk: int, *params: Tensor) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden)
        grads: list[Tensor] = []
        # An empty batch still takes one pass, so that every parameter has a gradient.
        for start in range(0, max(1, hidden.shape[0]), chunk):
            rows = hidden[start : start + chunk].detach().requires_grad_()
            with torch.enable_grad():
                loss = F.cross_entropy(head(rows).float(), targets[start : start + chunk], reduction="sum")
            grad_rows, *parts = torch.autograd.grad(loss, (rows, *params))
            grad_hidden[start : start + chunk] = grad_rows
            if start == 0:
                # Low-precision parameters gather their gradient in fp32: many small chunks would round away.
                grads = [part.float() for part in parts]
            else:
                for grad, part in zip(grads, parts, strict=True):
                    grad += part
            total += loss.detach()
        ctx.save_for_backward(grad_hidden, *(g.to(p.dtype) for g, p in zip(grads, params, strict=True)))
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = grad_outputs
        # In place, as the gradient of a word table is large; a second backward through it is refused by autograd.
        grad_hidden, *grads = (saved.mul_(scale.to(saved.dtype)) for saved in ctx.saved_tensors)
        return grad_hidden, None, None, None, *grads


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """1 − cosine of each row, in fp32: `[t, d]`, `[t, d]` → `[t]`."""
    return 1.0 - F.cosine_similarity(student.float(), teacher.float(), dim=-1)


def smooth_l1_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Smooth L1 (β 1), averaged over channels, in fp32: `[t, d]`, `[t, d]` → `[t]`."""
    return F.smooth_l1_loss(student.float(), teacher.float(), reduction="none").mean(dim=-1)
