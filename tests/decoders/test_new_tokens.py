"""New tokens of a decoder: rows that start as the mean of the others, from whatever weights."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from lit_vlm.checkpoints.published import export_published
from lit_vlm.core.part import load_state
from lit_vlm.decoders import DivideAndConquer, HFDecoder, Lora
from lit_vlm.model.build import build
from lit_vlm.model.vlm import VLM
from lit_vlm.training.stage import Stage
from tests.tiny import LLAMA, batch_of, tiny_slots, tiny_vlm

NEW = ("<|start|>", "<|end|>")
SIZE = 259
"""Tokens of `bytes`."""


def tables(lm: Any) -> list[torch.Tensor]:
    return [lm.get_input_embeddings().weight, lm.get_output_embeddings().weight]


def saved(folder: Path, rows: int, **changes: Any) -> str:
    """A published decoder with so many rows."""
    config = LlamaConfig(**(LLAMA | {"vocab_size": rows} | changes))
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


def with_new(source: Any, kind: type[HFDecoder] = HFDecoder, new: Sequence[str] = NEW, **options: Any) -> VLM:
    """A model around a decoder with new tokens: of a folder, or from a configuration."""
    origin = {"name": source} if isinstance(source, str) else {"config": source}
    return build(tiny_slots(decoder=partial(kind, **origin, tokenizer="bytes", new_tokens=tuple(new), **options)))


@pytest.mark.parametrize("kind", [HFDecoder, DivideAndConquer])
@pytest.mark.parametrize("tied", [False, True], ids=["two tables", "one table"])
@pytest.mark.parametrize("rows", [SIZE, 300], ids=["no row to spare", "rows to spare"])
def test_published_weights_get_rows_for_new_tokens(
    rows: int, tied: bool, kind: type[HFDecoder], tmp_path: Path
) -> None:
    folder = saved(tmp_path, rows, tie_word_embeddings=tied)
    published = AutoModelForCausalLM.from_pretrained(folder)
    decoder = with_new(folder, kind).decoder
    assert decoder.vocab_size == decoder.lm.config.vocab_size == max(rows, SIZE + 2)
    assert decoder.tokenizer.convert_tokens_to_ids(list(NEW)) == [SIZE, SIZE + 1]
    for own, theirs in zip(tables(decoder.lm), tables(published), strict=True):
        assert torch.equal(own[:SIZE], theirs[:SIZE])
        torch.testing.assert_close(own[SIZE : SIZE + 2], theirs[:SIZE].mean(0).expand(2, -1))
    first, second = tables(decoder.lm)
    assert (first is second) == tied


def test_the_published_tokens_keep_their_logits(tmp_path: Path) -> None:
    folder = saved(tmp_path, SIZE)
    plain = build(tiny_slots(decoder=partial(HFDecoder, name=folder, tokenizer="bytes"))).eval()
    grown = with_new(folder).eval()
    batch = batch_of(plain)
    torch.testing.assert_close(grown.logits(batch)[..., :SIZE], plain.logits(batch))


@pytest.mark.parametrize("lora", [None, Lora(rank=2)], ids=["all weights", "adapters"])
def test_an_earlier_stage_may_have_had_fewer_tokens(lora: Lora | None) -> None:
    earlier = tiny_vlm(decoder=partial(HFDecoder, config=LLAMA, tokenizer="bytes", lora=lora)).decoder
    slots = tiny_slots(decoder=partial(HFDecoder, config=LLAMA, tokenizer="bytes", lora=lora, new_tokens=NEW))
    later = build(slots, {"decoder": earlier.state_dict()}, ("encoder", "projector", "embedder")).decoder
    for own, theirs in zip(tables(later.lm), tables(earlier.lm), strict=True):
        assert torch.equal(own[:SIZE], theirs)
        torch.testing.assert_close(own[SIZE:], theirs.mean(0).expand(2, -1))
    trained = later.state_dict() | {"lm.lm_head.weight": torch.randn(SIZE + 2, 64)}
    again = build(slots, {"decoder": trained}, ("encoder", "projector", "embedder")).decoder
    assert torch.equal(again.state_dict()["lm.lm_head.weight"], trained["lm.lm_head.weight"])


def test_more_rows_than_there_are_tokens_are_not_cut_off() -> None:
    later = with_new(LLAMA).decoder
    state = tiny_vlm(decoder=partial(HFDecoder, config=LLAMA | {"vocab_size": 300}, tokenizer="bytes")).decoder
    with pytest.raises(ValueError, match=r"other shape: lm.lm_head.weight \(300, 64\) instead of \(261, 64\)"):
        load_state(later, later.adapt_state(state.state_dict()), "decoder")


def test_tokens_that_are_known_stay_as_they_are(tmp_path: Path) -> None:
    folder = saved(tmp_path, SIZE)
    published = AutoModelForCausalLM.from_pretrained(folder)
    decoder = with_new(folder, new=("<|im_end|>",)).decoder
    assert decoder.vocab_size == SIZE
    assert all(torch.equal(a, b) for a, b in zip(tables(decoder.lm), tables(published), strict=True))


def test_a_word_of_the_vocabulary_becomes_a_token_and_keeps_its_row(tmp_path: Path) -> None:
    folder = saved(tmp_path, SIZE)
    published = AutoModelForCausalLM.from_pretrained(folder)
    decoder = with_new(folder, new=("e", "<|end|>")).decoder
    assert decoder.vocab_size == SIZE + 1
    assert all(torch.equal(a[:SIZE], b) for a, b in zip(tables(decoder.lm), tables(published), strict=True))


def test_with_adapters_the_rows_of_new_tokens_train() -> None:
    for new, expected in (((), set()), (NEW, {"lm.model.embed_tokens.weight", "lm.lm_head.weight"})):
        model = with_new(LLAMA, new=new, lora=Lora(rank=2))
        Stage(train={"decoder": 1e-3}).freeze(model)
        trained = {name for name, p in model.decoder.named_parameters() if p.requires_grad}
        assert {name for name in trained if ".lora_" not in name} == expected
        assert len(trained) > len(expected)


def test_a_vocabulary_that_is_too_small_for_them_is_refused() -> None:
    with pytest.raises(ValueError, match="vocab_size 260 is below the tokenizer's 261"):
        HFDecoder(config=LLAMA | {"vocab_size": 260}, tokenizer="bytes", new_tokens=NEW)


def test_an_export_knows_them(tmp_path: Path) -> None:
    model = with_new(saved(tmp_path / "published", SIZE))
    assert export_published("llava-hf", model, tmp_path / "out", None) < 1e-4
    assert AutoTokenizer.from_pretrained(tmp_path / "out").convert_tokens_to_ids(list(NEW)) == [SIZE, SIZE + 1]
