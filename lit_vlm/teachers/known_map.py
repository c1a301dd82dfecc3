"""Targets that come with the picture."""

from __future__ import annotations

from typing import Literal

from lit_vlm.core.batch import Images, PixelSpec, VisualTokens
from lit_vlm.teachers.base import Teacher

MapName = Literal["depth", "segmentation"]
WIDTHS: dict[MapName, int] = {"depth": 16, "segmentation": 15}
"""Values per cell of the maps that `worlds.Scenes` draws, which are what this teacher stands for."""


class KnownMap(Teacher):
    """Exact maps of drawn scenes in place of a network's features: what a perfect teacher would say.

    Args:
        name: `depth` or `segmentation`, as `worlds.Scenes` hands them out with `maps`.
    """

    def __init__(self, name: MapName) -> None:
        self.known = name
        self.width = WIDTHS[name]
        self.pixels = PixelSpec(None, 1, (0.5, 0.5, 0.5))

    def __call__(self, images: Images) -> VisualTokens:
        """Nothing to compute from.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"KnownMap reads the map '{self.known}' of a picture and computes nothing from pixels")

    def identity(self) -> str:
        """The name of the map."""
        return f"KnownMap {self.known}"
