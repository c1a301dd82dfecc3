"""Recomputed blocks give the numbers of kept ones, and the graph keeps what the setting says."""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_vlm.core.part import Part
from lit_vlm.data.sample.collate import collate
from lit_vlm.decoders import DivideAndConquer, HFDecoder
from lit_vlm.embedders import Holistic
from lit_vlm.encoders import ConvPatches
from lit_vlm.model.build import build
from lit_vlm.model.vlm import VLM
from lit_vlm.projectors import Linear
from lit_vlm.testing import Case
from lit_vlm.testing.sharded import ready
from lit_vlm.testing.tiny import samples_for, tiny_slots
from tests.members import LAYERS
from tests.tiny import LLAMA, gradients

DECODERS = {
    "HFDecoder": partial(HFDecoder, config=LLAMA, tokenizer="bytes"),
    "DivideAndConquer": partial(DivideAndConquer, config=LLAMA, tokenizer="bytes"),
}


def made(name: str, recompute: bool | str) -> tuple[VLM, Part]:
    """A tiny model in training whose part `name` has this setting, and the part."""
    if name == "Holistic":
        case = Case(
            {
                "encoder": partial(ConvPatches, 32, 28, 7),
                "projector": Linear,
                "embedder": partial(Holistic, merge=2, recompute=recompute, **LAYERS),
            }
        )
    else:
        case = Case({"decoder": partial(DECODERS[name], recompute=recompute)})
    model = ready(build(tiny_slots(**case.slots)), case)
    return model, model.embedder if name == "Holistic" else model.decoder


def kept_inputs(part: Part, model: VLM) -> tuple[list[bool], Tensor, dict[str, Tensor]]:
    """For each block but the first whether its input is still there after the forward pass; the loss, the gradients."""
    seen: list[weakref.ref[Tensor]] = []

    def look(_block: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(weakref.ref(args[0]))

    handles = [block.register_forward_pre_hook(look) for block in list(part.blocks())[1:]]
    with_picture, text = samples_for(model, [(28, 28)] * 2)
    loss = model(collate([*with_picture, *text]), {"next_token": 1.0})["next_token"]
    kept = [one() is not None for one in seen]
    for handle in handles:
        handle.remove()
    loss.backward()
    return kept, loss.detach(), gradients(model)


@pytest.mark.parametrize("name", [*DECODERS, "Holistic"])
def test_offloaded_inputs_are_not_kept_and_change_no_bit(name: str) -> None:
    results = {}
    for recompute in (True, "offload"):
        torch.manual_seed(0)
        model, part = made(name, recompute)
        results[recompute] = kept_inputs(part, model)
    assert all(results[True][0])
    assert results["offload"][0]
    assert not any(results["offload"][0])
    torch.testing.assert_close(results["offload"][1:], results[True][1:], rtol=0, atol=0)
