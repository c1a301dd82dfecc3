"""Small encoders that see scenes: what stands in each cell of a picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import SiglipVisionConfig, SiglipVisionModel

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
    """A vision transformer's features behind its last norm, as a picture of patches."""

    def __init__(self) -> None:
        super().__init__()
        self.model = SiglipVisionModel._from_config(VIT, attn_implementation="sdpa")

    def forward(self, pixels: Tensor) -> Tensor:
        features = self.model(pixels).last_hidden_state  # [n, patches, d]
        side = VIT.image_size // VIT.patch_size
        return features.transpose(1, 2).unflatten(2, (side, side))


def _cell_targets(scenes: list[Scene], side: int) -> tuple[Tensor, Tensor]:
    """1 where a centre is, `[n, side, side]`; shape, colour, size, depth, row, column there, `[n, side, side, 6]`."""
    here, what = torch.zeros(len(scenes), side, side), torch.zeros(len(scenes), side, side, 6)
    for number, scene in enumerate(scenes):
        # Nearest last: where two centres share a cell, the nearer thing overwrites the other.
        for thing in sorted(scene.things, key=lambda thing: -thing.z):
            column, row, depth = scene.camera.project(thing.centre)
            i, j = min(side - 1, int(row * side)), min(side - 1, int(column * side))
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
    train(model, [optimizer], _loss(model, batch, config.mean, config.std, classes_only), steps, title)
    state = {name: tensor.contiguous() for name, tensor in level.model.state_dict().items()}
    save_file(state, folder / "model.safetensors")


def train_vit(folder: Path, steps: int = 600, batch: int = 48) -> None:
    """Train the vision transformer to name what stands in each cell of a picture, and save it.

    Args:
        folder: where configuration and weights are saved, as transformers reads them.
        steps: optimizer steps.
        batch: pictures per step.
    """
    torch.manual_seed(0)
    patches = _Patches()
    model = _Cells(patches, VIT.hidden_size)
    hidden = [p for name, p in patches.model.named_parameters() if ".layers." in name and p.ndim == 2]
    title = "training the mini vision transformer on scenes, once"
    train(model, optimizers_of(model, hidden, lr=2e-3), _loss(model, batch, HALF, HALF, False), steps, title)
    patches.model.eval().save_pretrained(folder)


def _loss(
    model: _Cells, batch: int, mean: tuple[float, ...], std: tuple[float, ...], classes_only: bool
) -> Callable[[int], Tensor]:
    """Step → the loss of its scenes, which nobody draws again."""
    middle, spread = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))

    def loss(step: int) -> Tensor:
        scenes = [sample_scene(f"mini-{step}-{index}") for index in range(batch)]
        pixels = torch.from_numpy(np.stack([render(scene, SIZE).image for scene in scenes])).permute(0, 3, 1, 2)
        found = model(((pixels.float() / 255 - middle) / spread).contiguous(memory_format=torch.channels_last))
        here, what = _cell_targets(scenes, found[0].shape[1])
        places = here > 0
        total = F.binary_cross_entropy_with_logits(found[0][..., 0], here, pos_weight=torch.tensor(4.0))
        for column, logits in enumerate(found[1 : 3 if classes_only else 4]):
            total = total + F.cross_entropy(logits[places], what[places][:, column].long())
        if classes_only:
            return total
        return total + 4 * F.smooth_l1_loss(found[4][places], what[places][:, 3:])

    return loss
