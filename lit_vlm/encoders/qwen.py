"""The vision towers of Qwen2.5-VL and Qwen3-VL: pictures of any size, all patches of a batch in one row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModel
from transformers.vision_utils import (
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from lit_vlm.core.backbones import NamedModel, pretrained_backbone, vision_config
from lit_vlm.core.batch import Images, PixelSpec, VisualTokens
from lit_vlm.core.part import StateDict
from lit_vlm.core.pretrained import plain_config, resolve
from lit_vlm.core.transfer import send
from lit_vlm.encoders.base import CLIP_MEAN, CLIP_STD, HALF, Encoder, PatchGrid
from lit_vlm.encoders.layers import Merge, ReadLayers
from lit_vlm.encoders.windows import pixel_windows
from lit_vlm.projectors.qwen import TOWER

QWEN2_5 = "qwen2_5_vl_vision"
# model_type → (mean, std) of its image processor
VISION_MODELS = {
    QWEN2_5: (CLIP_MEAN, CLIP_STD),
    "qwen3_vl_vision": (HALF, HALF),
    "qwen3_vl_moe_vision": (HALF, HALF),
}


class _Geometry(NamedTuple):
    """What the tower must know of the sizes of a batch.

    Attributes:
        sizes: `[n, 3]` on the host: one frame, rows and columns of patches of each picture.
        given: what it would else compute from `sizes` on the device, by the names of its arguments.
        places: `[t]`, for each patch of each picture, row by row, where its state is.
    """

    sizes: Tensor
    given: dict[str, Tensor]
    places: Tensor


class QwenEncoder(NamedModel, Encoder):
    """The vision tower of Qwen2.5-VL (arXiv 2502.13923, section 2.1.1) or Qwen3-VL (arXiv 2511.21631), without merger.

    A picture keeps its shape: `data.transform` `NativeArea` resizes it to sides that are multiples of two patches. All
    patches of a batch are one row, in which a patch sees those of its own picture (in most blocks of Qwen2.5-VL, of its
    own window), so every block runs once per forward pass whatever the sizes. A picture counts as two equal frames, as
    published. Blocks behind the last that is read are not built.

    The tower's merger, which makes one vector of the decoder's width of 2 × 2 patches, is `projectors.QwenMerger`; any
    other projector will do. What Qwen3-VL adds to early layers of its decoder (DeepStack, which has mergers of its own)
    is left out; the layers that it reads can be read here, as features of the tokens: `layer: [9, 17, 25, -1]`.

    Args:
        name: hub name or local folder of the whole model or of the tower; the weights come from there. Or null, with
            `config`.
        config: settings of a `qwen2_5_vl_vision`, `qwen3_vl_vision` or `qwen3_vl_moe_vision`, for random weights.
        layer: index into the hidden states: 0 the embeddings, −1 the last block, which the merger is made for. Or
            several, see `merge`.
        merge: what becomes of several layers: `concat` puts their features side by side, `sum` adds them.

    Raises:
        ValueError: when not exactly one of `name` and `config` is given, for a model of another kind, or as
            `ReadLayers.of`.
    """

    layers: ReadLayers

    def __init__(
        self,
        name: str | None = None,
        config: dict[str, Any] | None = None,
        layer: int | list[int] = -1,
        merge: Merge = "concat",
    ) -> None:
        super().__init__()
        self.name = name
        self.config: Any = vision_config("QwenEncoder", name, config, VISION_MODELS)
        mean, std = VISION_MODELS[self.config.model_type]
        self.layers = ReadLayers.of(layer, merge, self.config.depth, name or "this config")
        self.config.depth = self.layers.last
        if hasattr(self.config, "deepstack_visual_indexes"):
            self.config.deepstack_visual_indexes = []  # their mergers: nothing reads them
        self.backbone = AutoModel.from_config(self.config, dtype=torch.get_default_dtype())
        self.backbone.merger = nn.Identity()
        self.width = self.config.hidden_size * self.layers.times
        self.patch_grid = PatchGrid(self.config.patch_size)
        self.pixels = PixelSpec(None, self.config.patch_size * self.config.spatial_merge_size, mean)
        self._set_normalisation(mean, std)

    def pretrained_state(self) -> StateDict | None:
        """Weights of the embeddings and the kept blocks, none else is read; raises as `pretrained_backbone`."""
        if self.name is None:
            return None
        source = resolve(self.name)
        return pretrained_backbone(type(self.backbone), source, self.backbone, config=self.config, renamed=TOWER)

    def standalone(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments with the configuration of the kept blocks in place of the name, and the last of them read."""
        return {**arguments, "name": None, "config": plain_config(self.config), "layer": self.layers.from_last}

    def blocks(self) -> list[nn.Module]:
        """Transformer blocks."""
        return list(self.backbone.blocks)

    def forward(self, images: Images) -> VisualTokens:
        """Features `[t, d_e]`, picture by picture, row by row.

        Raises:
            ValueError: as `check_multiples`.
        """
        self.check_multiples(images)
        patches = self._patches(images)
        geometry = self._geometry(images.sizes, patches.device)

        def run() -> Tensor:
            states: Tensor = self.backbone(patches, geometry.sizes, **geometry.given).last_hidden_state
            return states

        grids = tuple(self.patch_grid(*size) for size in images.sizes)
        return VisualTokens(self.layers.states(run, self.blocks())[geometry.places], grids)

    def _patches(self, images: Images) -> Tensor:
        """Normalised pixels of all patches, those of a square that is merged one after the other: `[t, 3 · 2 · p²]`."""
        windows = pixel_windows(images, self.config.patch_size, self.config.spatial_merge_size).flatten(0, 1)
        pixels = self.normalise(windows, next(self.backbone.parameters()).dtype)  # [t, 3, p, p]
        frames = pixels[:, :, None].expand(-1, -1, self.config.temporal_patch_size, -1, -1)
        return frames.reshape(len(pixels), -1)

    def _geometry(self, sizes: tuple[tuple[int, int], ...], device: torch.device) -> _Geometry:
        """Made on the host, which knows all sizes, so that nothing waits for the device.

        Attention reads where pictures and windows end on the host, from `sizes` and `cu_window_seqlens`.
        """
        side = self.config.spatial_merge_size
        with torch.device("cpu"):
            grids = [self.patch_grid(*size) for size in sizes]
            shapes = torch.tensor([(1, grid.rows, grid.cols) for grid in grids])
            position = get_vision_position_ids(shapes, side)  # [t, 2]: row and column
            lengths, cols = shapes[:, 1] * shapes[:, 2], shapes[:, 2]
            starts = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
            patch = starts + position[:, 0] * cols.repeat_interleave(lengths) + position[:, 1]
            given = {"position_ids": send(position, device)}
            if self.config.model_type == QWEN2_5:
                order, ends = get_vision_window_index(shapes, side, self.config.window_size, self.config.patch_size)
                given |= {"window_index": send(order, device), "cu_window_seqlens": ends}
                patch = patch.unflatten(0, (-1, side**2))[order].flatten()
            else:
                points, weights = get_vision_interpolation_indices_and_weights(
                    shapes,
                    self.backbone.num_grid_per_side,
                    mode=self.backbone.interpolation_mode,
                    align_corners=self.backbone.interpolation_align_corners,
                    spatial_merge_size=side,
                )
                given |= {"interp_indices": send(points, device), "interp_weights": send(weights, device)}
            return _Geometry(shapes, given, send(patch.argsort(), device))
