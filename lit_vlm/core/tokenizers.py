"""Tokenizers: loaded from a hub name, folder or package, or built here without any file."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lit_vlm.core.hub import TOKENIZER_FILES, is_cached, is_offline
from lit_vlm.core.pretrained import is_hub_name, resolve

SPECIAL = ("<pad>", "<|im_start|>", "<|im_end|>")
CHAT_MARKS = (
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
    "<s>",
    "<0x04>",
)
"""Marks of the kit's templates that a byte tokenizer lacks."""


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte and the marks of ChatML: 259 tokens, for tiny models with random weights."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<|im_end|>", name_or_path="bytes"
    )


def stand_in() -> PreTrainedTokenizerFast:
    """A byte tokenizer with the marks of all templates, in place of a tokenizer that is not on this machine."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [*CHAT_MARKS]})
    return tokenizer


def load_tokenizer(source: str) -> PreTrainedTokenizerFast:
    """Load a fast tokenizer and give it a pad token.

    Args:
        source: `bytes`, a hub name, a local path or `package:NAME`. Inside `core.hub.configurations_in`, a hub name
            that the hub cache lacks gives `stand_in`.

    Raises:
        ValueError: when the source has no tokenizer, only a slow one (labels need character offsets), or one without a
            token to pad with; and as `resolve`.
    """
    if source == "bytes":
        return byte_tokenizer()
    hub = is_hub_name(source)
    if hub and is_offline() and not is_cached(source, TOKENIZER_FILES):
        return stand_in()
    # Inside `configurations_in` the folder of a name holds its configuration alone.
    place = source if hub and is_offline() else resolve(source, weights=False)
    try:
        tokenizer = AutoTokenizer.from_pretrained(place)
    except ValueError as error:
        raise ValueError(
            f"there is no tokenizer that can be read in {source}: it needs tokenizer.json, or else tokenizer.model and "
            f"the package sentencepiece ({str(error).strip().splitlines()[0]})"
        ) from error
    if hub:
        tokenizer.name_or_path = source  # alike on all machines, whatever their hub cache
    if not tokenizer.is_fast:
        raise ValueError(f"the tokenizer of {source} has no fast version, and labels need its character offsets")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ValueError(f"the tokenizer of {source} has no pad, unknown or end-of-sequence token to pad with")
    return tokenizer


def decoded(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int], opening: str = "") -> str:
    """The text of an answer's tokens, without special tokens, spaces around it, and what all answers begin with.

    Args:
        tokenizer: decodes them.
        ids: the tokens.
        opening: text of `Batch.opening`.
    """
    return str(tokenizer.decode(ids, skip_special_tokens=True)).strip().removeprefix(opening).strip()


class IncrementalText:
    """The text of tokens that come one by one: all pieces together are that of all tokens, as `decoded` gives it.

    Spaces wait for what follows them, and so do a letter of which only some bytes are there, and what may become the
    opening.

    Args:
        tokenizer: decodes them; special tokens are left out.
        opening: text of `Batch.opening`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, opening: str = "") -> None:
        self._tokenizer, self._opening = tokenizer, opening
        self._ids: list[int] = []
        self._said = ""

    @property
    def num_tokens(self) -> int:
        """Number of tokens so far."""
        return len(self._ids)

    def push(self, token: int) -> str:
        """Take one more token.

        Returns:
            what is new of the text.
        """
        self._ids.append(token)
        text = self._text()
        return "" if text.endswith("\ufffd") or self._opening.startswith(text) else self._new(text)

    def rest(self) -> str:
        """What the last tokens still hold back, at the end."""
        return self._new(self._text())

    def _text(self) -> str:
        return decoded(self._tokenizer, self._ids, self._opening)

    def _new(self, text: str) -> str:
        if not text.startswith(self._said):  # what follows changed a letter before it: no piece can take that back
            return ""
        new, self._said = text[len(self._said) :], text
        return new
