"""Projectors that fold a square of neighbouring tokens into the channels of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_vlm.core.batch import Grid, VisualTokens
from lit_vlm.core.transfer import send
from lit_vlm.projectors.base import Projector

TokenOrder = Literal["row", "col"]


@dataclass(frozen=True)
class Fold:
    """Map of layouts that folds side × side tokens into one; a last partial row or column counts as a whole one."""

    side: int
    token_order: TokenOrder = "row"

    def __call__(self, grid: Grid) -> Grid:
        """The folded grid; in column order the tokens read column by column, so rows and columns swap.

        Raises:
            ValueError: for a grid with other tokens than patches.
        """
        if grid.prefix or grid.row_end or grid.suffix:
            raise ValueError(
                f"model.projector (or model.embedder's merge) folds {self.side} × {self.side} patches and takes "
                f"patches only: no CLS token, row-end or further tokens, and this encoder gives {grid.prefix} before, "
                f"{grid.row_end} behind each row and {grid.suffix} behind all; set the encoder's cls to false where it "
                "has that argument, or take a projector that does not fold (MLP, Linear)"
            )
        rows, cols = -(-grid.rows // self.side), -(-grid.cols // self.side)
        return Grid(cols, rows) if self.token_order == "col" else Grid(rows, cols)


@lru_cache(maxsize=256)
def _sources(grid: Grid, side: int, token_order: TokenOrder) -> Tensor:
    """For each output token, the side² tokens of its image that it reads: `[t', side²]`, −1 for padding."""
    rows, cols = -(-grid.rows // side), -(-grid.cols // side)
    index = torch.arange(grid.rows * grid.cols).view(grid.rows, grid.cols)
    index = F.pad(index, (0, cols * side - grid.cols, 0, rows * side - grid.rows), value=-1)
    blocks = index.view(rows, side, cols, side)
    order = (2, 0, 1, 3) if token_order == "col" else (0, 2, 1, 3)
    return blocks.permute(order).reshape(rows * cols, side * side)


def fold(tokens: VisualTokens, side: int, token_order: TokenOrder = "row") -> Tensor:
    """Fold each side × side square of tokens into the channels of one, for images of any mix of sizes.

    Rows or columns that `side` does not divide are padded with zeros at their end. The channels of an output token are
    those of its inputs row by row: (r0c0, r0c1, r1c0, r1c1).

    Args:
        tokens: features `[t, d_e]`, patches only.
        side: tokens per side of the square.
        token_order: whether output tokens read row by row, or column by column (VILA-1.5 weights).

    Returns:
        `[t', side² · d_e]`.
    """
    features = tokens.features
    if len(set(tokens.grids)) == 1 and features.shape[0]:
        return _fold_uniform(features, tokens.grids, side, token_order)
    starts = torch.tensor([0, *(grid.num_tokens for grid in tokens.grids)]).cumsum(0)
    parts = []
    for start, grid in zip(starts[:-1], tokens.grids, strict=True):
        source = _sources(grid, side, token_order)
        parts.append(torch.where(source < 0, source, source + start))
    index = torch.cat(parts) % (features.shape[0] + 1)  # −1 becomes the row of zeros at the end
    padded = torch.cat([features, features.new_zeros(1, features.shape[1])])
    return padded[send(index, features.device)].flatten(1)


def _fold_uniform(features: Tensor, grids: Sequence[Grid], side: int, token_order: TokenOrder) -> Tensor:
    """`fold` for images of one size: a view and one copy, several times faster than a gather."""
    grid, width = grids[0], features.shape[1]
    x = features.view(len(grids), grid.rows, grid.cols, width)
    rows, cols = -(-grid.rows // side), -(-grid.cols // side)
    if (rows * side, cols * side) != (grid.rows, grid.cols):
        x = F.pad(x, (0, 0, 0, cols * side - grid.cols, 0, rows * side - grid.rows))
    x = x.view(len(grids), rows, side, cols, side, width)
    order = (0, 3, 1, 2, 4, 5) if token_order == "col" else (0, 1, 3, 2, 4, 5)
    return x.permute(order).reshape(len(grids) * rows * cols, side * side * width)


class Downsample(Projector):
    """2×2 fold, LayerNorm, Linear, GELU, Linear: `mlp_downsample` of VILA-1.5, a quarter of the tokens.

    Args:
        in_width: width of the encoder.
        out_width: width of the decoder.
        token_order: `row` (NVILA and after), or `col`, which VILA-1.5 weights were trained with.
    """

    def __init__(self, in_width: int, out_width: int, token_order: TokenOrder = "row") -> None:
        super().__init__(in_width, out_width)
        self.token_order = token_order
        self.grid_map = Fold(2, token_order)
        self.layers = nn.Sequential(
            nn.LayerNorm(4 * in_width),
            nn.Linear(4 * in_width, out_width),
            nn.GELU(),
            nn.Linear(out_width, out_width),
        )

    def forward(self, tokens: VisualTokens) -> VisualTokens:
        """`[t, in_width]` → `[t', out_width]`."""
        grids = tuple(self.grid_map(grid) for grid in tokens.grids)
        return VisualTokens(self.layers(fold(tokens, 2, self.token_order)), grids)


class DownsampleLinear(Projector):
    """2×2 fold and one linear layer, a quarter of the tokens: VILA, table 7, row "downsample" (`dssqlinear`)."""

    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__(in_width, out_width)
        self.grid_map = Fold(2)
        self.linear = nn.Linear(4 * in_width, out_width)

    def forward(self, tokens: VisualTokens) -> VisualTokens:
        """`[t, in_width]` → `[t', out_width]`."""
        grids = tuple(self.grid_map(grid) for grid in tokens.grids)
        return VisualTokens(self.linear(fold(tokens, 2)), grids)


class PatchMerge(Projector):
    """2×2 fold, Linear, GELU, Linear, without a norm: HoVLE, section 3."""

    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__(in_width, out_width)
        self.grid_map = Fold(2)
        self.layers = nn.Sequential(nn.Linear(4 * in_width, out_width), nn.GELU(), nn.Linear(out_width, out_width))

    def forward(self, tokens: VisualTokens) -> VisualTokens:
        """`[t, in_width]` → `[t / 4, out_width]`."""
        grids = tuple(self.grid_map(grid) for grid in tokens.grids)
        return VisualTokens(self.layers(fold(tokens, 2)), grids)


class Downsample3x3(Projector):
    """3×3 fold and a three-layer MLP: `mlp_downsample_3x3_fix` of NVILA-Lite, a ninth of the tokens."""

    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__(in_width, out_width)
        self.grid_map = Fold(3)
        self.layers = nn.Sequential(
            nn.LayerNorm(9 * in_width),
            nn.Linear(9 * in_width, 3 * in_width),
            nn.GELU(),
            nn.LayerNorm(3 * in_width),
            nn.Linear(3 * in_width, out_width),
            nn.GELU(),
            nn.Linear(out_width, out_width),
        )

    def forward(self, tokens: VisualTokens) -> VisualTokens:
        """`[t, in_width]` → `[t', out_width]`."""
        grids = tuple(self.grid_map(grid) for grid in tokens.grids)
        return VisualTokens(self.layers(fold(tokens, 3)), grids)
