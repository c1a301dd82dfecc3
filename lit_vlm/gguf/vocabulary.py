"""A tokenizer as llama.cpp knows it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from gguf import GGUFWriter, TokenType
from transformers import PreTrainedTokenizerFast

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_2 = LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
SPLITS = {LLAMA_3: "llama-bpe", QWEN_2: "qwen2"}
"""Expression that text is split by → llama.cpp's name for it."""


NO_MERGES = "Ā Ā"
"""Two bytes of zero, joined, are no token, and are taken apart again: for a tokenizer of single bytes, as llama.cpp
reads no file without pairs."""


class Vocabulary(NamedTuple):
    """What a file says of a tokenizer.

    Attributes:
        model: `gpt2`, of byte-level BPE, or `llama`, of BPE with bytes for letters that it lacks.
        pre: how text is split first.
        tokens: texts, by id.
        types: kinds of tokens, by id.
        merges: pairs that are joined, in order; of `gpt2`.
        scores: by id; of `llama`.
        space_prefix: whether a space is put in front of text.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[TokenType]
    merges: list[str]
    scores: list[float]
    space_prefix: bool


def vocabulary_of(tokenizer: PreTrainedTokenizerFast, rows: int) -> Vocabulary:
    """What a file says of a tokenizer.

    Args:
        tokenizer: a fast one, of BPE.
        rows: rows of the word table; those without a token get one that is never used.

    Raises:
        ValueError: for a tokenizer that llama.cpp has no equal of.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    model = content["model"]
    if model["type"] != "BPE":
        raise ValueError(f"gguf holds tokenizers of BPE, not {model['type']}")
    added = {one["id"]: one for one in content["added_tokens"]}
    texts = {index: text for text, index in model["vocab"].items()} | {i: one["content"] for i, one in added.items()}
    byte_level = not model.get("byte_fallback")
    pre = _pre(content) if byte_level else "default"
    tokens = [texts.get(index, f"[unused{index}]") for index in range(rows)]
    if len(set(tokens)) < rows:
        raise ValueError("two tokens of the tokenizer have the same text")
    unknown = model.get("unk_token")
    types = [_type(index, texts, added, unknown, byte_level) for index in range(rows)]
    pairs = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    return Vocabulary(
        "gpt2" if byte_level else "llama",
        pre,
        tokens,
        types,
        [" ".join(pair) for pair in pairs] if byte_level else [],
        [] if byte_level else _scores(tokens, pairs),
        not byte_level and "▁" in json.dumps([content["normalizer"], content["pre_tokenizer"]], ensure_ascii=False),
    )


def _type(
    index: int, texts: Mapping[int, str], added: Mapping[int, Mapping[str, Any]], unknown: str | None, byte_level: bool
) -> TokenType:
    if index not in texts:
        return TokenType.UNUSED
    if texts[index] == unknown:
        return TokenType.UNKNOWN
    if index in added:
        return TokenType.CONTROL if added[index]["special"] else TokenType.USER_DEFINED
    text = texts[index]
    if not byte_level and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        return TokenType.BYTE
    return TokenType.NORMAL


def _scores(tokens: Sequence[str], pairs: Sequence[tuple[str, ...]]) -> list[float]:
    """The earlier a token is made by joining two others, the higher its score."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(pairs):
        ranks.setdefault("".join(pair), rank)
    return [-float(ranks.get(token, 0)) for token in tokens]


def _pre(content: Mapping[str, Any]) -> str:
    """llama.cpp's name for how text is split before pairs are joined.

    Raises:
        ValueError: for a way that is not known here.
    """
    given = content["pre_tokenizer"] or {}
    steps = given["pretokenizers"] if given.get("type") == "Sequence" else [given]
    kinds = [step.get("type") for step in steps]
    plain = content["normalizer"] is None
    if plain and kinds == ["ByteLevel"] and steps[0].get("use_regex", True) and not steps[0]["add_prefix_space"]:
        return "gpt-2"
    if plain and kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and steps[1].get("use_regex", True):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        normal = content["normalizer"] is None or content["normalizer"] == {"type": "NFC"}
        name = SPLITS.get(str(steps[0]["pattern"].get("Regex")))
        if name is not None and normal:
            return name
    raise ValueError(f"llama.cpp has no name that is known here for a tokenizer that splits text by {given}")


def write_vocabulary(
    writer: GGUFWriter, found: Vocabulary, tokenizer: PreTrainedTokenizerFast, bos: bool, ends: int | None
) -> None:
    """Write a tokenizer into a file.

    Args:
        writer: of the file.
        found: the vocabulary.
        tokenizer: whose special tokens are named.
        bos: whether text begins with the token that begins it.
        ends: id of the token that ends a turn, where it is not the one that ends text.
    """
    writer.add_tokenizer_model(found.model)
    writer.add_tokenizer_pre(found.pre)
    writer.add_token_list(found.tokens)
    writer.add_token_types(found.types)
    if found.model == "gpt2":
        writer.add_token_merges(found.merges or [NO_MERGES])
    else:
        writer.add_token_scores(found.scores)
        writer.add_add_space_prefix(found.space_prefix)
    for add, index in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_eot_token_id, ends),
    ):
        if index is not None:
            add(index)
    writer.add_add_bos_token(bos)
    writer.add_add_eos_token(False)
    if tokenizer.chat_template:
        writer.add_chat_template(str(tokenizer.chat_template))
