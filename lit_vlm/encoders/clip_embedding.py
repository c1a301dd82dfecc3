"""CLIP's embedding of a whole image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from lit_vlm.core.backbones import NamedModel, check_one_source, pretrained_backbone
from lit_vlm.core.batch import Grid, Images, PixelSpec, VisualTokens
from lit_vlm.core.part import StateDict
from lit_vlm.core.pretrained import made_config, plain_config, resolve
from lit_vlm.encoders.base import CLIP_MEAN, CLIP_STD, Encoder, PatchGrid


class CLIPEmbedding(NamedModel, Encoder):
    """One token per image: the projected CLS token of a CLIP vision model; the generation target of OLA-VLM.

    The default is the CLIP ViT-H/14 of Stable unCLIP, which generates pictures from this embedding.

    Args:
        name: hub name or local folder. Or null, with `config`.
        config: settings of a CLIP vision model with `projection_dim`, for random weights.
        subfolder: where the model is in its repository.

    Raises:
        ValueError: when not exactly one of `name` and `config` is given, or settings do not go together.
    """

    def __init__(
        self,
        name: str | None = "stabilityai/stable-diffusion-2-1-unclip",
        config: dict[str, Any] | None = None,
        subfolder: str = "image_encoder",
    ) -> None:
        super().__init__()
        check_one_source("CLIPEmbedding", name, config)
        self.name, self.subfolder = name, subfolder
        if name is None:
            found = made_config("clip_vision_model", config or {}, "CLIPEmbedding")
        else:
            found = CLIPVisionConfig.from_pretrained(resolve(name, False, (subfolder,)), subfolder=subfolder)
        self.backbone = CLIPVisionModelWithProjection(found)
        self.width = found.projection_dim
        self.patch_grid = PatchGrid(found.image_size)
        self.pixels = PixelSpec(found.image_size, found.image_size, CLIP_MEAN, "crop")
        self._set_normalisation(CLIP_MEAN, CLIP_STD)

    def standalone(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments with the network's configuration in place of its name."""
        return {**arguments, "name": None, "config": plain_config(self.backbone.config)}

    def pretrained_state(self) -> StateDict | None:
        """Weights of the vision model and its projection.

        Raises:
            ValueError: where the files lack weights, have them in other shapes, or cannot be read.
        """
        if self.name is None:
            return None
        return pretrained_backbone(
            CLIPVisionModelWithProjection,
            resolve(self.name, folders=(self.subfolder,)),
            self.backbone,
            subfolder=self.subfolder,
        )

    def blocks(self) -> list[nn.Module]:
        """Transformer blocks."""
        return list(self.backbone.vision_model.encoder.layers)

    def forward(self, images: Images) -> VisualTokens:
        """Embeddings `[n, d_e]`, not normalised."""
        pixels = self.normalise(self.tiles(images), next(self.backbone.parameters()).dtype)
        return VisualTokens(self.backbone(pixels).image_embeds, (Grid(1, 1),) * len(images))
