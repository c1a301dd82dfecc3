"""Small encoders that see scenes: what stands in each cell of a picture."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import timm
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import Siglip2VisionConfig, Siglip2VisionModel, SiglipVisionConfig, SiglipVisionModel

from lit_vlm.data.sample.transforms import bicubic
from lit_vlm.encoders.base import HALF
from lit_vlm.worlds.mini.training import optimizers_of, train
from lit_vlm.worlds.scenes import Scene, render, sample_scene
from lit_vlm.worlds.scenes.world import COLOURS, SHAPES, SIZES

ENCODER, LEVEL, SIZE = "resnet10t", 3, 96
"""Name of a timm model of 1.2 million parameters, the feature level that is read (16 × 16 pixels per token), and the
picture's side in pixels: 36 tokens a picture."""
VIT = SiglipVisionConfig(
    hidden_size=192,
    intermediate_size=768,
    num_hidden_layers=6,
    num_attention_heads=3,
    image_size=SIZE,
    patch_size=16,
    vision_use_head=False,
)
"""A transformer of SigLIP's kind with 2.8 million parameters, and as many tokens a picture."""
NAFLEX = Siglip2VisionConfig(
    **{name: getattr(VIT, name) for name in ("hidden_size", "intermediate_size", "num_hidden_layers")},
    num_attention_heads=VIT.num_attention_heads,
    patch_size=VIT.patch_size,
    num_patches=(SIZE // VIT.patch_size) ** 2,
    vision_use_head=False,
)
"""The same for pictures of any shape, of about as many tokens."""
TRANSFORMERS: dict[str, SiglipVisionConfig | Siglip2VisionConfig] = {"scenes-vit": VIT, "scenes-naflex": NAFLEX}
"""Part → its configuration."""
LONGEST = 3.0
"""The longer side of the longest pictures over the shorter one, for pictures of any shape."""


class _Cells(nn.Module):
    """Predicts for each cell whether a thing's centre is there, the thing's shape, colour and size, depth and place.

    Args:
        backbone: pixels `[n, 3, h, w]` → features `[n, d, rows, columns]`.
        width: d.
    """

    def __init__(self, backbone: nn.Module, width: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.sizes = [1, len(SHAPES), len(COLOURS), len(SIZES), 3]
        self.read = nn.Conv2d(width, sum(self.sizes), 1)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        return self.read(self.backbone(pixels)).float().permute(0, 2, 3, 1).split(self.sizes, -1)


class _Level(nn.Module):
    """One level of a timm model."""

    def __init__(self) -> None:
        super().__init__()
        self.model = timm.create_model(ENCODER, features_only=True, out_indices=(LEVEL,))

    def forward(self, pixels: Tensor) -> Tensor:
        (features,) = self.model(pixels)
        return features


class _Patches(nn.Module):
    """A vision transformer's features behind its last norm, as a picture of patches.

    Args:
        config: of SigLIP, or of SigLIP 2, which takes patches.
    """

    def __init__(self, config: SiglipVisionConfig | Siglip2VisionConfig) -> None:
        super().__init__()
        kind = SiglipVisionModel if isinstance(config, SiglipVisionConfig) else Siglip2VisionModel
        self.model = kind._from_config(config, attn_implementation="sdpa")
        self.patch = int(config.patch_size)

    def forward(self, pixels: Tensor) -> Tensor:
        rows, cols = (side // self.patch for side in pixels.shape[2:])
        if isinstance(self.model, SiglipVisionModel):
            features = self.model(pixels).last_hidden_state  # [n, patches, d]
        else:
            patches = pixels.unflatten(3, (cols, -1)).unflatten(2, (rows, -1)).permute(0, 2, 4, 3, 5, 1)
            shapes = torch.tensor([[rows, cols]] * len(pixels))
            features = self.model(patches.flatten(3).flatten(1, 2), None, shapes).last_hidden_state
        return features.transpose(1, 2).unflatten(2, (rows, cols))


class _Shown(NamedTuple):
    """Pictures of scenes, or of a part of each.

    Attributes:
        scenes: n of them.
        pixels: uint8 `[n, 3, h, w]`.
        parts: (left, top, width, height) of each in the whole picture of its scene, in shares.
    """

    scenes: list[Scene]
    pixels: Tensor
    parts: list[tuple[float, float, float, float]]


def _whole(step: int, batch: int) -> _Shown:
    """Square pictures of whole scenes."""
    scenes = _scenes(step, batch)
    return _Shown(scenes, _pixels([render(scene, SIZE).image for scene in scenes]), [(0.0, 0.0, 1.0, 1.0)] * batch)


def _cut_out(step: int, batch: int) -> _Shown:
    """Parts of scenes at the sizes that `NAFLEX` has patches for, all of one shape: each step of another."""
    rng = random.Random(f"shape-{step}")
    scenes, whole, side = _scenes(step, batch), 2 * SIZE, SIZE // VIT.patch_size
    aspect = LONGEST ** rng.uniform(-1, 1)
    rows, cols = round(side / aspect**0.5), round(side * aspect**0.5)
    pictures, parts = [], []
    for scene in scenes:
        longer = rng.uniform(0.4, 1.0) * whole
        height, width = round(longer / max(1.0, cols / rows)), round(longer / max(1.0, rows / cols))
        top, left = rng.randint(0, whole - height), rng.randint(0, whole - width)
        picture = _pixels([render(scene, whole).image[top : top + height, left : left + width]])
        pictures.append(bicubic(picture[0], (cols * VIT.patch_size, rows * VIT.patch_size)))
        parts.append((left / whole, top / whole, width / whole, height / whole))
    return _Shown(scenes, torch.stack(pictures), parts)


def _scenes(step: int, batch: int) -> list[Scene]:
    return [sample_scene(f"mini-{step}-{index}") for index in range(batch)]


def _pixels(pictures: list[NDArray[np.uint8]]) -> Tensor:
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def _cell_targets(shown: _Shown, rows: int, cols: int) -> tuple[Tensor, Tensor]:
    """1 where a centre is, `[n, rows, cols]`; shape, colour, size, depth, row, column there, `[n, rows, cols, 6]`."""
    here, what = torch.zeros(len(shown.scenes), rows, cols), torch.zeros(len(shown.scenes), rows, cols, 6)
    for number, (scene, (left, top, width, height)) in enumerate(zip(shown.scenes, shown.parts, strict=True)):
        # Nearest last: where two centres share a cell, the nearer thing overwrites the other.
        for thing in sorted(scene.things, key=lambda thing: -thing.z):
            column, row, depth = scene.camera.project(thing.centre)
            column, row = (column - left) / width, (row - top) / height
            if not (0 <= column <= 1 and 0 <= row <= 1):
                continue
            i, j = min(rows - 1, int(row * rows)), min(cols - 1, int(column * cols))
            here[number, i, j] = 1
            look = thing.look
            kinds = [SHAPES.index(look.shape), COLOURS.index(look.colour), SIZES.index(look.size)]
            # Place in the whole picture, not in the cell: no later part tells which cell a token is from.
            what[number, i, j] = torch.tensor([*kinds, depth / 3 - 2, row * 4 - 2, column * 4 - 2])
    return here, what


def train_encoder(folder: Path, steps: int = 400, batch: int = 48, classes_only: bool = False) -> None:
    """Train the convolutional encoder to name what stands in each cell of a picture, and save its backbone.

    Args:
        folder: where `model.safetensors` is saved.
        steps: optimizer steps.
        batch: pictures per step.
        classes_only: shape and colour alone are asked of it, and not size, depth and place, as of an encoder that
            learnt from names of what is in pictures.
    """
    torch.manual_seed(0)
    level = _Level()
    model = _Cells(level, level.model.feature_info.channels()[-1]).to(memory_format=torch.channels_last)
    config = timm.get_pretrained_cfg(ENCODER)
    optimizer = AdamW(model.parameters(), lr=3e-3, weight_decay=0.01, betas=(0.9, 0.98))
    what_of = "what is in scenes" if classes_only else "scenes"
    title = f"training the mini encoder on {what_of}, once"
    train(model, [optimizer], _loss(model, batch, _whole, config.mean, config.std, classes_only), steps, title)
    state = {name: tensor.contiguous() for name, tensor in level.model.state_dict().items()}
    save_file(state, folder / "model.safetensors")


def train_vit(
    folder: Path, config: SiglipVisionConfig | Siglip2VisionConfig = VIT, steps: int = 600, batch: int = 48
) -> None:
    """Train a vision transformer to name what stands in each cell of a picture, and save it.

    Args:
        folder: where configuration and weights are saved, as transformers reads them.
        config: one of `TRANSFORMERS`; that of SigLIP 2 sees pictures of all shapes.
        steps: optimizer steps.
        batch: pictures per step.
    """
    torch.manual_seed(0)
    patches = _Patches(config)
    model = _Cells(patches, config.hidden_size)
    hidden = [p for name, p in patches.model.named_parameters() if ".layers." in name and p.ndim == 2]
    any_shape = isinstance(config, Siglip2VisionConfig)
    title = f"training the mini vision transformer{' of any shape' if any_shape else ''} on scenes, once"
    loss = _loss(model, batch, _cut_out if any_shape else _whole, HALF, HALF, False)
    train(model, optimizers_of(model, hidden, lr=2e-3), loss, steps, title)
    patches.model.eval().save_pretrained(folder)


def _loss(
    model: _Cells,
    batch: int,
    show: Callable[[int, int], _Shown],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    classes_only: bool,
) -> Callable[[int], Tensor]:
    """Step → the loss of its scenes, which nobody draws again."""
    middle, spread = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))

    def loss(step: int) -> Tensor:
        shown = show(step, batch)
        pixels = (shown.pixels.float() / 255 - middle) / spread
        found = model(pixels.contiguous(memory_format=torch.channels_last))
        here, what = _cell_targets(shown, *found[0].shape[1:3])
        places = here > 0
        total = F.binary_cross_entropy_with_logits(found[0][..., 0], here, pos_weight=torch.tensor(4.0))
        for column, logits in enumerate(found[1 : 3 if classes_only else 4]):
            total = total + F.cross_entropy(logits[places], what[places][:, column].long())
        if classes_only:
            return total
        return total + 4 * F.smooth_l1_loss(found[4][places], what[places][:, 3:])

    return loss
