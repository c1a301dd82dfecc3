"""Losses: next-token cross-entropy over supervised positions only, and distances for distillation.

Every loss is returned as a *sum*. The LightningModule divides it by a count over the whole global batch (all ranks and
all accumulated micro-batches), so that data parallelism and gradient accumulation do not change the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

Head = Callable[[Tensor], Tensor]
MOST_SCALE = 100.0
"""Largest factor on the cosines in a contrastive loss: the smallest temperature is a hundredth, as in CLIP."""
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CHUNK_BYTES = 128 * 2**20


def chunk_rows(vocab_size: int) -> int:
    """Rows of fp32 logits that fill about 128 MiB."""
    return max(64, CHUNK_BYTES // (4 * vocab_size))


def token_nll(hidden: Tensor, targets: Tensor, head: Head, chunk: int) -> Tensor:
    """Negative log-likelihood of each target, in nats, without a graph.

    Args:
        hidden: `[k, d]`, states of the positions whose next token is supervised.
        targets: `[k]`, ids of those next tokens.
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
        targets: `[k]`, ids of those next tokens.
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


def contrastive_loss(predictions: Tensor, targets: Tensor, log_scale: Tensor) -> Tensor:
    """InfoNCE: each prediction must pick its own image's target among those of all images of all ranks (OLA-VLM).

    Only predictions choose among targets, not the reverse. The q features of an image are flattened to one vector, in
    predictions and targets alike. Targets of the other ranks are in memory one rank at a time, and none is kept for the
    backward pass: memory does not grow with the number of ranks. Ranks may have different numbers of images, also none;
    all of them must call it.

    Args:
        predictions: `[layers, n, q, w]`: q features of width w for each of n images.
        targets: `[n, q, w]`, without a graph.
        log_scale: one number: logarithm of the factor on the cosines. Factors above 100 count as 100.

    Returns:
        cross-entropy of each prediction, in nats: fp32 `[layers · n]`.
    """
    scale = log_scale.float().exp().clamp(max=MOST_SCALE).reshape(())
    unit = F.normalize(predictions.flatten(2), dim=-1).flatten(0, 1)
    own = F.normalize(targets.to(unit.dtype).flatten(1), dim=-1)
    loss: Tensor = _GatheredInfoNCE.apply(unit, own, scale)
    return loss


class _GatheredInfoNCE(torch.autograd.Function):
    """Cross-entropy over targets that arrive one rank after the other; its gradient is summed up on the way."""

    @staticmethod
    def forward(ctx: Any, predictions: Tensor, targets: Tensor, scale: Tensor) -> Tensor:
        with torch.autocast(predictions.device.type, enabled=False):
            p = predictions.float()
            most = p.new_full((len(p),), -torch.inf)
            total, weighted, mean = torch.zeros_like(most), torch.zeros_like(most), torch.zeros_like(p)
            for shard in _of_each_rank(targets):
                others = shard.float()
                z = scale * (p @ others.T)
                highest = torch.maximum(most, z.amax(1))
                kept, shares = (most - highest).exp(), (z - highest[:, None]).exp()
                most, total = highest, total * kept + shares.sum(1)
                weighted = weighted * kept + (shares * z).sum(1)
                if any(ctx.needs_input_grad):
                    mean = mean.mul_(kept[:, None]).addmm_(shares, others)
            own = targets.float().repeat(len(p) // max(1, len(targets)), 1)
            positive = scale * (p * own).sum(1)
            if any(ctx.needs_input_grad):
                grad = (mean.div_(total[:, None]) - own).mul_(scale).to(predictions.dtype)
                ctx.save_for_backward(grad, (weighted / total - positive) / scale)
            return most + total.log() - positive

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, Tensor]:
        (upstream,) = grad_outputs
        grad, of_scale = ctx.saved_tensors
        return upstream[:, None].to(grad.dtype) * grad, None, (upstream * of_scale).sum()


def _of_each_rank(own: Tensor) -> Iterator[Tensor]:
    """Yield the rows `[n, f]` of each rank that has any, in the order of ranks; n may differ between ranks."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        yield from [own] if len(own) else []
        return
    # Counts travel with dtypes: a rank without images makes its empty rows from decoder states, whose dtype may differ
    # from that of predictions.
    sent = torch.zeros(dist.get_world_size(), 2, dtype=torch.long, device=own.device)
    sent[dist.get_rank(), 0], sent[dist.get_rank(), 1] = len(own), FLOATS.index(own.dtype)
    dist.all_reduce(sent)
    for rank, (count, kind) in enumerate(sent.tolist()):
        if count:
            mine = rank == dist.get_rank()
            rows = own.contiguous() if mine else own.new_empty(count, own.shape[1], dtype=FLOATS[kind])
            dist.broadcast(rows, src=rank)
            yield rows
