"""A teacher whose targets are maps that come with each picture."""

from __future__ import annotations

from typing import Literal

from lit_vlm.core.batch import Images, PixelSpec, VisualTokens
from lit_vlm.teachers.base import Teacher

MapName = Literal["depth", "segmentation"]
WIDTHS: dict[MapName, int] = {"depth": 16, "segmentation": 15}
"""Map → values per cell, as `worlds.Scenes` draws it."""


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

    def identity(self) -> str:
        """`KnownMap` and the name of the map."""
        return f"KnownMap {self.known}"
