"""Shared by encoders of any size: windows of neighbouring patches, and tokens that mark images and rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lit_vlm.core.batch import Grid, Images, Patches
from lit_vlm.core.transfer import send


def pixel_windows(images: Images, patch: int, side: int = 2) -> Tensor:
    """Cut all images into windows of `side` × `side` patches, image by image and row by row.

    The loop is over the distinct sizes of a batch; nothing is padded.

    Args:
        images: with sides that are multiples of `side` · `patch`.
        patch: pixels per patch side.
        side: patches per window side.

    Returns:
        uint8 `[windows, side², 3, patch, patch]`; the patches of a window row by row.
    """
    parts, owners = [], []
    for indices, pixels in images.groups():
        m, _, height, width = pixels.shape
        rows, cols = height // (side * patch), width // (side * patch)
        cut = pixels.view(m, 3, rows, side, patch, cols, side, patch).permute(0, 2, 5, 3, 6, 1, 4, 7)
        parts.append(cut.reshape(m * rows * cols, side**2, 3, patch, patch))
        owners.append(torch.tensor(indices).repeat_interleave(rows * cols))
    if len(parts) == 1:
        return parts[0]
    order = torch.cat(owners).argsort(stable=True)
    return torch.cat(parts)[send(order, images.pixels.device)]


def lay_out(features: Tensor, cls: Tensor | None, row_end: Tensor, patches: Patches, grids: Sequence[Grid]) -> Tensor:
    """Put patches, the token in front of each image, and the token behind each row into the order of the grids.

    Args:
        features: `[p, d_e]`, the patches of all images.
        cls: `[n, d_e]`, or None where the grids have no prefix.
        row_end: `[d_e]`, the token that stands behind every row.
        patches: where the patches are, `index_patches(grids)`.
        grids: layout of each image, with one row-end token per row.

    Returns:
        `[t, d_e]`.
    """
    device = features.device
    total = sum(grid.num_tokens for grid in grids)
    tokens = row_end.to(features.dtype).expand(total, -1)
    tokens = tokens.index_copy(0, send(patches.position, device), features)
    if cls is None:
        return tokens
    return tokens.index_copy(0, send(patches.starts, device), cls.to(features.dtype))
