"""Tiny models with random weights, and samples of random pictures and token ids."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lit_vlm.core.batch import Images
from lit_vlm.core.tiling import Tiling
from lit_vlm.data.sample.encode import Sample
from lit_vlm.decoders import HFDecoder, Lora
from lit_vlm.embedders import Splice
from lit_vlm.encoders import HFEncoder
from lit_vlm.heads import Head
from lit_vlm.model.build import Slots
from lit_vlm.model.vlm import VLM
from lit_vlm.projectors import MLP

Size = tuple[int, int]
"""(height, width) in pixels."""
CLIP: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
}
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def tiny_slots(**changes: Any) -> Slots:
    """Factories of a tiny LLaVA, with `changes` in place of its slots."""
    slots: dict[str, Any] = {
        "encoder": partial(HFEncoder, config=CLIP),
        "projector": partial(MLP, depth=2),
        "embedder": Splice,
        "decoder": partial(HFDecoder, config=LLAMA, tokenizer="bytes"),
    }
    return Slots(**(slots | changes))


def tiny_decoder(lora: Lora | None = None, **changes: Any) -> partial[HFDecoder]:
    """A factory of a tiny Llama with `changes` in its configuration."""
    return partial(HFDecoder, config=LLAMA | changes, tokenizer="bytes", lora=lora)


def random_images(sizes: Sequence[Size], seed: int = 0) -> Images:
    """Random pictures of these sizes."""
    generator = torch.Generator().manual_seed(seed)
    return Images.pack([_picture(size, generator) for size in sizes])


def _picture(size: Size, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 256, (3, *size), generator=generator).byte()


def samples_for(model: VLM, sizes: Sequence[Size]) -> tuple[list[Sample], list[Sample]]:
    """Samples with a random picture of each size, and two samples without pictures; the same in each call."""
    generator = torch.Generator().manual_seed(1)

    def made(name: str, size: Size | None, length: int) -> Sample:
        text = torch.randint(0, 200, (length,), generator=generator).tolist()
        if size is None:
            return Sample(name, "made", text, [-100, *text[1:]])
        pixels = _picture(size, generator)
        grid = model.grid_map(model.encoder.patch_grid(*size))
        tiling = _tiling(size, model.encoder.pixels.size)
        if tiling is not None:
            grid = model.embedder.tile_map(grid, tiling)
        ids = [text[0], *[0] * grid.num_tokens, *text[1:]]
        labels = [-100] * (2 + grid.num_tokens) + text[2:]
        teachers = _for_teachers(model, generator)
        return Sample(name, "made", ids, labels, [1], [grid], [pixels], teachers, tilings=[tiling])

    seen = [made(f"image-{i}", size, 5 + i) for i, size in enumerate(sizes)]
    return seen, [made("text-0", None, 7), made("text-1", None, 4)]


def _tiling(size: Size, side: int | None) -> Tiling | None:
    """For a column of tiles, a copy and a column of them, of a picture that leaves padding on both sides."""
    rows = size[0] // side - 1 if side is not None and size[1] == side else 0
    return Tiling(rows, 1, 2 * size[0], size[1]) if rows > 0 else None


def _for_teachers(model: VLM, generator: torch.Generator) -> dict[str, list[Tensor]]:
    teachers = {name: part.teacher for name, part in model.heads.items() if isinstance(part, Head)}
    sides = {
        name: teacher.pixels.size or teacher.pixels.multiple
        for name, teacher in teachers.items()
        if teacher is not None and teacher.known is None
    }
    return {name: [_picture((side, side), generator)] for name, side in sides.items()}
