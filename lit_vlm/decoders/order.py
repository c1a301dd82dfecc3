"""What a decoder's tokens see: only what stands before them, and in a packed row only their own sample.

Restarting positions keep the samples of a packed row apart in softmax attention. Recurrent layers and convolutions
along the row carry a state over such a border, and say nothing. So the decoder is asked: the gradient of a token's
states with respect to the input vector of another token is zero, exactly, where it does not see that token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lit_vlm.decoders.base import Decoder

FIRST, LENGTH = 13, 24
"""Positions of the first sample of a packed row, and of a row."""


def check_order(decoder: Decoder, packed: bool, device: torch.device) -> None:
    """Run a short row, or two packed ones, forward and backward; weights and their gradients stay as they are.

    Under sharded training every rank must call this, through a method of the root of the shards, once each time.

    Args:
        decoder: with its weights, on `device`.
        packed: look at rows of several samples, and not at a plain one.
        device: where it is run.

    Raises:
        ValueError: when a token sees a later one, or, packed, the sample in front of its own.
    """
    whole = list(range(LENGTH))
    if not packed:
        if _seen(decoder, [whole], slice(0, FIRST), device)[0, FIRST:].any():
            raise ValueError(
                f"{decoder.family} is no causal decoder as configured: a token sees those behind it. Models such as "
                "BERT need is_decoder: true in decoder.config; otherwise take another decoder"
            )
        return
    way_out = "set data.batching to Padded or ModalityLength"
    row = whole[:FIRST] + whole[: LENGTH - FIRST]
    try:
        seen = _seen(decoder, [row, row], slice(FIRST, LENGTH), device)
    except ValueError as error:  # transformers' layers refuse where their kernels cannot keep samples apart
        raise ValueError(f"{decoder.family} cannot be trained on packed rows here: {error} Or {way_out}") from error
    if seen[0].any() or seen[1, :FIRST].any():
        raise ValueError(
            f"{decoder.family} does not keep the samples of a packed row apart: {decoder.carried() or 'its layers'} "
            f"would hand on what stands in front of a sample; {way_out}"
        )


def _seen(decoder: Decoder, positions: Sequence[Sequence[int]], asked: slice, device: torch.device) -> Tensor:
    """Which inputs the states of some positions of the last row depend on: bool `[b, s]` on the CPU; nan counts."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.tensor(positions)
    with torch.enable_grad():
        embeds = torch.randn(*rows.shape, decoder.width, generator=generator).to(device, _dtype(decoder))
        embeds.requires_grad_()
        hidden = decoder(embeds, rows.to(device)).hidden[-1, asked].float()
        (grad,) = torch.autograd.grad(hidden, embeds, torch.randn(hidden.shape, generator=generator).to(device))
    return (grad != 0).any(-1).cpu()


PREFIX, PADDING, ANSWER = 8, 3, 2
"""Positions of a prompt, those of them that are padding, and of what continues it."""
EXACT, ROUNDED = 1e-3, 0.1
"""Bounds on the difference of two ways to compute states, over their size, in fp32 and in bf16; forgetting gives 1."""


def check_cache(decoder: Decoder, device: torch.device) -> None:
    """See that a decoder says the same with a cache and padding on the left as it says of the whole text at once.

    Attention does, recurrent layers need not: some read padding, some forget their state when several tokens come.

    Args:
        decoder: with its weights, on `device`.
        device: where it is run.

    Raises:
        ValueError: when it does not.
    """
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(1, PREFIX + ANSWER, decoder.width, generator=generator).to(device, _dtype(decoder))
    positions = (torch.arange(PREFIX + ANSWER, device=device) - PADDING).clamp(min=0)[None]
    mask = (torch.arange(PREFIX + ANSWER, device=device) >= PADDING).long()[None]
    try:
        with torch.no_grad():
            whole = decoder(embeds[:, PADDING:], positions[:, PADDING:]).hidden[:, -ANSWER:]
            cache = decoder.new_cache()
            decoder(embeds[:, :PREFIX], positions[:, :PREFIX], cache=cache, attention_mask=mask[:, :PREFIX])
            cache = decoder.select_cache(cache, torch.zeros(1, dtype=torch.long, device=device))
            found = decoder(embeds[:, PREFIX:], positions[:, PREFIX:], cache=cache, attention_mask=mask).hidden
        with (
            torch.enable_grad()
        ):  # exact, where a comparison would have to allow for rounding; last, as it lets shards go
            prompt = embeds[:, :PREFIX].clone().requires_grad_()
            answer = decoder(prompt, positions[:, :PREFIX], cache=decoder.new_cache(), attention_mask=mask[:, :PREFIX])
            (grad,) = torch.autograd.grad(answer.hidden[:, PADDING:].float().sum(), prompt)
    except (RuntimeError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{decoder.family} cannot be asked: it does not go on from a cache ({error})") from error
    if (grad[:, :PADDING] != 0).any():
        raise ValueError(
            f"{decoder.family} cannot be asked: its recurrent layers read the padding in front of shorter prompts; "
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
