"""The projector slot."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from lit_vlm.core.batch import Grid, VisualTokens
from lit_vlm.core.part import Part

GridMap = Callable[[Grid], Grid]


@dataclass(frozen=True)
class InTurn:
    """One map after the other."""

    first: GridMap
    then: GridMap

    def __call__(self, grid: Grid) -> Grid:
        """The layout after both."""
        return self.then(self.first(grid))


def same_grid(grid: Grid) -> Grid:
    """The layout of a projector that maps each token on its own."""
    return grid


class Projector(Part, ABC):
    """Visual tokens `[t, in_width]` → visual tokens `[t', out_width]`.

    Args:
        in_width: width of the encoder.
        out_width: width of the decoder.

    Attributes:
        grid_map: the layout of an image's tokens after projection, from that before. It is called in loader workers,
            so it must be a function or a small object that pickles, never a bound method of the module.
    """

    grid_map: GridMap

    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__()
        self.in_width, self.out_width = in_width, out_width
        self.grid_map = same_grid

    @abstractmethod
    def forward(self, tokens: VisualTokens) -> VisualTokens:
        """Project all images at once."""
