"""A teacher whose targets are maps that come with each picture."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lit_vlm.core.batch import Images, PixelSpec, VisualTokens
from lit_vlm.teachers.base import Teacher

MapName = Literal["depth", "segmentation"]
WIDTHS: dict[MapName, int] = {"depth": 16, "segmentation": 15}
"""Map → values per cell, as `worlds.Scenes` draws it."""

KINDS = ((0.15, 0.15, 0.15), (0.90, 0.60, 0.00), (0.00, 0.60, 0.50), (0.80, 0.47, 0.65), (0.95, 0.90, 0.25))
"""Colours of background and shapes, the first columns of the segmentation map."""


class KnownMap(Teacher):
    """Exact maps of drawn scenes in place of a network's features: the targets of a perfect teacher.

    Args:
        name: `depth` or `segmentation`, as `worlds.Scenes` hands them out with `maps`.
    """

    def __init__(self, name: MapName) -> None:
        self.known = name
        self.width = WIDTHS[name]
        self.pixels = PixelSpec(None, 1, (0.5, 0.5, 0.5))

    def __call__(self, images: Images) -> VisualTokens:
        """Refuse to compute features, as they come with the picture.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"KnownMap reads the map '{self.known}' of a picture and computes nothing from pixels")

    def colours(self, features: Tensor) -> Tensor | None:
        """Depth from white, near, to black, far; of segmentation, a colour for the kind of thing that is likeliest."""
        if self.known == "depth":
            shares = features.clamp(min=0)
            ranges = torch.linspace(1, 0, self.width, device=features.device)
            near = (shares * ranges).sum(-1) / shares.sum(-1).clamp(min=1e-6)
            return near[:, None].expand(-1, 3)
        kinds = features[:, : len(KINDS)].argmax(-1)
        return torch.tensor(KINDS, device=features.device)[kinds]

    def identity(self) -> str:
        """`KnownMap` and the name of the map."""
        return f"KnownMap {self.known}"
