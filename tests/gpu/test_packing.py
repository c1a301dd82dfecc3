"""Packed rows give the losses and gradients of the samples alone, with each implementation of attention."""

from __future__ import annotations

import importlib.util
from functools import partial

import pytest
import torch
from torch import Tensor

from lit_vlm.core.batch import Batch
from lit_vlm.data.sample.collate import collate
from lit_vlm.decoders import HFDecoder
from lit_vlm.model.vlm import VLM
from tests.gpu.systems import error, errors, needs_values
from tests.tiny import LLAMA, collate_packed, gradients, samples_of, tiny_vlm

WIDER = LLAMA | {"hidden_size": 128}  # flash attention wants heads of 32
flash = pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="flash-attn is not installed")


@pytest.mark.parametrize(
    ("attention", "dtype", "bound"),
    [
        ("sdpa", torch.float32, 1e-4),
        ("sdpa", torch.bfloat16, 0.03),
        ("flex_attention", torch.float32, 1e-3),
        pytest.param("flash_attention_2", torch.bfloat16, 0.03, marks=flash),
    ],
)
def test_packed_rows_equal_samples_alone(attention: str, dtype: torch.dtype, bound: float) -> None:
    if attention == "flex_attention":
        needs_values()  # its kernels are compiled for a device that is there
    decoder = partial(HFDecoder, config=WIDER, tokenizer="bytes", attention=attention)
    model = tiny_vlm(decoder=decoder).to("cuda").train()
    samples = samples_of(model, 6)
    packed, alone = collate_packed(samples, capacity=256), collate(samples)
    assert len(packed.input_ids) < len(alone.input_ids)

    def step(batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad(set_to_none=True)
        loss = _loss(model, batch.to("cuda"), dtype)
        loss.backward()
        return loss.detach().float().cpu(), {name: g.float().cpu() for name, g in gradients(model).items()}

    (loss, found), (expected_loss, expected) = step(packed), step(alone)
    assert found.keys() == expected.keys()
    needs_values()
    assert error(loss, expected_loss) < bound
    assert {name: value for name, value in errors(found, expected).items() if value > bound} == {}


def _loss(model: VLM, batch: Batch, dtype: torch.dtype) -> Tensor:
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        return model(batch, {"next_token": 1.0})["next_token"]
