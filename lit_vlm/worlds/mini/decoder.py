"""A small decoder that has read the language of scenes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lit_vlm.data.sample.templates import Span, VicunaV1
from lit_vlm.worlds.mini.training import optimizers_of, train
from lit_vlm.worlds.scenes import Scenes

DECODER = LlamaConfig(
    vocab_size=600,
    hidden_size=192,
    intermediate_size=576,
    num_hidden_layers=6,
    num_attention_heads=6,
    num_key_value_heads=6,
    max_position_embeddings=2048,
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
"""A decoder of 3.1 million parameters. Six layers, as a comparison takes several: find two things, read, weigh them."""
MAX_THINGS, TURNS = 3, 6
ANSWERS = re.compile(r"(?:Answer:|ASSISTANT:)(.*?(?:\n|</s>|(?= USER:)|$))")
REST = 0.1
"""Loss weight of text outside the answers, which have 1: most of it, such as a list of things, cannot be predicted."""


def _texts(count: int, seed: int) -> Iterator[str]:
    """Conversations, documents and captions about scenes, without pictures."""
    template = VicunaV1(system="")
    texts = Scenes("text", count, seed=seed, turns=TURNS, max_things=MAX_THINGS, wording="plain")
    captions = Scenes("captions", count, seed=seed, max_things=MAX_THINGS, wording="plain")
    for index in range(count):
        pieces = template.render(texts.outline(index).messages, "</s>")
        yield "".join(piece.text for piece in pieces if isinstance(piece, Span))
        if index % 3 == 0:
            yield f"{captions.outline(index).messages[-1].text}\n</s>"


def save_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Learn the decoder's tokenizer from the scenes' text; save it, and the decoder's configuration, in `folder`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=DECODER.vocab_size,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(600, 900), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    DECODER.save_pretrained(folder)
    return fast


def train_decoder(folder: Path, steps: int = 600, rows: int = 12, length: int = 192, documents: int = 10000) -> None:
    """Train the decoder on the scenes' text and save it with its tokenizer; in the loss, answers weigh most.

    Args:
        folder: where both are saved.
        steps: optimizer steps.
        rows: rows of tokens per step.
        length: tokens per row.
        documents: texts that the rows are cut from.
    """
    torch.manual_seed(0)
    ids, weights = _tokens(save_tokenizer(folder), documents, length)
    model = LlamaForCausalLM._from_config(DECODER, attn_implementation="eager")
    order = torch.cat([torch.randperm(len(ids)) for _ in range(1 + steps * rows // len(ids))])

    def loss(step: int) -> Tensor:
        chosen = order[step * rows : (step + 1) * rows]
        logits = model(input_ids=ids[chosen]).logits[:, :-1].float().flatten(0, 1)
        weight = weights[chosen][:, 1:].flatten()
        return (F.cross_entropy(logits, ids[chosen][:, 1:].flatten(), reduction="none") * weight).sum() / weight.sum()

    optimizers = optimizers_of(model, [p for p in model.model.layers.parameters() if p.ndim == 2], lr=3e-3)
    train(model, optimizers, loss, steps, "training the mini decoder on the scenes' text, once")
    model.eval().save_pretrained(folder)


def _tokens(tokenizer: PreTrainedTokenizerFast, documents: int, length: int) -> tuple[Tensor, Tensor]:
    """Ids of all texts end to end, and the loss weight of each id, cut into rows: `[rows, length]` both."""
    ids: list[int] = []
    weights: list[float] = []
    for text in _texts(documents, 0):
        found = tokenizer(text, return_offsets_mapping=True)
        answers = [match.span(1) for match in ANSWERS.finditer(text)]
        ids += found.input_ids
        weights += [
            1.0 if any(start < right and end > left for left, right in answers) else REST
            for start, end in found.offset_mapping
        ]
    rows = len(ids) // length
    return (
        torch.tensor(ids[: rows * length]).view(rows, length),
        torch.tensor(weights[: rows * length]).view(rows, length),
    )
