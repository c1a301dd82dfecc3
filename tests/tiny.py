"""Tiny models with random weights, shared by the tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lit_vlm.core.batch import BadSample, Batch
from lit_vlm.data import ChatML, SquareCrop
from lit_vlm.data.feed.bins import first_fit_decreasing
from lit_vlm.data.sample.collate import collate, make_rows
from lit_vlm.data.sample.encode import Sample, SampleEncoder
from lit_vlm.data.sample.spec import InputSpec
from lit_vlm.model.build import build
from lit_vlm.model.vlm import VLM
from lit_vlm.testing.tiny import CLIP, LLAMA, tiny_decoder, tiny_slots
from lit_vlm.worlds import Shapes

PHI3 = LLAMA | {"model_type": "phi3", "pad_token_id": 0}
ROOT = Path(__file__).parent.parent
__all__ = ["CLIP", "LLAMA", "PHI3", "ROOT", "batch_of", "collate_packed", "gradients", "samples_of", "spec_of",
           "tiny_decoder", "tiny_slots", "tiny_vlm"]  # fmt: skip


def tiny_vlm(**changes: Any) -> VLM:
    """A tiny model in eval mode."""
    return build(tiny_slots(**changes)).eval()


def spec_of(model: VLM) -> InputSpec:
    """What the data side must know of a model, as `LitVLM.input_spec`."""
    return InputSpec(
        model.decoder.tokenizer,
        model.encoder.pixels,
        model.encoder.patch_grid,
        model.grid_map,
        tile_map=model.embedder.tile_map,
    )


def samples_of(model: VLM, count: int = 6, text_only: bool = True, prompt: bool = False) -> list[Sample]:
    """Encoded samples of `Shapes`; with `prompt`, without their answers."""
    source = Shapes(count, text_only=text_only)
    encode = SampleEncoder(spec_of(model), ChatML(), SquareCrop(), max_length=256, prompt=prompt)
    return [encode(source.record(index), source.image_folder) for index in range(count)]


def batch_of(model: VLM, count: int = 6, packed: bool = False, text_only: bool = True) -> Batch:
    """A batch of samples of `Shapes`, padded or packed."""
    samples = samples_of(model, count, text_only)
    return collate_packed(samples, capacity=256) if packed else collate(samples)


def collate_packed(samples: Sequence[Sample], capacity: int, bad: Sequence[BadSample] = (), pad_id: int = 0) -> Batch:
    """A batch with several samples per row of at most `capacity` positions, packed as a plan packs them."""
    rows = bins_of([len(sample) for sample in samples], capacity)
    return make_rows([[samples[i] for i in row] for row in rows], bad, pad_id)


def bins_of(
    lengths: Sequence[int], capacity: int, images: Sequence[int] | None = None, max_images: int | None = None
) -> list[list[int]]:
    """The items of each bin, as a plan packs them."""
    counts = None if images is None else np.array(images, np.int64)
    items, bins = first_fit_decreasing(np.array(lengths, np.int64), capacity, counts, max_images)
    found: list[list[int]] = [[] for _ in range(max(bins.tolist(), default=-1) + 1)]
    for item, place in zip(items.tolist(), bins.tolist(), strict=True):
        found[place].append(item)
    return found


def gradients(model: VLM) -> dict[str, torch.Tensor]:
    """All gradients of a model by parameter name."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
