"""The ConvNeXt of DINOv3: pictures of any size and shape through a convolutional net."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DINOv3ConvNextModel

from lit_vlm.core.backbones import NamedModel, cut_config, pretrained_backbone, vision_config
from lit_vlm.core.batch import Images, PixelSpec, VisualTokens
from lit_vlm.core.part import StateDict
from lit_vlm.core.pretrained import resolve
from lit_vlm.core.transfer import send
from lit_vlm.encoders.base import IMAGENET_MEAN, IMAGENET_STD, Encoder, PatchGrid

DINOV3 = "dinov3_convnext"


class DINOv3ConvNeXt(NamedModel, Encoder):
    """The ConvNeXt that DINOv3's largest transformer was distilled into (arXiv 2508.10104), before its norm.

    A picture keeps its shape: `data.transform` `NativeArea`, `AreaLimit` or `Native` resizes it to sides that are
    multiples of the stride. Pictures of a batch run together, padded to the largest, so that every layer runs once per
    forward pass whatever their sizes; what is padded is zero in front of every layer, as the edge of a picture is, so a
    picture has the same features in any company. Stages behind the one that is read are not built.

    Args:
        name: hub name or local folder; the weights come from there. Or null, with `config`.
        config: settings of a `dinov3_convnext`, for random weights.
        depth: the stage that is read: 0 to 3, of stride 4, 8, 16 and 32; −1 is the last.

    Raises:
        ValueError: when not exactly one of `name` and `config` is given, for a model of another kind, or a stage that
            it does not have.
    """

    def __init__(self, name: str | None = None, config: dict[str, Any] | None = None, depth: int = -1) -> None:
        super().__init__()
        self.name = name
        self.config: Any = vision_config("DINOv3ConvNeXt", name, config, (DINOV3,))
        stages = len(self.config.depths)
        if not -stages <= depth < stages:
            raise ValueError(f"DINOv3ConvNeXt: depth {depth} is none of the {stages} stages of {name or 'this config'}")
        kept = depth % stages + 1
        self.config.depths, self.config.hidden_sizes = self.config.depths[:kept], self.config.hidden_sizes[:kept]
        self.backbone = DINOv3ConvNextModel._from_config(self.config, dtype=torch.get_default_dtype())
        self.backbone.layer_norm = nn.Identity()
        self.width = self.config.hidden_sizes[-1]
        stride = 4 * 2 ** (kept - 1)
        self.patch_grid = PatchGrid(stride)
        self.pixels = PixelSpec(None, stride, IMAGENET_MEAN)
        self._set_normalisation(IMAGENET_MEAN, IMAGENET_STD)

    def pretrained_state(self) -> StateDict | None:
        """Weights of the kept stages; raises as `pretrained_backbone`."""
        if self.name is None:
            return None
        return pretrained_backbone(DINOv3ConvNextModel, resolve(self.name), self.backbone, config=self.config)

    def standalone(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments with the configuration of the kept stages in place of the name, and the last of them read."""
        return {**arguments, "name": None, "config": cut_config(self.config), "depth": -1}

    def blocks(self) -> list[nn.Module]:
        """The layers of all stages."""
        return [layer for stage in self.backbone.model.stages for layer in stage.layers]

    def forward(self, images: Images) -> VisualTokens:
        """Features `[t, d_e]`, picture by picture, row by row.

        Raises:
            ValueError: as `check_multiples`.
        """
        self.check_multiples(images)
        x = self._padded(images).contiguous(memory_format=torch.channels_last)  # as in TimmEncoder
        for index, stage in enumerate(self.backbone.model.stages):
            for layer in stage.downsample_layers:  # whose windows do not cross the edge of a picture
                x = layer(x)
            inside = self._inside(images, 4 * 2**index)
            seen = None if inside is None else send(inside, x.device)[:, None]
            for layer in stage.layers:
                x = layer(x if seen is None else x * seen)
        grids = tuple(self.patch_grid(*size) for size in images.sizes)
        features = x.permute(0, 2, 3, 1).flatten(0, 2)
        if inside is not None:
            features = features[send(inside.flatten().nonzero()[:, 0], x.device)]
        return VisualTokens(features, grids)

    def _padded(self, images: Images) -> Tensor:
        """Normalised pixels of all pictures, with zeros to the right and below: `[n, 3, h, w]` of the largest sides."""
        height, width = (max(size[axis] for size in images.sizes) for axis in (0, 1))
        dtype = next(self.backbone.parameters()).dtype
        found: dict[int, Tensor] = {}
        for indices, pixels in images.groups():
            x = self.normalise(pixels, dtype)
            x = F.pad(x, (0, width - x.shape[3], 0, height - x.shape[2]))
            if len(indices) == len(images):
                return x
            found |= dict(zip(indices, x, strict=True))
        return torch.stack([found[index] for index in range(len(images))])

    @staticmethod
    def _inside(images: Images, stride: int) -> Tensor | None:
        """On the host, the places of a map `[n, rows, cols]` that belong to a picture; None where all do."""
        if len(set(images.sizes)) == 1:
            return None
        rows, cols = (torch.tensor([size[axis] // stride for size in images.sizes], device="cpu") for axis in (0, 1))
        down, across = (torch.arange(int(counts.max()), device="cpu") for counts in (rows, cols))
        return (down[None, :, None] < rows[:, None, None]) & (across[None, None] < cols[:, None, None])
