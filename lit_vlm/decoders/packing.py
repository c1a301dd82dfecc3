"""What the host knows of a batch's rows, told to transformers, which otherwise asks the device and waits for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import masking_utils

from lit_vlm.core.batch import Segments

ASKS = "find_packed_sequence_indices"


@contextmanager
def telling(segments: Segments | None, model: nn.Module) -> Iterator[None]:
    """A context in which a model of transformers does not read positions to learn what is known of them.

    It asks whether rows are packed, and, where rotary frequencies grow with the text (`rope_type: dynamic`), how long
    the text is. It has no argument for the answers, so the function that asks the first is replaced while the model
    runs, and frequencies that need not grow are called fixed. Results stay the same. A version of transformers that
    lacks these names goes on asking.

    Args:
        segments: lengths of the segments of each row; None lets transformers ask.
        model: the model that runs.
    """
    with ExitStack() as stack:
        if segments is not None:
            packed = any(len(row) > 1 for row in segments)
            _set(stack, masking_utils, ASKS, _numbers if packed else _no_numbers)
            longest = max(length for row in segments for length in row)
            for child in model.children():
                if _stays(child, longest):
                    _set(stack, child, "rope_type", "default")
        yield


def _set(stack: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Set an attribute that exists, until the context ends."""
    if hasattr(owner, name):
        stack.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, value)


def _numbers(position_ids: Tensor) -> Tensor:
    """The number of each position's segment in its row, from 0: `[b, s]` → `[b, s]`."""
    borders = position_ids[:, 1:] != position_ids[:, :-1] + 1
    return torch.nn.functional.pad(borders, (1, 0)).cumsum(-1)


def _no_numbers(position_ids: Tensor) -> None:
    """Say that no row has more than one segment."""


def _stays(module: nn.Module, longest: int) -> bool:
    """Whether a module computes rotary frequencies that could grow, but never have and need not for this length."""
    trained, cached = getattr(module, "original_max_seq_len", None), getattr(module, "max_seq_len_cached", None)
    # After growing, `max_seq_len_cached` is a tensor on the device.
    known = isinstance(trained, int) and isinstance(cached, int) and longest <= trained == cached
    return known and getattr(module, "rope_type", None) == "dynamic"
