"""What the tokens of an image see where they see all of it, not only what stands before them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lit_vlm.core.batch import Grid
from lit_vlm.core.transfer import send

ImageAttention = Literal["causal", "bidirectional"]
CAUSAL, BIDIRECTIONAL = "causal", "bidirectional"
MASKED = ("sdpa", "eager")
"""Implementations of attention that take any mask."""
FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
"""transformers' names of the types of layers whose masks are known here."""


def check_whole_images(config: Any, attention: str, carried: str | None) -> None:
    """Refuse what cannot let the tokens of an image see each other.

    Args:
        config: transformers' configuration of the decoder.
        attention: implementation of attention.
        carried: the layers that carry a state along the row, in words, as `Decoder.carried`.

    Raises:
        ValueError: for an attention without masks, recurrent layers, or layers of another type; names the way out.
    """
    setting = "model.decoder.init_args.image_attention"
    if attention not in MASKED:
        raise ValueError(
            f"{setting} is bidirectional, and attention {attention} takes no mask for that: set "
            f"model.decoder.init_args.attention to {' or '.join(MASKED)}, or image_attention to causal"
        )
    other = sorted(set(_kinds(config)) - {FULL, SLIDING, CHUNKED})
    if carried is not None or other:
        what = carried or f"layers of type {', '.join(other)}"
        raise ValueError(
            f"{setting} is bidirectional, and a '{config.model_type}' has {what}, where tokens see in one direction "
            "only: set it to causal, or take a decoder with attention alone"
        )


def image_masks(
    position_ids: Tensor,
    attention_mask: Tensor | None,
    visual: Tensor,
    grids: Sequence[Grid] | None,
    config: Any,
    added_to: torch.dtype | None,
) -> Tensor | dict[str, Tensor]:
    """Masks that let each image see all of itself, for rows that begin here.

    Args:
        position_ids: `[b, s]`, restarting in each segment.
        attention_mask: `[b, s]`, 0 for padding; None without a cache.
        visual: `[t]`, index into b·s of the image tokens.
        grids: layout of each image's tokens.
        config: configuration of the model.
        added_to: as for `masks_of_layers`.

    Raises:
        ValueError: without grids that fit, or for images behind what a cache holds already.
    """
    setting = "decoder.image_attention is bidirectional"
    if grids is None or sum(grid.num_tokens for grid in grids) != len(visual):
        raise ValueError(f"{setting}: give the decoder the images' grids, which say where each of them ends")
    if attention_mask is not None and attention_mask.shape[1] != position_ids.shape[1]:
        raise ValueError(f"{setting}: images must come with the first positions that a cache gets")
    seen = see_whole_images(position_ids, visual, grids, attention_mask)
    return masks_of_layers(seen, position_ids, config, added_to)


def see_whole_images(
    position_ids: Tensor, image_positions: Tensor, grids: Sequence[Grid], mask: Tensor | None
) -> Tensor:
    """Attention mask that is causal but lets the tokens of an image see the whole image.

    An image's class token, patches and row ends are its tokens. Its suffix, such as task tokens, is not: those are
    tokens of the model's own, which see the image and one another in order.

    Args:
        position_ids: `[b, l]`, restarting in each segment.
        image_positions: `[t]`, index into b·l of each image's tokens, in order.
        grids: layout of each image's tokens.
        mask: `[b, l]`, 0 for padding; None without a cache, where `position_ids` keep segments and padding apart.

    Returns:
        bool `[b, 1, l, l]`, True where the position of the third dimension sees that of the fourth.
    """
    device = position_ids.device
    of_images = [(index, grid.picture_tokens, grid.suffix) for index, grid in enumerate(grids, 1)]
    numbers, lengths, suffixes = torch.tensor(of_images, dtype=torch.long).reshape(-1, 3).unbind(1)
    own = torch.stack([numbers, torch.zeros_like(numbers)], 1).flatten()
    number = own.repeat_interleave(torch.stack([lengths, suffixes], 1).flatten())
    flat = torch.zeros_like(position_ids).flatten()
    image = flat.index_copy(0, image_positions, send(number, device)).view_as(position_ids)
    segment = (position_ids == 0).cumsum(1)
    order = torch.arange(position_ids.shape[1], device=device)
    seen = (order[:, None] >= order) & (segment[:, :, None] == segment[:, None])
    seen = seen | ((image[:, :, None] == image[:, None]) & (image > 0)[:, None])
    if mask is not None:
        seen = seen & (mask[:, None] > 0) | (order[:, None] == order)
    return seen[:, None]


def masks_of_layers(
    seen: Tensor, position_ids: Tensor, config: Any, added_to: torch.dtype | None
) -> Tensor | dict[str, Tensor]:
    """The mask of each type of layers, as transformers' models take them.

    A window or a chunk limits what is seen of an image, too: a token of a layer with windows sees no token that stands
    further before it, but all of its image behind it, as in Gemma 3 (arXiv 2503.19786).

    Args:
        seen: bool `[b, 1, l, l]` of `see_whole_images`.
        position_ids: `[b, l]`, restarting in each segment.
        config: configuration of the model.
        added_to: type of the scores that the mask is added to; None: it stays bool.

    Returns:
        one mask `[b, 1, l, l]`, or where the model has layers of several types, type → mask.
    """
    kinds = dict.fromkeys(_kinds(config))
    masks = {kind: _added(_limited(seen, position_ids, kind, config), added_to) for kind in kinds}
    return masks if len(masks) > 1 else next(iter(masks.values()))


def _kinds(config: Any) -> Sequence[str]:
    """Types of the layers."""
    if kinds := getattr(config, "layer_types", None):
        return list(kinds)
    if getattr(config, "sliding_window", None):
        return [SLIDING]
    return [CHUNKED] if getattr(config, "attention_chunk_size", None) else [FULL]


def _limited(seen: Tensor, position_ids: Tensor, kind: str, config: Any) -> Tensor:
    if kind == SLIDING:
        order = torch.arange(seen.shape[-1], device=seen.device)
        return seen & (order > order[:, None] - config.sliding_window)
    if kind == CHUNKED:
        chunk = position_ids // config.attention_chunk_size
        return seen & (chunk[:, :, None] == chunk[:, None])[:, None]
    return seen


def _added(seen: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A bool mask as what is added to scores: 0 where something is seen, the smallest number where nothing is."""
    if dtype is None:
        return seen
    return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
