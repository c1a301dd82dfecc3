"""DINOv2 as a teacher, on a grid of any size; also an example of how little code a new teacher takes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch.nn.functional as F

from lit_vlm.core.backbones import check_one_source
from lit_vlm.core.batch import Grid, Images, VisualTokens
from lit_vlm.encoders import HFEncoder
from lit_vlm.teachers.base import EncoderTeacher


class DINOv2(EncoderTeacher):
    """Patch features of DINOv2's last block, pooled to `side` × `side` targets of the picture, squashed to a square.

    Args:
        name: hub name or local folder. Or null, with `config`.
        config: settings of a DINOv2 model, for random weights.
        side: targets per side of the square.

    Raises:
        ValueError: when not exactly one of `name` and `config` is given; and as `HFEncoder`.
    """

    def __init__(
        self, name: str | None = "facebook/dinov2-large", config: dict[str, Any] | None = None, side: int = 24
    ) -> None:
        check_one_source("teacher DINOv2", name, config)
        super().__init__(partial(HFEncoder, name=name, config=config, layer=-1))
        self.side = side
        self.pixels = replace(self.pixels, resize="squash")

    def identity(self) -> str:
        """The identity of the encoder, and the side of the grid."""
        return f"{super().identity()} {self.side}"

    def __call__(self, images: Images) -> VisualTokens:
        """Features `[n · side², width]`.

        Raises:
            ValueError: for pictures of another size than the encoder's.
        """
        tokens = super().__call__(images)
        maps = tokens.features.float().view(len(images), *tokens.grids[0][:2], self.width).permute(0, 3, 1, 2)
        pooled = F.interpolate(maps, (self.side, self.side), mode="bilinear", antialias=True, align_corners=False)
        return VisualTokens(
            pooled.flatten(2).transpose(1, 2).flatten(0, 1), (Grid(self.side, self.side),) * len(images)
        )
