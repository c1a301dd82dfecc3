"""SigLIP 2 NaFlex: pictures of any size and shape, one token for each patch of theirs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import Siglip2VisionModel

from lit_vlm.core.backbones import NamedModel, pretrained_backbone, vision_config
from lit_vlm.core.batch import Images, PixelSpec, VisualTokens
from lit_vlm.core.part import StateDict
from lit_vlm.core.pretrained import plain_config, resolve
from lit_vlm.encoders.base import HALF, Encoder, PatchGrid
from lit_vlm.encoders.layers import Merge, ReadLayers

SIGLIP2 = "siglip2_vision_model"


class NaFlexEncoder(NamedModel, Encoder):
    """SigLIP 2 in its NaFlex form (Tschannen et al. 2025, arXiv 2502.14786, section 2.4.2), before the final norm.

    A picture keeps its shape: `data.transform` resizes it to sides that are multiples of the patch, `PatchBudget` as
    published, and the table of positions is resized to its grid, as published. Pictures of a batch run together, padded
    to the longest, so that every block runs once per forward pass whatever their sizes. Blocks behind the last that is
    read are not built, and neither are the final norm and the pooling head.

    Args:
        name: hub name or local folder; the weights come from there. Or null, with `config`.
        config: settings of a `siglip2_vision_model`, for random weights.
        layer: index into the hidden states: 0 the embeddings, −1 the last block, −2 the one before. Or several, see
            `merge`.
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
        layer: int | list[int] = -2,
        merge: Merge = "concat",
    ) -> None:
        super().__init__()
        self.name = name
        # Checkpoints of SigLIP 2 whose names do not end in -naflex are of one size, siglip_vision_model: HFEncoder's.
        self.config: Any = vision_config("NaFlexEncoder", name, config, (SIGLIP2,))
        self.layers = ReadLayers.of(layer, merge, self.config.num_hidden_layers, name or "this config")
        self.config.num_hidden_layers = self.layers.last
        self.config.vision_use_head = False
        self.backbone = Siglip2VisionModel._from_config(self.config, dtype=torch.get_default_dtype())
        self.backbone.post_layernorm = nn.Identity()
        self.width = self.config.hidden_size * self.layers.times
        self.patch_grid = PatchGrid(self.config.patch_size)
        self.pixels = PixelSpec(None, self.config.patch_size, HALF)
        self._set_normalisation(HALF, HALF)

    def pretrained_state(self) -> StateDict | None:
        """Weights of the embeddings and the kept blocks; raises as `pretrained_backbone`."""
        if self.name is None:
            return None
        return pretrained_backbone(Siglip2VisionModel, resolve(self.name), self.backbone, config=self.config)

    def standalone(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments with the configuration of the kept blocks in place of the name, and the last of them read."""
        return {**arguments, "name": None, "config": plain_config(self.config), "layer": self.layers.from_last}

    def blocks(self) -> list[nn.Module]:
        """Transformer blocks."""
        return list(self.backbone.encoder.layers)

    def forward(self, images: Images) -> VisualTokens:
        """Features `[t, d_e]`, picture by picture, row by row.

        Raises:
            ValueError: as `check_multiples`.
        """
        self.check_multiples(images)
        grids = tuple(self.patch_grid(*size) for size in images.sizes)
        patches = self._patches(images)
        rows = pad_sequence(patches, batch_first=True)  # [n, most, 3 · patch²]
        # Made on the host, which knows all sizes: nothing waits for the device.
        lengths = torch.tensor([len(one) for one in patches], device="cpu")
        seen = torch.arange(rows.shape[1], device="cpu") < lengths[:, None]
        places = seen.flatten().nonzero()[:, 0].to(rows.device, non_blocking=True)
        shapes = torch.tensor([(grid.rows, grid.cols) for grid in grids], device="cpu")
        # As attention takes it, [n, 1, 1, most]: of another, transformers asks the device whether it hides anything.
        mask = None if bool(seen.all()) else seen[:, None, None].to(rows.device, non_blocking=True)

        def run() -> Tensor:
            states: Tensor = self.backbone(rows, mask, shapes).last_hidden_state
            return states

        return VisualTokens(self.layers.states(run, self.blocks()).flatten(0, 1)[places], grids)

    def _patches(self, images: Images) -> list[Tensor]:
        """Normalised pixels of each picture's patches, `[rows · cols, 3 · patch²]`, the colours of a pixel together."""
        patch, dtype = self.patch_grid.patch, next(self.backbone.parameters()).dtype
        found: dict[int, Tensor] = {}
        for indices, pixels in images.groups():
            x = self.normalise(pixels, dtype)
            x = x.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # [m, 3, rows, patch, cols, patch]
            found |= dict(zip(indices, x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2), strict=True))
        return [found[index] for index in range(len(images))]
