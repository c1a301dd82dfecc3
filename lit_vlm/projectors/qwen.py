"""The mergers of Qwen2.5-VL and Qwen3-VL, which stand between their vision towers and their decoders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModel

from lit_vlm.core.backbones import NamedModel, pretrained_backbone, vision_config
from lit_vlm.core.batch import VisualTokens
from lit_vlm.core.part import StateDict
from lit_vlm.core.pretrained import made_config, resolve
from lit_vlm.projectors.base import Projector
from lit_vlm.projectors.downsample import Fold, fold

TOWER = {r"^(model\.)?visual\.": ""}
"""Published name of a weight of the tower → its name in the tower alone; both forms of checkpoints there are."""
VISION_MODELS = ("qwen2_5_vl_vision", "qwen3_vl_vision", "qwen3_vl_moe_vision")


class QwenMerger(NamedModel, Projector):
    """A norm of each patch, 2×2 fold, Linear, GELU, Linear: the merger of Qwen2.5-VL or Qwen3-VL.

    It leaves a quarter of the tokens.

    Args:
        in_width: width of the encoder.
        out_width: width of the decoder.
        name: hub name or local folder of the whole model, or of its tower; the weights come from there, and go with
            `encoders.QwenEncoder` of the same name and `layer: -1`. Null: random weights.
        model_type: whose merger it is where `name` is null: `qwen2_5_vl_vision` (RMSNorm), or `qwen3_vl_vision` or
            `qwen3_vl_moe_vision` (LayerNorm).

    Raises:
        ValueError: for widths that are not those of the published merger, or a model of another kind.
    """

    def __init__(
        self, in_width: int, out_width: int, name: str | None = None, model_type: str = "qwen3_vl_vision"
    ) -> None:
        super().__init__(in_width, out_width)
        self.name = name
        self.config: Any
        if name is None:
            if model_type not in VISION_MODELS:
                raise ValueError(
                    f"projector QwenMerger: model_type '{model_type}' is none of {', '.join(VISION_MODELS)}"
                )
            settings = {"hidden_size": in_width, "out_hidden_size": out_width, "num_heads": 1}
            self.config = made_config(model_type, settings, "projector QwenMerger")
        else:
            self.config = vision_config("projector QwenMerger", name, None, VISION_MODELS)
            widths = self.config.hidden_size, self.config.out_hidden_size
            if widths != (in_width, out_width):
                raise ValueError(
                    f"projector QwenMerger: that of {name} makes {widths[1]} features of {widths[0]}, and here the "
                    f"encoder gives {in_width} and the decoder takes {out_width}: take the tower (layer −1) and a "
                    "decoder of its width, or another projector"
                )
        self.config.depth = 0
        if hasattr(self.config, "deepstack_visual_indexes"):
            self.config.deepstack_visual_indexes = []
        tower = AutoModel.from_config(self.config, dtype=torch.get_default_dtype())
        self.backbone, self._tower = tower.merger, type(tower)
        self.side = self.config.spatial_merge_size
        self.grid_map = Fold(self.side)

    def pretrained_state(self) -> StateDict | None:
        """The merger's weights, none else is read but the embeddings; raises as `pretrained_backbone`."""
        if self.name is None:
            return None
        source = resolve(self.name)
        return pretrained_backbone(self._tower, source, self.backbone, "merger.", config=self.config, renamed=TOWER)

    def standalone(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments with the kind of model in place of its name."""
        return {**arguments, "name": None, "model_type": self.config.model_type}

    def forward(self, tokens: VisualTokens) -> VisualTokens:
        """`[t, in_width]` → `[t / 4, out_width]`."""
        grids = tuple(self.grid_map(grid) for grid in tokens.grids)
        patches = fold(tokens, self.side).unflatten(1, (-1, self.in_width)).flatten(0, 1)
        return VisualTokens(self.backbone(patches), grids)
