"""Tiny dual encoders with random weights, saved as transformers saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipProcessor,
)

LENGTH = 12
SIDE = 28
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 7,
}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": LENGTH,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def save_clip(folder: Path, seed: int = 0) -> str:
    """A CLIP with vectors of 16 features."""
    tokenizer = _tokenizer("<s>", "</s>", ["input_ids", "attention_mask"])
    size = {"shortest_edge": SIDE}
    images = CLIPImageProcessor(size=size, crop_size={"height": SIDE, "width": SIDE})
    config = CLIPConfig(text_config=_text(tokenizer), vision_config=VISION, projection_dim=16)
    return _save(folder, CLIPModel, config, CLIPProcessor(images, tokenizer), seed)


def save_siglip(folder: Path, seed: int = 0) -> str:
    """A SigLIP with vectors of 32 features."""
    tokenizer = _tokenizer("", "</s>", ["input_ids"])
    images = SiglipImageProcessor(size={"height": SIDE, "width": SIDE})
    config = SiglipConfig(text_config=_text(tokenizer) | {"projection_size": 32}, vision_config=VISION)
    return _save(folder, SiglipModel, config, SiglipProcessor(images, tokenizer), seed)


def _text(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return TEXT | {"vocab_size": len(tokenizer)}


def _tokenizer(begin: str, end: str, inputs: list[str]) -> PreTrainedTokenizerFast:
    special = ["<pad>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["a red circle", "a blue square"], trainer)
    around = f"{begin} $A {end}".strip()
    numbers = [(token, special.index(token)) for token in (begin, end) if token]
    tokenizer.post_processor = processors.TemplateProcessing(single=around, special_tokens=numbers)
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=LENGTH, model_input_names=inputs, **names
    )


def _save(folder: Path, kind: Any, config: Any, processor: Any, seed: int) -> str:
    torch.manual_seed(seed)
    model = kind._from_config(config)
    for parameter in model.parameters():  # the usual start gives nearly one vector for all
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)
