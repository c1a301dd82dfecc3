"""Adapters: where they go, and which saved ones fit."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_vlm.checkpoints.weights import by_slot
from lit_vlm.core.batch import VisualTokens
from lit_vlm.core.lora import Adapters, Lora, effective_weight, is_adapter, linear_layers, merge_adapters, split_state
from lit_vlm.core.part import StateDict
from lit_vlm.decoders import DivideAndConquer, HFDecoder
from lit_vlm.embedders import Holistic
from lit_vlm.model.build import build, build_on_meta, check_saved
from lit_vlm.model.vlm import VLM
from lit_vlm.projectors import MLP, Projector
from lit_vlm.training.stage import Stage
from tests.members import LAYERS, Tangled
from tests.tiny import LLAMA, batch_of, tiny_decoder, tiny_slots, tiny_vlm

TWO = Lora(rank=2, alpha=4.0)
GPT2 = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 2}
HOLISTIC: dict[str, Any] = {"embedder": partial(Holistic, **LAYERS)}


def adapted(model: VLM, slot: str) -> set[str]:
    """Names of the layers of a slot that have adapters."""
    names = (name for name, _ in model.slots()[slot][0].named_parameters())
    return {name.removesuffix(".lora_A.default.weight") for name in names if ".lora_A." in name}


def moved(model: VLM) -> VLM:
    """The model with adapters that change something."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                parameter.copy_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(
    ("targets", "number"),
    [(None, 21), (("q_proj",), 3), (("self_attn",), 12), (("self_attn.q_proj", "lm_head"), 4), (("mlp", "up_proj"), 9)],
)
def test_targets_name_layers_or_what_holds_them(targets: tuple[str, ...] | None, number: int) -> None:
    model = tiny_vlm(lora=Adapters(decoder=Lora(rank=2, targets=targets)))
    assert len(adapted(model, "decoder")) == number


def test_layers_in_the_form_of_gpt_2_are_adapted_and_merged() -> None:
    decoder = partial(HFDecoder, config=GPT2, tokenizer="bytes")
    model = moved(tiny_vlm(decoder=decoder, lora=Adapters(decoder=TWO)))
    assert {name.rpartition(".")[2] for name in adapted(model, "decoder")} == {"c_attn", "c_proj", "c_fc"}
    batch = batch_of(model)
    before = model.logits(batch)
    merge_adapters(model)
    torch.testing.assert_close(model.logits(batch), before, atol=1e-4, rtol=1e-4)


def test_a_weight_in_two_places_and_a_subclass_of_linear_get_none() -> None:
    assert set(linear_layers(Tangled(4, 4))) == {"first"}
    assert set(linear_layers(nn.MultiheadAttention(4, 2))) == set()


