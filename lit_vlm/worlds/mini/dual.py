"""A small dual encoder of SigLIP's kind that knows which descriptions fit which scenes."""

from __future__ import annotations

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipProcessor,
    SiglipTextConfig,
)

from lit_vlm.core.cache import cache_dir
from lit_vlm.core.pretrained import load_weights
from lit_vlm.worlds.mini.decoder import DECODER, save_tokenizer
from lit_vlm.worlds.mini.encoders import SIZE, VIT
from lit_vlm.worlds.mini.training import optimizers_of, train
from lit_vlm.worlds.scenes import Scene, caption, render, sample_scene

LENGTH = 80
"""Tokens of a text: few descriptions of scenes have more."""
DUAL = SiglipConfig(
    vision_config=VIT.to_dict() | {"vision_use_head": True},
    text_config=SiglipTextConfig(
        vocab_size=DECODER.vocab_size,
        hidden_size=VIT.hidden_size,
        intermediate_size=VIT.intermediate_size,
        num_hidden_layers=3,
        num_attention_heads=VIT.num_attention_heads,
        max_position_embeddings=LENGTH,
        projection_size=VIT.hidden_size,
        pad_token_id=DECODER.pad_token_id,
        bos_token_id=DECODER.bos_token_id,
        eos_token_id=DECODER.eos_token_id,
    ).to_dict(),
)
"""The vision transformer of `made:scenes-vit` with a head, and a text encoder of 1.5 million parameters."""
CHUNK = 64


def save_processor(folder: Path) -> PreTrainedTokenizerFast:
    """Save configuration, tokenizer and preprocessing in `folder`."""
    save_tokenizer(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(
        folder, model_max_length=LENGTH, model_input_names=["input_ids"]
    )
    size = {"height": SIZE, "width": SIZE}
    images = SiglipImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    SiglipProcessor(images, tokenizer).save_pretrained(folder)
    DUAL.save_pretrained(folder)
    return tokenizer


def train_dual(folder: Path, steps: int = 300, batch: int = 128, scenes: int = 8000) -> None:
    """Train what turns the features of `made:scenes-vit` into a vector, and the text encoder, with SigLIP's loss.

    Args:
        folder: where the model and its processor are saved, as transformers reads them.
        steps: optimizer steps.
        batch: pairs per step.
        scenes: number of scenes. Each is drawn once and described anew whenever it is met.
    """
    from lit_vlm.worlds.mini import made

    torch.manual_seed(0)
    tokenizer = save_processor(folder)
    model = SiglipModel._from_config(DUAL, attn_implementation="sdpa")
    trunk = load_weights(made("scenes-vit", cache_dir()) / "model.safetensors")
    found = model.vision_model.load_state_dict(trunk, strict=False)
    assert not found.unexpected_keys
    assert all(key.startswith("head.") for key in found.missing_keys)
    drawn = [sample_scene(f"dual-{index}") for index in range(scenes)]
    features = _features(model, drawn)  # [scenes, patches, width]
    order = torch.cat([torch.randperm(scenes) for _ in range(1 + steps * batch // scenes)])
    rng = random.Random("dual")
    matched = 2 * torch.eye(batch) - 1

    def loss(step: int) -> Tensor:
        chosen = order[step * batch : (step + 1) * batch].tolist()
        texts = [caption(drawn[index], rng) for index in chosen]
        ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        pictures = F.normalize(model.vision_model.head(features[chosen].float()).float(), dim=-1)
        words = F.normalize(model.get_text_features(ids).pooler_output.float(), dim=-1)
        logits = pictures @ words.T * model.logit_scale.exp() + model.logit_bias
        return -F.logsigmoid(matched * logits).sum() / batch

    for parameter in model.vision_model.parameters():
        parameter.requires_grad_(False)
    model.vision_model.head.requires_grad_(True)
    torch.nn.init.constant_(model.logit_scale, 2.3)
    torch.nn.init.constant_(model.logit_bias, -10.0)
    hidden = [p for p in model.text_model.encoder.layers.parameters() if p.ndim == 2]
    trained = torch.nn.ModuleList([model.text_model, model.vision_model.head])
    optimizers = optimizers_of(trained, hidden, lr=2e-3)
    optimizers[1].add_param_group({"params": [model.logit_scale, model.logit_bias]})
    train(model, optimizers, loss, steps, "training the mini dual encoder on scenes, once")
    model.eval().save_pretrained(folder)


@torch.inference_mode()
def _features(model: SiglipModel, scenes: list[Scene]) -> Tensor:
    """Features of each picture's patches, behind the last norm and before the head, in bf16."""
    found = []
    for start in range(0, len(scenes), CHUNK):
        pictures = [torch.from_numpy(render(scene, SIZE).image) for scene in scenes[start : start + CHUNK]]
        pixels = torch.stack(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
        found.append(model.vision_model(pixels).last_hidden_state.bfloat16())
    return torch.cat(found)
