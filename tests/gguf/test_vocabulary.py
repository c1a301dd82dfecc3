"""Tokenizers in GGUF files, read by llama.cpp itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlavaConfig, LlavaForConditionalGeneration, PreTrainedTokenizerFast

from lit_vlm.gguf.export import TEXTS
from lit_vlm.gguf.files import write_decoder
from lit_vlm.gguf.runtime import Runtime
from lit_vlm.gguf.vocabulary import LLAMA_3, QWEN_2, vocabulary_of
from tests.data.made_tokenizers import ALPHABET, EOS, UNKNOWN, _train, byte_level, llama2, unigram

pytest.importorskip("xllamacpp")

TEXT = {
    "model_type": "llama", "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2,
    "num_key_value_heads": 1, "num_hidden_layers": 1,
}  # fmt: skip
VISION = {"model_type": "siglip_vision_model", "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
MORE = ["the cat sat on the mat.", "1,5 don't  two   spaces\n\nnew\tline 1234567", "rivière ﬁ 日本 🙂", "", " "]


def split_by(*steps: pre_tokenizers.PreTokenizer) -> Tokenizer:
    """A byte-level tokenizer that splits text by steps first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    return _train(tokenizer, ALPHABET)


def by_expression(expression: str) -> Tokenizer:
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return split_by(pre_tokenizers.Split(Regex(expression), "isolated"), plain)


def digits() -> Tokenizer:
    return split_by(pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False))


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "gpt-2": byte_level,
    "smollm": digits,
    "llama-bpe": lambda: by_expression(LLAMA_3),
    "qwen2": lambda: by_expression(QWEN_2),
    "sentencepiece": llama2,
}


def fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS, unk_token=UNKNOWN)


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_makes_the_same_tokens(kind: str, tmp_path: Path) -> None:
    tokenizer = fast(KINDS[kind]())
    config = LlavaConfig(vision_config=VISION, text_config=TEXT | {"vocab_size": len(tokenizer) + 3})
    state = LlavaForConditionalGeneration(config).state_dict()
    file = tmp_path / "model.gguf"
    write_decoder(file, config, state, tokenizer, "f32", bos=False, ends=None)
    with Runtime(file, None) as runtime:
        for text in (*TEXTS, *MORE):
            assert runtime.tokens(text, special=False) == tokenizer(text, add_special_tokens=False).input_ids, text


def test_rows_without_a_token_are_never_used() -> None:
    tokenizer = fast(byte_level())
    found = vocabulary_of(tokenizer, len(tokenizer) + 2)
    assert found.tokens[-2:] == [f"[unused{len(tokenizer)}]", f"[unused{len(tokenizer) + 1}]"]
    assert [kind.name for kind in found.types[-2:]] == ["UNUSED", "UNUSED"]


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: unigram("first"), "tokenizers of BPE, not Unigram"),
        (lambda: by_expression(r"\w+|\W+"), "no name that is"),
    ],
)
def test_tokenizers_without_an_equal_are_refused(made: Callable[[], Tokenizer], message: str) -> None:
    tokenizer = fast(made())
    with pytest.raises(ValueError, match=message):
        vocabulary_of(tokenizer, len(tokenizer))
