"""Tiny models with random weights, shared by the tests."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lit_vlm.core.batch import BadSample, Batch
from lit_vlm.data import ChatML, SquareCrop
from lit_vlm.data.feed.batching import first_fit_decreasing
from lit_vlm.data.sample.collate import collate, make_rows
from lit_vlm.data.sample.encode import Sample, SampleEncoder
from lit_vlm.data.sample.spec import InputSpec
from lit_vlm.decoders import HFDecoder, Lora
from lit_vlm.embedders import Splice
from lit_vlm.encoders import HFEncoder
from lit_vlm.model.build import Slots, build
from lit_vlm.model.vlm import VLM
from lit_vlm.projectors import MLP
from lit_vlm.worlds import Shapes

CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
PHI3 = LLAMA | {"model_type": "phi3", "pad_token_id": 0}
ROOT = Path(__file__).parent.parent


def tiny_slots(**changes: Any) -> Slots:
    """Factories of a tiny LLaVA; any slot may be replaced."""
    slots = {
        "encoder": partial(HFEncoder, config=CLIP),
        "projector": partial(MLP, depth=2),
        "embedder": Splice,
        "decoder": partial(HFDecoder, config=LLAMA, tokenizer="bytes"),
    }
    return Slots(**(slots | changes))


def tiny_vlm(**changes: Any) -> VLM:
    """A tiny model in eval mode."""
    return build(tiny_slots(**changes)).eval()


def tiny_decoder(lora: Lora | None = None, **changes: Any) -> partial[HFDecoder]:
    """A factory of a tiny decoder with changed settings."""
    return partial(HFDecoder, config=LLAMA | changes, tokenizer="bytes", lora=lora)


def spec_of(model: VLM) -> InputSpec:
    """What the data side must know."""
    return InputSpec(model.decoder.tokenizer, model.encoder.pixels, model.encoder.patch_grid, model.grid_map)


def samples_of(model: VLM, count: int = 6, text_only: bool = True, prompt: bool = False) -> list[Sample]:
    """Encoded drawn shapes."""
    source = Shapes(count, text_only=text_only)
    encode = SampleEncoder(spec_of(model), ChatML(), SquareCrop(), max_length=256, prompt=prompt)
    return [encode(source.record(index), source.image_folder) for index in range(count)]


def batch_of(model: VLM, count: int = 6, packed: bool = False, text_only: bool = True) -> Batch:
    """A batch of drawn shapes, padded or packed."""
    samples = samples_of(model, count, text_only)
    return collate_packed(samples, capacity=256) if packed else collate(samples)


def collate_packed(samples: Sequence[Sample], capacity: int, bad: Sequence[BadSample] = (), pad_id: int = 0) -> Batch:
    """Several samples per row of at most `capacity` positions, as a plan would pack them."""
    rows = first_fit_decreasing([len(sample) for sample in samples], capacity)
    return make_rows([[samples[i] for i in row] for row in rows], bad, pad_id)


def gradients(model: VLM) -> dict[str, torch.Tensor]:
    """All gradients by name."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
