"""Running the blocks of a transformers model: what its layers must know of packed rows, and what the graph keeps."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

Recompute = bool | Literal["offload"]
"""Whether blocks are recomputed in the backward pass; `offload` also keeps their inputs on the host until then."""


def set_recompute(model: Any, recompute: Recompute) -> None:
    """Let a transformers model recompute its blocks in the backward pass, from inputs on the device or on the host."""
    if recompute:
        # The second name is that of transformers before 5.23.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False}, offload=recompute == "offload")


def run_blocks(
    stack: Any,
    attention: str,
    embeds: Tensor,
    position_ids: Tensor,
    cache: Any,
    attention_mask: Tensor | None,
    carries: bool = False,
) -> Tensor:
    """Run a transformers model without its output layer.

    transformers keeps segments apart by itself where positions restart and no mask is given. Its flash attention does
    so for a single row only, so for it the rows are joined into one. Layers that carry a state along the row must be
    told where segments begin.

    Args:
        stack: the model.
        attention: implementation of attention.
        embeds: `[b, s, d]`.
        position_ids: `[b, s]`; where they restart a new segment begins.
        cache: keys and values while decoding.
        attention_mask: `[b, past + s]`, 0 for padding; only with a cache.
        carries: whether the model has layers that carry a state along the row.

    Returns:
        the last hidden states, `[b, s, d]`.

    Raises:
        ValueError: by transformers, where its kernels for recurrent layers cannot keep segments apart.
    """
    shape = embeds.shape
    borders = _borders(position_ids) if carries else {}
    if borders or (attention.startswith("flash") and cache is None):
        embeds, position_ids = embeds.reshape(1, -1, shape[-1]), position_ids.reshape(1, -1)
    output = stack(
        inputs_embeds=embeds,
        position_ids=position_ids,
        attention_mask=attention_mask,
        past_key_values=cache,
        use_cache=cache is not None,
        **borders,
    )
    return output.last_hidden_state.view(shape)


def _borders(position_ids: Tensor) -> dict[str, Any]:
    """Arguments that tell transformers' layers where segments begin in rows that are joined into one.

    They are empty when no row has more than one segment. The host waits for the device's positions here, which only
    happens for decoders with recurrent layers.
    """
    starts = (position_ids.flatten() == 0).nonzero().flatten().tolist()
    if len(starts) <= len(position_ids):
        return {}
    ends = torch.tensor([*starts[1:], position_ids.numel()])
    lengths = ends - torch.tensor(starts)
    number = torch.arange(len(starts), dtype=torch.int32).repeat_interleave(lengths)
    sums = torch.tensor([*starts, position_ids.numel()], dtype=torch.int32).to(position_ids.device)
    longest = int(lengths.max())
    return {
        "cu_seq_lens_q": sums,
        "cu_seq_lens_k": sums,
        "max_length_q": longest,
        "max_length_k": longest,
        "seq_idx": number[None].to(position_ids.device),
    }