def test_both_branches_of_a_split_decoder_are_adapted_and_a_stage_may_train_one() -> None:
    decoder = partial(DivideAndConquer, config=LLAMA, tokenizer="bytes")
    model = tiny_vlm(decoder=decoder, lora=Adapters(decoder=TWO))
    assert len(adapted(model, "decoder")) == 42
    Stage(train={"decoder": 1e-3}, only={"decoder": "vision"}).freeze(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 42
    assert all(".vision." in name and is_adapter(name) for name in trained)


def test_layers_that_are_copied_from_the_decoder_and_adapted_start_as_its_own() -> None:
    same = {"decoder": tiny_decoder(num_attention_heads=4, intermediate_size=128)}
    plain = tiny_vlm(**HOLISTIC, **same)
    model = tiny_vlm(**HOLISTIC, **same, lora=Adapters(embedder=TWO, decoder=TWO))
    layer = model.embedder.stack.layers[0].self_attn.q_proj
    assert torch.equal(layer.base_layer.weight, plain.decoder.blocks()[0].self_attn.q_proj.weight)
    batch = batch_of(model)
    assert torch.equal(model.logits(batch), plain.logits(batch))


class Renaming(MLP):
    """Reads and renames weights without a thought of adapters, as a part of a user does."""

    def pretrained_state(self) -> StateDict:
        return {name: torch.full_like(own, 0.5, device="cpu") for name, own in self.state_dict().items()}

    def adapt_state(self, state: StateDict) -> StateDict:
        renamed = {name.replace("old.", "layers."): value for name, value in state.items()}
        assert renamed.keys() == self.state_dict().keys()
        return renamed

    def trainable_parameters(self, only: str | None = None) -> Iterable[nn.Parameter]:
        return self.layers[0].parameters() if only == "first" else super().trainable_parameters(only)


def test_a_part_of_a_user_needs_to_know_nothing_of_adapters() -> None:
    slots = tiny_slots(projector=Renaming, lora=Adapters(projector=TWO))
    assert (build(slots).projector.layers[0].base_layer.weight == 0.5).all()
    saved = {"old.0.weight": torch.ones(64, 32), "old.0.bias": torch.ones(64), "old.2.weight": torch.ones(64, 64),
             "old.2.bias": torch.ones(64)}  # fmt: skip
    model = build(slots, {"projector": saved}, ("encoder", "embedder", "decoder"))
    assert (model.projector.layers[2].base_layer.weight == 1).all()
    Stage(train={"projector": 1e-3}, only={"projector": "first"}).freeze(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"projector.layers.0.lora_{matrix}.default.weight" for matrix in "AB"}


def test_what_was_trained_comes_back_and_the_rest_of_the_model_has_no_part_in_it() -> None:
    slots = tiny_slots(lora=Adapters(encoder=TWO, decoder=TWO))
    model = moved(build(slots)).eval()
    saved = by_slot(model.state_dict())
    again = build(slots, saved).eval()
    batch = batch_of(model)
    assert torch.equal(again.logits(batch), model.logits(batch))
    check_saved(build_on_meta(slots), slots, saved, (), "it")


WRONG = {
    "no adapters here": (Adapters(), "it has adapters for the slot 'decoder' (HFDecoder), and here it has none: set"),
    "another rank": (
        Adapters(decoder=Lora(rank=3)),
        "do not fit the slot 'decoder' (HFDecoder): other shape: lm.model",
    ),
    "other layers": (Adapters(decoder=Lora(rank=2, targets=("mlp",))), "not of this part: lm.model.layers.0.self_attn"),
}


@pytest.mark.parametrize("name", WRONG)
def test_adapters_that_do_not_fit_are_refused_with_the_way_out(name: str) -> None:
    saved = by_slot(tiny_vlm(lora=Adapters(decoder=TWO)).state_dict())
    lora, message = WRONG[name]
    slots = tiny_slots(lora=lora)
    with pytest.raises(ValueError, match=re.escape(message)):
        build(slots, saved, origin="it")
    with pytest.raises(ValueError, match=rf"model.stage.start_from: .*{re.escape(message)}.*model.lora.decoder"):
        check_saved(build_on_meta(slots), slots, saved, (), "it")
    build(slots, saved, ("decoder",))


def test_only_the_names_of_layers_with_adapters_lose_base_layer() -> None:
    state = {
        "a.base_layer.weight": torch.zeros(1),
        "a.lora_A.default.weight": torch.ones(1),
        "own.base_layer.weight": torch.zeros(1),
    }
    plain, adapters = split_state(state)
    assert set(plain) == {"a.weight", "own.base_layer.weight"}
    assert set(adapters) == {"a.lora_A.default.weight"}


class Folded(Projector):
    """Computes with the weight of its layer."""

    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__(in_width, out_width)
        self.linear = nn.Linear(in_width, out_width, bias=False)

    def forward(self, tokens: VisualTokens) -> VisualTokens:
        weight: Tensor = effective_weight(self.linear)
        return VisualTokens(tokens.features @ weight.T, tokens.grids)


def test_a_weight_that_is_read_has_its_adapter_in_it() -> None:
    model = moved(tiny_vlm(projector=Folded, lora=Adapters(projector=TWO)))
    layer = model.projector.linear
    x = torch.randn(3, 32)
    torch.testing.assert_close(x @ effective_weight(layer).T, layer(x))
