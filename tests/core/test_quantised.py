"""Frozen weights in 4 and 8 bits: what they compute, how many there are, and which are refused."""

from __future__ import annotations

import importlib.util
import re
from typing import Any, get_args

import pytest
import torch
from torch import nn

from lit_vlm.core.bits import Kind
from lit_vlm.core.flops import Weights
from lit_vlm.core.lora import Adapters, Lora
from lit_vlm.core.quantised import QuantisedLinear, Quantize, quantise, round_to
from lit_vlm.data.sample.collate import collate
from lit_vlm.model.build import build, build_on_meta
from lit_vlm.testing.tiny import samples_for
from lit_vlm.training.stage import Stage
from lit_vlm.training.step_flops import StepFlops
from tests.tiny import batch_of, tiny_slots, tiny_vlm

pytest.importorskip("torchao")
KINDS: list[Any] = list(get_args(Kind))
LORA = Adapters(decoder=Lora(rank=2))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(64, 64), (128, 64), (96, 128)])
def test_forward_and_backward_are_those_of_the_weight_that_is_stored(kind: Any, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(shape[1], shape[0])
    layer = QuantisedLinear(plain, kind)
    weight = layer.weight_of_now()
    far = (weight - plain.weight).norm() / plain.weight.norm()
    assert 0 < far < {"nf4": 0.12, "int8": 0.01, "fp8": 0.04}[kind]
    results = []
    for run in (layer, lambda x: nn.functional.linear(x, weight, plain.bias)):
        x = torch.linspace(-1, 1, 3 * shape[1]).view(3, -1).requires_grad_()
        run(x).square().sum().backward()
        results.append((run(x).detach(), x.grad))
    torch.testing.assert_close(results[0], results[1])
    with torch.autocast("cpu", torch.bfloat16):
        x = torch.ones(3, shape[1], requires_grad=True)
        y = layer(x)
    y.sum().backward()
    assert (y.dtype, x.grad.dtype if x.grad is not None else None) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize(("kind", "bits"), [("nf4", 4.2), ("int8", 8.6), ("fp8", 8.6)])
def test_a_weight_takes_its_bits_and_no_cast_changes_them(kind: Any, bits: float) -> None:
    layer = QuantisedLinear(nn.Linear(64, 128, bias=False), kind)
    assert sum(p.numel() * p.element_size() * 8 for p in layer.parameters()) / (64 * 128) < bits
    before = layer.weight_of_now()
    assert torch.equal(layer.to(torch.bfloat16).weight_of_now(), before)
    with torch.device("meta"):
        twin = QuantisedLinear(nn.Linear(64, 128, bias=False), kind)
    assert {k: (v.shape, v.dtype) for k, v in twin.state_dict().items()} == {
        k: (v.shape, v.dtype) for k, v in layer.state_dict().items()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_on_quantised_weights_is_the_one_with_rounded_weights(kind: Any) -> None:
    quantised, rounded, plain = (tiny_vlm(lora=LORA) for _ in range(3))
    for model in (quantised, rounded):
        Stage(train={"decoder": 1e-3}).freeze(model)
    quantise(quantised.decoder, kind, "decoder")
    round_to(rounded.decoder, kind, "decoder")
    assert sum(isinstance(module, QuantisedLinear) for module in quantised.modules()) == 21
    batch = batch_of(plain)
    torch.testing.assert_close(quantised.logits(batch), rounded.logits(batch))
    assert not torch.equal(rounded.logits(batch), plain.logits(batch))
    names = {name for name, _ in build_on_meta(tiny_slots(lora=LORA)).named_parameters()}
    assert {name for name, _ in rounded.named_parameters()} == names


@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_operations_are_counted_by_their_shape(kind: Any) -> None:
    slots = tiny_slots(lora=LORA)
    model = build(slots)
    stage = Stage(train={"decoder": 1e-3})
    stage.freeze(model)
    batch = collate(samples_for(model, [(28, 28)])[0])
    summary, weights = stage.summary(model), Weights.of(model.decoder.parameters())
    flops = StepFlops(model, slots, stage.losses)(batch)
    quantise(model.decoder, kind, "decoder")
    assert stage.summary(model) == summary
    assert Weights.of(model.decoder.parameters()) == weights
    assert StepFlops(model, slots, stage.losses)(batch) == flops


def test_what_cannot_be_quantised_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_vlm()
    Stage(train={"decoder": 1e-3}).freeze(model)
    with pytest.raises(
        ValueError, match=r"model.quantize.decoder: the stage trains the weights of HFDecoder.*model.lora.decoder"
    ):
        quantise(model.decoder, "int8", "decoder")
    with pytest.raises(
        ValueError, match=r"model.quantize.projector: MLP has no linear layers in blocks: set .* to null"
    ):
        quantise(model.projector, "int8", "projector")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = "model.quantize.encoder: nf4 needs the package torchao: pip install 'lit-vlm[quantized]'"
    with pytest.raises(ValueError, match=re.escape(message)):
        quantise(model.encoder, "nf4", "encoder")


def test_slots_with_a_type_are_listed() -> None:
    assert Quantize(encoder="int8", decoder="nf4").kinds() == {"encoder": "int8", "decoder": "nf4"}
