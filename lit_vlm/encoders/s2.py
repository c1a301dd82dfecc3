"""S2: one encoder looks at a picture at several sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_vlm.core.batch import Images, PixelSpec, VisualTokens
from lit_vlm.core.part import StateDict, standalone_class
from lit_vlm.encoders.base import Encoder, PatchGrid


class S2(Encoder):
    """Features of several scales side by side, on the grid of the smallest (Shi et al. 2024; VILA1.5-3b-s2).

    The picture comes at the largest scale. For each scale it is resized, cut into squares of the encoder's size, each
    square is encoded, and the map that they make up is averaged down to the encoder's own grid.

    VILA's released code computed this without gradients, so its vision tower did not train although its script asked
    for it; leave `encoder` out of `model.stage.train` for that.

    Args:
        encoder: an encoder of one picture size that gives patches only.
        scales: sides in pixels, multiples of the encoder's size, rising; default: once and twice its size.

    Raises:
        ValueError: for an encoder of any size or with CLS or row-end tokens, and for scales that do not fit its size.
    """

    def __init__(self, encoder: Callable[[], Encoder], scales: list[int] | None = None) -> None:
        super().__init__()
        inner = encoder()
        side = inner.pixels.size
        if side is None or inner.patch_grid.prefix or inner.patch_grid.row_end:
            raise ValueError("S2 needs an encoder of one picture size that gives patches only, without CLS token")
        self.inner = inner
        self.scales = scales or [side, 2 * side]
        if self.scales != sorted(set(self.scales)) or any(scale < side or scale % side for scale in self.scales):
            raise ValueError(f"S2: scales {self.scales} must rise and be multiples of the encoder's {side} pixels")
        self.side = side
        self.width = inner.width * len(self.scales)
        largest = self.scales[-1]
        # Tokens are laid out as those of a picture at the smallest scale.
        self.patch_grid = PatchGrid(inner.patch_grid.patch * largest // side)
        self.pixels = PixelSpec(largest, inner.pixels.multiple, inner.pixels.mean)
        self.register_buffer("pixel_mean", inner.pixel_mean, persistent=False)
        self.register_buffer("pixel_std", inner.pixel_std, persistent=False)

    def find_pretrained(self) -> None:
        """Check that the weights of the encoder are there.

        Raises:
            ValueError: saying what is missing.
        """
        self.inner.find_pretrained()

    def standalone(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments with those of the encoder that need no other file."""
        return {**arguments, "encoder": standalone_class(self.inner, arguments["encoder"])}

    def pretrained_state(self) -> StateDict | None:
        """Weights of the encoder; None if it has no pretrained ones.

        Raises:
            ValueError: as the encoder does.
        """
        state = self.inner.pretrained_state()
        return None if state is None else {f"inner.{key}": value for key, value in state.items()}

    def blocks(self) -> list[nn.Module]:
        """The encoder's blocks."""
        return list(self.inner.blocks())

    def forward(self, images: Images) -> VisualTokens:
        """Features `[t, d_e · scales]`, those of the smallest scale first.

        Raises:
            ValueError: when a picture is no square of the largest scale.
        """
        pixels = self.tiles(images).float()  # [n, 3, largest, largest]
        # All scales in one pass, so that each block runs once.
        cut = [self._cut(pixels, scale) for scale in self.scales]
        sizes, tiles = [len(squares) for squares in cut], torch.cat(cut)
        with torch.no_grad() if self.inner.frozen() else nullcontext():
            tokens = self.inner(Images(tiles.flatten(), ((self.side, self.side),) * len(tiles)))
        grid = tokens.grids[0]
        whole = tokens.features.view(len(tiles), grid.rows, grid.cols, self.inner.width)
        maps = [self._join(part, scale) for part, scale in zip(whole.split(sizes), self.scales, strict=True)]
        features = torch.cat(maps, dim=-1)  # [n, rows, cols, width]
        grids = tuple(self.patch_grid(*size) for size in images.sizes)
        return VisualTokens(features.flatten(0, 2), grids)

    def _cut(self, pixels: Tensor, scale: int) -> Tensor:
        """The squares of one scale, picture by picture and row by row: `[n · cut², 3, side, side]`."""
        if scale != self.scales[-1]:
            # Not rounded to bytes: equal to resizing normalised pixels, as the reference does, overshoots included.
            pixels = F.interpolate(pixels, (scale, scale), mode="bicubic")
        cut = scale // self.side
        tiles = pixels.unflatten(2, (cut, self.side)).unflatten(4, (cut, self.side))  # [n, 3, cut, side, cut, side]
        return tiles.permute(0, 2, 4, 1, 3, 5).reshape(-1, 3, self.side, self.side)

    def _join(self, features: Tensor, scale: int) -> Tensor:
        """The map of one scale from those of its squares, `[n · cut², rows, cols, d_e]` → `[n, rows, cols, d_e]`."""
        cut = scale // self.side
        if cut == 1:
            return features
        rows, cols = features.shape[1:3]
        x = features.unflatten(0, (-1, cut, cut)).permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(1, 2)
        pooled = F.interpolate(x.permute(0, 3, 1, 2).float(), (rows, cols), mode="area")
        return pooled.permute(0, 2, 3, 1).to(features.dtype)
