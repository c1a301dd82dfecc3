"""Checks of what a decoder's tokens see: what stands before them in their own sample, and where it is set their image.

Restarting positions keep the samples of a packed row apart in softmax attention. Recurrent layers and convolutions
along the row carry a state over such a border without an error. So the checks run the decoder: the gradient of a
token's states with respect to the input vector of another token is exactly zero where it does not see that token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lit_vlm.core.batch import Grid, Segments
from lit_vlm.decoders.base import Decoder
from lit_vlm.decoders.images import BIDIRECTIONAL

FIRST, LENGTH = 13, 24
"""Positions of the first sample of a packed row, and of the whole row."""
IMAGES = ((1, Grid(1, 3)), (4, Grid(1, 3, suffix=1)), (FIRST - 3, Grid(1, 3)), (FIRST, Grid(1, 3)))
"""Where a row of a check has images, one beside the other: in packed rows the last opens the second sample."""


def check_order(decoder: Decoder, packed: bool, device: torch.device) -> None:
    """Check that no token sees a later one or, in packed rows, another sample.

    A short row, or two packed ones, run forward and backward; weights and their gradients stay as they are. Under
    sharded training every rank must call this, through a method of the root of the shards.

    Args:
        decoder: with its weights, on `device`.
        packed: True checks rows of two samples, False a row of one sample.
        device: where the decoder runs.

    Raises:
        ValueError: when a token sees a later one, or in packed rows the sample in front of its own; or when a kernel of
            the decoder does not run on this device.
    """
    try:
        _check(decoder, packed, device)
    except NotImplementedError as error:  # PyTorch's, such as flex attention's backward pass on a CPU
        raise ValueError(
            f"{decoder.family} cannot be trained on the device '{device.type}': {error} Set decoder.attention to sdpa "
            "or eager, or train on another device"
        ) from error


def _check(decoder: Decoder, packed: bool, device: torch.device) -> None:
    positions, segments = _row(packed)
    if not packed:
        if _seen(decoder, [positions], (segments,), [slice(0, FIRST)], device)[0, FIRST:].any():
            raise ValueError(
                f"{decoder.family} is no causal decoder as configured: a token sees those behind it. Models such as "
                "BERT need is_decoder: true in decoder.config; otherwise take another decoder"
            )
        return
    way_out = "set data.batching to Padded or ModalityLength"
    asked = [slice(0, 0), slice(FIRST, LENGTH)]
    try:
        seen = _seen(decoder, [positions] * 2, (segments,) * 2, asked, device)
    except ValueError as error:  # transformers' layers refuse where their kernels cannot keep samples apart
        raise ValueError(f"{decoder.family} cannot be trained on packed rows here: {error} Or {way_out}") from error
    if seen[0].any() or seen[1, :FIRST].any():
        raise ValueError(
            f"{decoder.family} does not keep the samples of a packed row apart: {decoder.carried() or 'its layers'} "
            f"would hand on what stands in front of a sample; {way_out}"
        )


def check_images(decoder: Decoder, packed: bool, device: torch.device) -> None:
    """Check that with `image_attention: bidirectional` an image sees all of itself, and nothing else behind it.

    Several images stand side by side, in packed rows also where two samples meet. Runs and must be called as
    `check_order`; does nothing for a causal decoder.

    Args:
        decoder: with its weights, on `device`.
        packed: True checks rows of two samples, False rows of one sample.
        device: where the decoder runs.

    Raises:
        ValueError: when a token of an image does not see all of it, or sees a token behind it or of another sample.
    """
    if decoder.image_attention != BIDIRECTIONAL:
        return
    positions, segments = _row(packed)
    count = len(IMAGES)
    asked = [slice(start, start + 1) for start, _ in IMAGES]  # of each row another image, as there is one pass
    way_out = "set decoder.image_attention to causal, or take another decoder"
    try:
        found = _seen(decoder, [positions] * count, (segments,) * count, asked, device, images=True)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{decoder.family} takes no masks of its layers ({error}), which image_attention bidirectional needs: "
            f"{way_out}"
        ) from error
    if not found.any():  # no token sees itself: a simulated device, which computes nothing
        return
    for seen, (start, grid) in zip(found, IMAGES, strict=True):
        begin, end = FIRST if packed and start >= FIRST else 0, start + grid.picture_tokens
        if not seen[start:end].all() or seen[:begin].any() or seen[end:].any():
            raise ValueError(
                f"{decoder.family} does not let the tokens of an image see all of it, and nothing else behind them, as "
                f"image_attention bidirectional asks: {way_out}"
            )


def _row(packed: bool) -> tuple[list[int], tuple[int, ...]]:
    """Position ids of a row, and the lengths of its segments."""
    whole = list(range(LENGTH))
    return (whole[:FIRST] + whole[: LENGTH - FIRST], (FIRST, LENGTH - FIRST)) if packed else (whole, (LENGTH,))


def _seen(
    decoder: Decoder,
    positions: Sequence[Sequence[int]],
    segments: Segments,
    asked: Sequence[slice],
    device: torch.device,
    images: bool = False,
) -> Tensor:
    """Find the inputs that the states of some positions of each row depend on, in one pass.

    Args:
        decoder: the decoder.
        positions: `[b, s]`, position ids of each row.
        segments: lengths of the segments of each row.
        asked: the positions of each row whose states are looked at.
        device: where the decoder runs.
        images: whether all rows have `IMAGES`; otherwise all is text.

    Returns:
        bool `[b, s]` on the CPU, True where the gradient is not zero; a gradient of nan counts as True.
    """
    generator = torch.Generator().manual_seed(0)
    rows = torch.tensor(positions)
    visual, grids = _images(len(rows), device) if images else (None, ())
    with torch.enable_grad():
        embeds = torch.randn(*rows.shape, decoder.width, generator=generator).to(device, _dtype(decoder))
        embeds.requires_grad_()
        output = decoder(embeds, rows.to(device), visual=visual, segments=segments, grids=grids)
        hidden = torch.cat([output.hidden[row, where].float() for row, where in enumerate(asked)])
        (grad,) = torch.autograd.grad(hidden, embeds, torch.randn(hidden.shape, generator=generator).to(device))
    return (grad != 0).any(-1).cpu()


def _images(rows: int, device: torch.device) -> tuple[Tensor, tuple[Grid, ...]]:
    """Places of the tokens of `IMAGES` in so many rows, `[t]`, and their layouts."""
    places = [
        row * LENGTH + start + index
        for row in range(rows)
        for start, grid in IMAGES
        for index in range(grid.num_tokens)
    ]
    return torch.tensor(places, device=device), tuple(grid for _, grid in IMAGES) * rows


PREFIX, PADDING, ANSWER = 8, 3, 2
"""Positions of a prompt, padding among them, and positions of the text that continues it."""
SEEN = (4, Grid(1, 3))
"""Where a prompt has an image, for decoders whose images see all of themselves."""
EXACT, ROUNDED = 1e-3, 0.1
"""Bounds on the relative difference of states with and without a cache, in fp32 and in bf16; a lost state gives 1."""


def check_cache(decoder: Decoder, device: torch.device) -> None:
    """Check that a decoder gives the same states with a cache and padding on the left as for the whole text at once.

    Attention does; recurrent layers may not: some read padding, some lose their state when several tokens come at once.
    The prompt has an image where images see all of themselves.

    Args:
        decoder: with its weights, on `device`.
        device: where the decoder runs.

    Raises:
        ValueError: when the states differ or depend on padding, or the decoder cannot continue from a cache.
    """
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(1, PREFIX + ANSWER, decoder.width, generator=generator).to(device, _dtype(decoder))
    positions = (torch.arange(PREFIX + ANSWER, device=device) - PADDING).clamp(min=0)[None]
    mask = (torch.arange(PREFIX + ANSWER, device=device) >= PADDING).long()[None]
    start, grid = SEEN
    visual, grids = torch.arange(start, start + grid.num_tokens, device=device), [grid]
    if decoder.image_attention != BIDIRECTIONAL:
        visual, grids = visual[:0], []
    first, second = (embeds[:, :PREFIX], positions[:, :PREFIX]), (embeds[:, PREFIX:], positions[:, PREFIX:])
    seen: dict[str, Any] = {"attention_mask": mask[:, :PREFIX], "visual": visual, "grids": grids}
    try:
        with torch.no_grad():
            whole = decoder(embeds[:, PADDING:], positions[:, PADDING:], visual=visual - PADDING, grids=grids).hidden[
                :, -ANSWER:
            ]
            cache = decoder.new_cache()
            decoder(*first, cache=cache, **seen)
            cache = decoder.select_cache(cache, torch.zeros(1, dtype=torch.long, device=device))
            found = decoder(*second, cache=cache, attention_mask=mask).hidden
        with (
            torch.enable_grad()
        ):  # exact, where a comparison would have to allow for rounding; last, as it lets shards go
            prompt = embeds[:, :PREFIX].clone().requires_grad_()
            answer = decoder(prompt, first[1], cache=decoder.new_cache(), **seen)
            (grad,) = torch.autograd.grad(answer.hidden[:, PADDING:].float().sum(), prompt)
    except (RuntimeError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{decoder.family} cannot be asked: it does not go on from a cache ({error})") from error
    if (grad[:, :PADDING] != 0).any():
        raise ValueError(
            f"{decoder.family} cannot be asked: its layers read the padding in front of shorter prompts; "
            "take another decoder"
        )
    bound = EXACT if whole.dtype == torch.float32 and not torch.is_autocast_enabled(device.type) else ROUNDED
    if not (found - whole).float().norm() <= bound * whole.float().norm():  # nan is refused, too
        raise ValueError(
            f"{decoder.family} cannot be asked: going on from a cache it says something else than of the whole text; "
            "take another decoder"
        )


def _dtype(decoder: Decoder) -> torch.dtype:
    return next(decoder.parameters()).dtype
