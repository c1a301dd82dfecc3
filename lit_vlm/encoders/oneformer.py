"""The Swin backbone of OneFormer, a network that segments pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import nn
from transformers import OneFormerConfig, OneFormerModel, SwinBackbone, SwinConfig
from transformers.models.swin.modeling_swin import SwinLayer

from lit_vlm.core.backbones import NamedModel, check_one_source, pretrained_backbone
from lit_vlm.core.batch import Grid, Images, PixelSpec, VisualTokens
from lit_vlm.core.part import StateDict
from lit_vlm.core.pretrained import made_config, plain_config, resolve
from lit_vlm.encoders.base import IMAGENET_MEAN, IMAGENET_STD, Encoder, PatchGrid

STRIDE = 32


class OneFormerSwin(NamedModel, Encoder):
    """The last feature map of OneFormer's Swin backbone; the segmentation target of OLA-VLM.

    Args:
        name: hub name or local folder. Or null, with `config`.
        config: settings of a Swin backbone, for random weights.
        image_size: side of the square in pixels; 768 gives 24 × 24 features.
        input_size: side in pixels that the network sees: pictures are resized to it, and the feature map is resized
            back to the grid of `image_size`. 800, as OneFormer's processor does in OLA-VLM's code; null: `image_size`.

    Raises:
        ValueError: when not exactly one of `name` and `config` is given, settings do not go together, or `image_size`
            is no multiple of 32.
    """

    def __init__(
        self,
        name: str | None = "shi-labs/oneformer_coco_swin_large",
        config: dict[str, Any] | None = None,
        image_size: int = 768,
        input_size: int | None = 800,
    ) -> None:
        super().__init__()
        check_one_source("OneFormerSwin", name, config)
        if image_size % STRIDE:
            raise ValueError(f"image_size {image_size} is no multiple of the stride {STRIDE}")
        self.name, self.input_size = name, input_size
        found = made_config("swin", config or {}, "OneFormerSwin") if name is None else _backbone_config(name)
        found.set_output_features_output_indices(out_features=["stage4"], out_indices=None)
        self.backbone = SwinBackbone(found)
        self.width = self.backbone.num_features[-1]
        self.patch_grid = PatchGrid(STRIDE)
        self.pixels = PixelSpec(image_size, STRIDE, IMAGENET_MEAN, "squash")
        self._set_normalisation(IMAGENET_MEAN, IMAGENET_STD)

    def standalone(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments with the network's configuration in place of its name."""
        return {**arguments, "name": None, "config": plain_config(self.backbone.config)}

    def pretrained_state(self) -> StateDict | None:
        """Weights of the backbone.

        Raises:
            ValueError: where the files lack weights, have them in other shapes, or cannot be read.
        """
        if self.name is None:
            return None
        return pretrained_backbone(OneFormerModel, resolve(self.name), self.backbone, "pixel_level_module.encoder.")

    def blocks(self) -> list[nn.Module]:
        """The Swin blocks of all stages."""
        return [module for module in self.backbone.modules() if isinstance(module, SwinLayer)]

    def forward(self, images: Images) -> VisualTokens:
        """Features `[t, d_e]`, row by row.

        Raises:
            ValueError: as `check_sizes`.
        """
        pixels = self.tiles(images)
        side = self.patch_grid(*pixels.shape[2:]).rows
        if self.input_size and self.input_size != pixels.shape[2]:
            size = (self.input_size, self.input_size)
            resized = F.interpolate(pixels.float(), size, mode="bilinear", antialias=True, align_corners=False)
            pixels = resized.round().to(pixels.dtype)
        (features,) = self.backbone(self.normalise(pixels, next(self.backbone.parameters()).dtype)).feature_maps
        if features.shape[2:] != (side, side):
            features = F.interpolate(features.float(), (side, side), mode="bilinear", align_corners=False)
        flat = features.flatten(2).transpose(1, 2).reshape(-1, self.width)
        return VisualTokens(flat, (Grid(side, side),) * len(images))


def _backbone_config(name: str) -> SwinConfig:
    config = OneFormerConfig.from_pretrained(resolve(name, weights=False)).backbone_config
    if not isinstance(config, SwinConfig):
        raise ValueError(f"{name} has no Swin backbone")
    return config
