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
    """A map of layouts that applies `first`, and `then` to its result."""

    first: GridMap
    then: GridMap

    def __call__(self, grid: Grid) -> Grid:
        """The layout after both."""
        return self.then(self.first(grid))


def same_grid(grid: Grid) -> Grid:
    """The layout unchanged: the map of a part that gives one token for each that it gets."""
    return grid


class Projector(Part, ABC):
    """Visual tokens `[t, in_width]` → visual tokens `[t', out_width]`.

    Args:
        in_width: width of the encoder.
        out_width: width of the decoder.

    Attributes:
        grid_map: layout of an image's tokens before projection → layout after it. It is called in loader workers, so it
            must be a function or a small object that pickles, never a bound method of the module.
    """

    grid_map: GridMap

    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__()
        self.in_width, self.out_width = in_width, out_width
        self.grid_map = same_grid

    @abstractmethod
    def forward(self, tokens: VisualTokens) -> VisualTokens:
        """Project the tokens of all images at once: `[t, in_width]` → `[t', out_width]`, laid out by `grid_map`."""
