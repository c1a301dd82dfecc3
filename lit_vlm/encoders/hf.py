"""Vision transformers of the transformers library: CLIP, SigLIP, DINOv2 and v3, AIMv2, InternViT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, InternVLForConditionalGeneration, PretrainedConfig

from lit_vlm.core.backbones import NamedModel, cut_config, pretrained_backbone, vision_config
from lit_vlm.core.batch import Images, PixelSpec, VisualTokens
from lit_vlm.core.part import StateDict
from lit_vlm.core.pretrained import resolve
from lit_vlm.encoders.base import CLIP_MEAN, CLIP_STD, HALF, IMAGENET_MEAN, IMAGENET_STD, Encoder, PatchGrid
from lit_vlm.encoders.layers import Merge, ReadLayers

INTERN_VIT = "internvl_vision"
# model_type → (whether there is a CLS token, mean, std, the norm after the last block)
VISION_MODELS = {
    "clip_vision_model": (True, CLIP_MEAN, CLIP_STD, "post_layernorm"),
    "siglip_vision_model": (False, HALF, HALF, "post_layernorm"),
    "dinov2": (True, IMAGENET_MEAN, IMAGENET_STD, "layernorm"),
    "dinov2_with_registers": (True, IMAGENET_MEAN, IMAGENET_STD, "layernorm"),
    "dinov3_vit": (True, IMAGENET_MEAN, IMAGENET_STD, "norm"),
    "aimv2_vision_model": (False, CLIP_MEAN, CLIP_STD, "rms_norm"),
    INTERN_VIT: (True, IMAGENET_MEAN, IMAGENET_STD, "layernorm"),
}
ROTARY = ("dinov3_vit",)
"""Model types whose positions are computed for any size of pictures."""
# model_type → the setting that builds a pooling head, which nothing reads
HEADS = {"siglip_vision_model": "vision_use_head", "aimv2_vision_model": "use_head"}

# Settings of DINOv3 that draw other positions in each training step. They were made for its own training; here a frozen
# encoder would change from step to step, and processes would not train as one.
POSITIONS = ("pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale")


class HFEncoder(NamedModel, Encoder):
    """CLIP, SigLIP, DINOv2, DINOv3, AIMv2 or InternViT, read after chosen blocks, before any final norm.

    A picture of several tiles, one below the other as `data.Tiles` lays them out, gives the tokens of each tile in
    turn; so it must go without the CLS token.

    Blocks behind the last that is read are not built, and neither are the final norm and the pooling head: they would
    cost time and memory and never get a gradient (LLaVA-1.5 reads layer −2: the output of block 23 of 24).

    Args:
        name: hub name or local folder; the weights come from there. Or null, with `config`.
        config: a model configuration with `model_type`, for random weights.
        layer: index into the hidden states: 0 the embeddings, −1 the last block, −2 the one before. Or several, such as
            `[-9, -3]`, which are merged token by token.
        cls: whether the CLS token is kept, in front of the patches. Register tokens never are.
        merge: what becomes of several layers: `concat` puts their features side by side, in the order given, so that a
            token is as many times as wide; `sum` adds them.
        side: side of the square in pixels, for DINOv3, whose positions are computed; others have the size that
            they were trained with. Default: that of the configuration.

    Raises:
        ValueError: when not exactly one of `name` and `config` is given, for a model of another kind, a layer that it
            does not have or that is named twice, `cls` where there is no CLS token, or a `side` that it cannot have.
    """

    layers: ReadLayers

    def __init__(
        self,
        name: str | None = None,
        config: dict[str, Any] | None = None,
        layer: int | list[int] = -2,
        cls: bool = False,
        merge: Merge = "concat",
        side: int | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.config = vision_config("HFEncoder", name, config, VISION_MODELS)
        if side is not None:
            self.config.image_size = _checked(side, self.config)
        has_cls, mean, std, norm = VISION_MODELS[self.config.model_type]
        self.layers = ReadLayers.of(layer, merge, self.config.num_hidden_layers, name or "this config")
        if cls and not has_cls:
            raise ValueError(f"{self.config.model_type} has no CLS token to keep")
        self.config.num_hidden_layers = self.layers.last
        if self.config.model_type in HEADS:
            setattr(self.config, HEADS[self.config.model_type], False)
        for augmentation in POSITIONS if self.config.model_type == "dinov3_vit" else ():
            setattr(self.config, augmentation, None)
        # The dtype is the trainer's choice, not that of the files.
        self.backbone = AutoModel.from_config(self.config, dtype=torch.get_default_dtype())
        setattr(self.backbone, norm, nn.Identity())
        self.cls = cls
        self.prefix = int(has_cls) + int(getattr(self.config, "num_register_tokens", 0))
        self.width = self.config.hidden_size * self.layers.times
        size, patch = (value if isinstance(value, int) else value[0] for value in _sizes(self.config))
        self.patch_grid = PatchGrid(patch, prefix=int(cls))
        self.pixels = PixelSpec(size, patch, mean)
        self._set_normalisation(mean, std)

    def pretrained_state(self) -> StateDict | None:
        """Weights of the embeddings and the kept blocks.

        Raises:
            ValueError: where the files lack weights, have them in other shapes, or cannot be read.
        """
        if self.name is None:
            return None
        source = resolve(self.name)
        if self.config.model_type == INTERN_VIT:
            # InternViT is published as a part of InternVL alone, whose class finds it among the weights.
            return pretrained_backbone(InternVLForConditionalGeneration, source, self.backbone, "model.vision_tower.")
        return pretrained_backbone(type(self.backbone), source, self.backbone, config=self.config)

    def standalone(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments with the configuration of the kept blocks in place of the name, and the last of them read."""
        return {**arguments, "name": None, "config": cut_config(self.config), "layer": self.layers.from_last}

    def blocks(self) -> list[nn.Module]:
        """Transformer blocks."""
        encoder = self.backbone.encoder if hasattr(self.backbone, "encoder") else self.backbone.model
        return list(encoder.layers if hasattr(encoder, "layers") else encoder.layer)

    @property
    def skip(self) -> int:
        """Tokens in front of the patches that are left out."""
        return self.prefix - int(self.cls)

    @property
    def is_plain(self) -> bool:
        """Whether code that reads one layer, and leaves out one token in front at most, reads the same."""
        return len(self.layers.indices) == 1 and self.skip <= 1

    def forward(self, images: Images) -> VisualTokens:
        """Features `[t, d_e]`, row by row, after the CLS token where it is kept.

        Raises:
            ValueError: as `check_sizes`.
        """
        pixels = self.normalise(self.tiles(images), next(self.backbone.parameters()).dtype)
        states = self.layers.states(lambda: self.backbone(pixels).last_hidden_state, self.blocks())
        features = states[:, self.prefix :]  # [n, tokens, d_e]
        if self.cls:
            features = torch.cat([states[:, :1], features], dim=1)
        grids = tuple(self.patch_grid(*size) for size in images.sizes)
        return VisualTokens(features.reshape(-1, self.width), grids)


def _checked(side: int, config: PretrainedConfig) -> int:
    """The size of pictures, where a model can have it."""
    if config.model_type not in ROTARY:
        raise ValueError(
            f"side {side}: the positions of a '{config.model_type}' are learnt for pictures of "
            f"{config.image_size} pixels; leave it out, or take a checkpoint of that size"
        )
    if side < 1 or side % config.patch_size:
        raise ValueError(f"side {side} is no multiple of the patch, {config.patch_size}")
    return side


def _sizes(config: PretrainedConfig) -> tuple[int | list[int], int | list[int]]:
    return config.image_size, config.patch_size
