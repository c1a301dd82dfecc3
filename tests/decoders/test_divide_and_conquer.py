"""DivideAndConquer: equal to computing both branches and blending, at the price of one."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lit_vlm.core.part import load_state
from lit_vlm.data.sample.collate import collate, collate_prompts
from lit_vlm.decoders import DivideAndConquer, HFDecoder
from lit_vlm.model.build import build
from lit_vlm.model.generate import generate
from lit_vlm.model.vlm import VLM
from lit_vlm.training.stage import Stage
from tests.tiny import LLAMA, batch_of, samples_of, tiny_slots, tiny_vlm

QWEN2 = LLAMA | {"model_type": "qwen2"}
CONFIGS = {"llama": LLAMA, "qwen2": QWEN2}


def parted(family: str = "qwen2", **options: Any) -> VLM:
    """A tiny model whose branches differ."""
    model = tiny_vlm(decoder=partial(DivideAndConquer, config=CONFIGS[family], tokenizer="bytes", **options))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.decoder.trainable_parameters("vision"):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


class Blend(nn.Module):
    """The published way: both branches for all tokens."""

    def __init__(self, text: nn.Module, vision: nn.Module, mark: Tensor) -> None:
        super().__init__()
        self.text, self.vision, self.mark = text, vision, mark

    def forward(self, states: Tensor) -> Tensor:
        return torch.where(self.mark[..., None], self.vision(states), self.text(states))


def blended(model: VLM, mark: Tensor) -> VLM:
    """The same weights in a plain decoder that blends."""
    plain = tiny_vlm(decoder=partial(HFDecoder, config=QWEN2, tokenizer="bytes"))
    for own, block in zip(plain.decoder.blocks(), model.decoder.blocks(), strict=True):
        for name, module in block.named_modules():
            if hasattr(module, "vision"):
                own.set_submodule(name, Blend(module.text, module.vision, mark))
    rest = {k: v for k, v in model.state_dict().items() if ".layers." not in k or not k.startswith("decoder")}
    plain.load_state_dict(rest, strict=False)
    return plain


@pytest.mark.parametrize("packed", [False, True])
def test_equals_both_branches_blended(packed: bool) -> None:
    model = parted()
    batch = batch_of(model, packed=packed)
    mark = torch.zeros(batch.input_ids.numel(), dtype=torch.bool)
    mark[batch.image_positions] = True
    reference = blended(model, mark.view_as(batch.input_ids))
    torch.testing.assert_close(model.logits(batch), reference.logits(batch))
    grads = []
    for one in (model, reference):
        one.zero_grad()
        one(batch, {"next_token": 1.0})["next_token"].backward()
        grads.append([p.grad.clone() for p in model.decoder.parameters() if p.grad is not None][:-2])
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", CONFIGS)
def test_starts_as_the_plain_decoder(family: str) -> None:
    model = tiny_vlm(decoder=partial(DivideAndConquer, config=CONFIGS[family], tokenizer="bytes"))
    plain = tiny_vlm(decoder=partial(HFDecoder, config=CONFIGS[family], tokenizer="bytes"))
    load_state(model.decoder, model.decoder.adapt_state(plain.decoder.state_dict()), "decoder")
    batch = batch_of(model)
    torch.testing.assert_close(model.logits(batch), plain.logits(batch))


def test_weights_of_a_plain_folder_start_both_branches(tmp_path: Path) -> None:
    plain = tiny_vlm(decoder=partial(HFDecoder, config=QWEN2, tokenizer="bytes"))
    plain.decoder.lm.save_pretrained(tmp_path)  # type: ignore[operator]
    model = build(tiny_slots(decoder=partial(DivideAndConquer, name=str(tmp_path), tokenizer="bytes")))
    expected = AutoModelForCausalLM.from_pretrained(tmp_path).model.layers[1].mlp.up_proj.weight
    mlp = model.decoder.blocks()[1].mlp  # type: ignore[index]
    assert torch.equal(mlp.text.up_proj.weight, expected)
    assert torch.equal(mlp.vision.up_proj.weight, expected)
    assert mlp.text.up_proj.weight.data_ptr() != mlp.vision.up_proj.weight.data_ptr()


def test_text_alone_gives_the_copies_zero_gradients() -> None:
    model = parted()
    batch = batch_of(model, count=1)
    text = batch.text_only(batch.input_ids, batch.position_ids, batch.labels)
    text = text.to(torch.device("cpu"))
    model(text, {"next_token": 1.0})["next_token"].backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.decoder.trainable_parameters("vision"))


def test_a_stage_may_train_the_copies_alone() -> None:
    model = parted()
    Stage(train={"decoder": 1e-3}, only={"decoder": "vision"}).freeze(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if ".vision." in n}
    with pytest.raises(ValueError, match="only names 'visions', and DivideAndConquer"):
        Stage(train={"decoder": 1e-3}, only={"decoder": "visions"}).freeze(model)
    with pytest.raises(ValueError, match="only names 'decoders'"):
        Stage(only={"decoders": "vision"})


def test_recomputed_blocks_give_the_same_gradients() -> None:
    plain, recomputing = parted(), parted(recompute=True)
    batch = batch_of(plain)
    for model in (plain, recomputing):
        model.train()
        model(batch, {"next_token": 1.0})["next_token"].backward()
    for (name, one), two in zip(plain.named_parameters(), recomputing.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, msg=name)


def test_generation_with_a_cache_equals_whole_sequences() -> None:
    model = parted()
    samples = samples_of(model, 3, prompt=True)
    rows = generate(model, collate_prompts(samples), {2}, max_new_tokens=4)
    assert any(rows)
    for sample, ids in zip(samples, rows, strict=True):
        whole = replace(sample, ids=[*sample.ids, *ids], labels=[*sample.labels, *(len(ids) * [-100])])
        with torch.no_grad():
            likeliest = model.logits(collate([whole]))[0].argmax(-1).tolist()
        assert likeliest[len(sample) - 1 : len(sample) - 1 + len(ids)] == ids


@pytest.mark.parametrize("config", [{"model_type": "qwen3", "head_dim": 16}, {"model_type": "gpt2"}], ids=str)
def test_other_families_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="DivideAndConquer splits blocks such as"):
        DivideAndConquer(config=LLAMA | config, tokenizer="bytes")
