"""Small tokenizers of every kind that decoders come with, made from the components of the tokenizers library."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lit_vlm.core.tokenizers import byte_tokenizer

OPEN, TURN, CLOSE, EOS, UNKNOWN = "<|im_start|>", "<|turn|>", "<|im_end|>", "</s>", "<unk>"
SPECIAL = [UNKNOWN, EOS, OPEN, TURN, CLOSE]
CORPUS = [
    "the cat sat on the mat. USER: what is it? ASSISTANT: a red cat, two  spaces",
    "日本 rivière ﬁ 🙂 é user assistant system </s> <|im_end|> <unk>",
    "assistant\n\nnew lines\n  and indents\ttabs 1,5 don't",
] * 4
ALPHABET = pre_tokenizers.ByteLevel.alphabet()
LLAMA3 = Regex(r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def _bpe() -> Tokenizer:
    return Tokenizer(models.BPE(unk_token=UNKNOWN))


def _train(tokenizer: Tokenizer, alphabet: list[str], special: list[str] = SPECIAL) -> Tokenizer:
    settings = {"special_tokens": special, "initial_alphabet": alphabet, "show_progress": False}
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=len(special) + 400, **settings))
    return tokenizer


def _with_fallback(tokenizer: Tokenizer) -> Tokenizer:
    """The same, with bytes where it lacks a character."""
    described = json.loads(tokenizer.to_str())
    described["model"] |= {"byte_fallback": True}
    for value in range(256):
        described["model"]["vocab"][f"<0x{value:02X}>"] = len(described["model"]["vocab"])
    return Tokenizer.from_str(json.dumps(described))


def byte_level(trim: bool = False, prefix: bool = False) -> Tokenizer:
    """GPT-2, Qwen; with `trim` as Llama-3."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    _train(tokenizer, ALPHABET)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    return tokenizer


def roberta() -> Tokenizer:
    """Spaces are taken from offsets by another post-processor."""
    tokenizer = byte_level()
    tokenizer.post_processor = processors.RobertaProcessing((EOS, 1), (OPEN, 2), trim_offsets=True)
    return tokenizer


def llama3() -> Tokenizer:
    """Words of the vocabulary are taken whole, special tokens stand behind it."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(LLAMA3, "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    _train(tokenizer, ALPHABET, [])
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens(["  ", "    "])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True)])
    return tokenizer


def words_with_marks_inside() -> Tokenizer:
    """A byte-level vocabulary in which a mark is also a word that merges make."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(" ", "merged_with_next"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    _train(tokenizer, ALPHABET, [])
    described = json.loads(tokenizer.to_str())
    vocab, merges = described["model"]["vocab"], described["model"]["merges"]
    for mark in SPECIAL:
        for end in range(2, len(mark) + 1):
            if mark[:end] not in vocab:
                vocab[mark[:end]] = len(vocab)
                merges.append([mark[: end - 1], mark[end - 1]])
    tokenizer = Tokenizer.from_str(json.dumps(described))
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def llama2() -> Tokenizer:
    """SentencePiece's BPE as transformers wrote it at first: a normaliser puts ▁, bytes stand for rare characters."""
    tokenizer = _bpe()
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _with_fallback(_train(tokenizer, ["▁", *"abcdeisttu"]))


def metaspace(scheme: str) -> Tokenizer:
    """The same by a pre-tokenizer, as transformers writes it now."""
    tokenizer = _bpe()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme, split=False)
    return _with_fallback(_train(tokenizer, ["▁", *"abcdeisttu"]))


def inserting() -> Tokenizer:
    """A normaliser puts ▁ in front of a text, which then covers no character."""
    tokenizer = _bpe()
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(" ", "▁"), normalizers.Replace(Regex("^"), "▁")])
    return _with_fallback(_train(tokenizer, ["▁", *"abcdeisttu"]))


def unigram(scheme: str) -> Tokenizer:
    """SentencePiece's Unigram, which finds a mark in plain letters, with compatibility characters taken apart."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=SPECIAL, unk_token=UNKNOWN, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def word_piece() -> Tokenizer:
    """BERT, without case and accents; spaces are lost."""
    tokenizer = Tokenizer(models.WordPiece(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def word_level() -> Tokenizer:
    """Whole words between spaces, so that a typed mark is a word of the vocabulary."""
    tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def stripping() -> Tokenizer:
    """Characters are dropped, merged and replaced by several."""
    tokenizer = _bpe()
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFKD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Replace("q", ""),
            normalizers.Replace("x", "ks"),
            normalizers.Strip(),
        ]
    )
    return _train(tokenizer, list("abcdefghijklmnoprstuvwyz "))


def greedy_marks() -> Tokenizer:
    """Phi-3: a mark swallows the spaces beside it."""
    tokenizer = Tokenizer(byte_level().model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(mark, lstrip=True, rstrip=True) for mark in SPECIAL])
    return tokenizer


def marks_in_any_case() -> Tokenizer:
    """Special tokens are looked for in the text that a normaliser has changed."""
    tokenizer = _bpe()
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    _train(tokenizer, list("abcdefghijklmnopqrstuvwxyz </|_>"), [UNKNOWN])
    tokenizer.add_special_tokens([AddedToken(mark, normalized=True) for mark in SPECIAL[1:]])
    return tokenizer


MADE: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": byte_level,
    "byte-level, trimmed": lambda: byte_level(trim=True),
    "byte-level, trimmed, prefix": lambda: byte_level(trim=True, prefix=True),
    "roberta": roberta,
    "llama3": llama3,
    "marks as words": words_with_marks_inside,
    "llama2": llama2,
    "metaspace first": lambda: metaspace("first"),
    "metaspace always": lambda: metaspace("always"),
    "metaspace never": lambda: metaspace("never"),
    "inserting": inserting,
    "unigram first": lambda: unigram("first"),
    "unigram always": lambda: unigram("always"),
    "word piece": word_piece,
    "word level": word_level,
    "stripping": stripping,
    "greedy marks": greedy_marks,
    "marks in any case": marks_in_any_case,
}
LOSSLESS = ("byte-level", "byte-level, trimmed", "roberta", "llama3", "marks as words")
"""Those that give back every text, and whose tokens are its bytes one after the other."""


@cache
def made(name: str) -> PreTrainedTokenizerFast:
    """One of `MADE`, or `bytes`."""
    if name == "bytes":
        tokenizer = byte_tokenizer()
        tokenizer.add_tokens([token for token in SPECIAL if token not in tokenizer.get_vocab()], special_tokens=True)
        return tokenizer
    return PreTrainedTokenizerFast(tokenizer_object=MADE[name](), unk_token=UNKNOWN, eos_token=EOS, name_or_path=name)
