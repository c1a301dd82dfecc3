"""The vision transformer of Depth Anything, a network that estimates depth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Backbone, Dinov2Config

from lit_vlm.core.backbones import NamedModel, check_one_source, pretrained_backbone
from lit_vlm.core.batch import Images, PixelSpec, VisualTokens
from lit_vlm.core.part import StateDict
from lit_vlm.core.pretrained import made_config, plain_config, resolve
from lit_vlm.encoders.base import IMAGENET_MEAN, IMAGENET_STD, Encoder, PatchGrid

POSITIONS = "backbone.embeddings.position_embeddings"


class DepthAnything(NamedModel, Encoder):
    """Patch features of Depth Anything V2 without its depth head; the depth target of OLA-VLM.

    Several blocks are read, each passes the final norm, and their mean is the feature (OLA-VLM takes blocks 5, 12, 18
    and 24 of 24, as the published configuration says).

    Args:
        name: hub name or local folder. Or null, with `config`.
        config: settings of a DINOv2 backbone with `out_indices`, for random weights.
        image_size: side of the square in pixels; 336 gives 24 × 24 patches.
        taps: `mean` of all blocks that are read, or the `last` alone, as in OLA-VLM's probes.
        channels: `bgr`, as OLA-VLM's code hands pictures over by mistake, or `rgb`, as the network was trained.

    Raises:
        ValueError: when not exactly one of `name` and `config` is given, settings do not go together, or `image_size`
            is no multiple of the patch.
    """

    def __init__(
        self,
        name: str | None = "depth-anything/Depth-Anything-V2-Large-hf",
        config: dict[str, Any] | None = None,
        image_size: int = 336,
        taps: Literal["mean", "last"] = "mean",
        channels: Literal["bgr", "rgb"] = "bgr",
    ) -> None:
        super().__init__()
        check_one_source("DepthAnything", name, config)
        self.name, self.taps, self.channels = name, taps, channels
        found = made_config("dinov2", config or {}, "DepthAnything") if name is None else _backbone_config(name)
        if image_size % found.patch_size:
            raise ValueError(f"image_size {image_size} is no multiple of the patch {found.patch_size}")
        found.image_size = image_size
        found.apply_layernorm, found.reshape_hidden_states = True, False
        self.backbone = Dinov2Backbone(found)
        self.width = found.hidden_size
        self.patch_grid = PatchGrid(found.patch_size)
        self.pixels = PixelSpec(image_size, found.patch_size, IMAGENET_MEAN, "squash")
        self._set_normalisation(IMAGENET_MEAN, IMAGENET_STD)

    def standalone(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments with the network's configuration in place of its name."""
        return {**arguments, "name": None, "config": plain_config(self.backbone.config)}

    def pretrained_state(self) -> StateDict | None:
        """Weights of the transformer, its positions resized to this image size.

        Raises:
            ValueError: where the files lack weights, have them in other shapes, or cannot be read.
        """
        if self.name is None:
            return None
        prefix = "backbone."
        whole = DepthAnythingForDepthEstimation
        state = pretrained_backbone(whole, resolve(self.name), self.backbone, prefix)
        state[POSITIONS] = _resize_positions(state[POSITIONS], self.pixels.size // self.patch_grid.patch)  # type: ignore[operator]
        return state

    def blocks(self) -> list[nn.Module]:
        """Transformer blocks."""
        return list(self.backbone.encoder.layer)

    def forward(self, images: Images) -> VisualTokens:
        """Features `[t, d_e]`, row by row.

        Raises:
            ValueError: as `check_sizes`.
        """
        pixels = self.tiles(images)
        if self.channels == "bgr":
            pixels = pixels.flip(1)
        maps = self.backbone(self.normalise(pixels, next(self.backbone.parameters()).dtype)).feature_maps
        chosen = maps if self.taps == "mean" else maps[-1:]
        features = torch.stack([one[:, 1:] for one in chosen]).mean(0)  # without CLS
        return VisualTokens(features.reshape(-1, self.width), tuple(self.patch_grid(*size) for size in images.sizes))


def _backbone_config(name: str) -> Dinov2Config:
    config = DepthAnythingConfig.from_pretrained(resolve(name, weights=False)).backbone_config
    if not isinstance(config, Dinov2Config):
        raise ValueError(f"{name} has no DINOv2 backbone")
    return config


def _resize_positions(positions: Tensor, side: int) -> Tensor:
    """Position embeddings `[1, 1 + p², d]` on another grid, in DINOv2's own way: the grid is 0.1 larger than needed."""
    first, grid = positions[:, :1], positions[:, 1:]
    old = round(grid.shape[1] ** 0.5)
    if old == side:
        return positions
    grid = grid.unflatten(1, (old, old)).permute(0, 3, 1, 2)
    scale = (side + 0.1) / old
    resized = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic", align_corners=False)
    return torch.cat([first, resized.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
