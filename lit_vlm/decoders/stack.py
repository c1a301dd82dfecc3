"""Running the blocks of a transformers model: what its layers must know of packed rows, and what the graph keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lit_vlm.core.batch import Segments
from lit_vlm.core.transfer import send
from lit_vlm.decoders.packing import telling

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
    attention_mask: Tensor | dict[str, Tensor] | None,
    segments: Segments | None = None,
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
        attention_mask: `[b, past + s]`, 0 for padding, only with a cache; or whole masks, as `masks_of_layers` makes
            them.
        segments: lengths of the segments that the positions make, as in `Batch.segments`; None if they are not known,
            or there is a cache. The host waits for the device's positions then, wherever something depends on them.
        carries: whether the model has layers that carry a state along the row.

    Returns:
        the last hidden states, `[b, s, d]`.

    Raises:
        ValueError: by transformers, where its kernels for recurrent layers cannot keep segments apart.
    """
    shape = embeds.shape
    flash = attention.startswith("flash") and cache is None
    rows = _read_segments(position_ids) if carries and segments is None else segments
    borders: dict[str, Any] = {}
    if rows is not None and (flash or (carries and any(len(row) > 1 for row in rows))):
        borders = _borders([length for row in rows for length in row], embeds.device, carries)
    if borders or flash:
        embeds, position_ids = embeds.reshape(1, -1, shape[-1]), position_ids.reshape(1, -1)
        segments = None if segments is None else (tuple(length for row in segments for length in row),)
    with telling(segments, stack):
        output = stack(
            inputs_embeds=embeds,
            position_ids=position_ids,
            attention_mask=attention_mask,
            past_key_values=cache,
            use_cache=cache is not None,
            **borders,
        )
    return output.last_hidden_state.view(shape)


def _read_segments(position_ids: Tensor) -> Segments:
    """Lengths of the segments of each row, where positions restart; the host waits for the device here."""
    rows = []
    for positions in position_ids.tolist():
        starts = [index for index, position in enumerate(positions) if index == 0 or position == 0]
        ends = [*starts[1:], len(positions)]
        rows.append(tuple(end - start for start, end in zip(starts, ends, strict=True)))
    return tuple(rows)


def _borders(lengths: Sequence[int], device: torch.device, carries: bool) -> dict[str, Any]:
    """Arguments that tell transformers' layers where segments begin in rows that are joined into one.

    Args:
        lengths: those of the segments, in order.
        device: where the model runs.
        carries: whether the model has layers that carry a state along the row.
    """
    own = torch.tensor(lengths)
    sums = send(torch.nn.functional.pad(own.cumsum(0), (1, 0)).int(), device)
    borders = {"cu_seq_lens_q": sums, "cu_seq_lens_k": sums, "max_length_q": max(lengths), "max_length_k": max(lengths)}
    if carries:
        number = torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(own)
        borders["seq_idx"] = send(number[None], device)
    return borders
