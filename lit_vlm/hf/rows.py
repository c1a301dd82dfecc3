"""Rows of transformers' inputs as a batch of the kit."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lit_vlm.core.batch import IGNORE, Batch, Images, SampleInfo
from lit_vlm.model.vlm import VLM


class Rows(NamedTuple):
    """Rows whose padding was moved behind their tokens, and the way back.

    Attributes:
        batch: the rows as the model's parts take them.
        back: `[b, s]`, place in the batch of each position that was given; None where nothing moved.
    """

    batch: Batch
    back: Tensor | None

    def restored(self, states: Tensor) -> Tensor:
        """States `[b, s, d]` in the order of the positions that were given."""
        if self.back is None:
            return states
        return states.gather(1, self.back[..., None].expand_as(states))


def moved_rows(
    vlm: VLM,
    image_token: int,
    ids: Tensor,
    mask: Tensor | None,
    position_ids: Tensor | None,
    pixel_values: Tensor | None,
    image_sizes: Tensor | None,
) -> Rows:
    """Rows with their padding behind the tokens, where causal attention never looks at it.

    Args:
        vlm: the model.
        image_token: id at the positions of visual tokens.
        ids: `[b, s]`.
        mask: `[b, s]`, 0 for padding, wherever it is; None: there is none.
        position_ids: `[b, s]`, which must count tokens; None: not given.
        pixel_values: as for the model's `forward`.
        image_sizes: as for the model's `forward`.

    Raises:
        ValueError: for a mask of another shape than the ids; and as `check_positions` and `make_batch`.
    """
    back = None
    if ids.ndim != 2 or (mask is not None and mask.shape != ids.shape):
        shapes = f"{list(ids.shape)} and {None if mask is None else list(mask.shape)}"
        raise ValueError(f"input_ids and attention_mask must be [b, s] both, without a cache; found {shapes}")
    present = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    check_positions(position_ids, present.cumsum(1) - 1, present)
    if mask is not None:
        order = (~present).byte().argsort(dim=1, stable=True)
        ids, present, back = ids.gather(1, order), present.gather(1, order), order.argsort(1)
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    return Rows(make_batch(vlm, image_token, ids, present, positions, pixel_values, image_sizes), back)


def check_positions(given: Tensor | None, counted: Tensor, present: Tensor) -> None:
    """Check that positions, if any are given, count the tokens of each row from 0.

    Args:
        given: `[b, s]`, or `[1, s]` for all rows; None: not given.
        counted: `[b, s]`.
        present: bool `[b, s]`, False for padding, whose positions do not matter.

    Raises:
        ValueError: where they differ, as in packed rows.
    """
    if given is not None and bool(((given.to(counted.device) != counted) & present).any()):
        raise ValueError("position_ids must count the tokens of each row: packed rows train in the kit alone")


def make_batch(
    vlm: VLM,
    image_token: int,
    ids: Tensor,
    present: Tensor,
    positions: Tensor,
    pixel_values: Tensor | None,
    image_sizes: Tensor | None,
) -> Batch:
    """The kit's batch of rows; ids of image tokens become 0, as the word table has no row for them.

    Args:
        vlm: the model.
        image_token: id at the positions of visual tokens.
        ids: `[b, s]`.
        present: bool `[b, s]`, False for padding.
        positions: `[b, s]`.
        pixel_values: as for the model's `forward`.
        image_sizes: as for the model's `forward`.

    Raises:
        ValueError: for images that do not fit the image tokens of their row; and as `unpacked`.
    """
    is_image = (ids == image_token) & present
    images, counts = unpacked(pixel_values, image_sizes, len(ids))
    grids = tuple(vlm.grid_map(vlm.encoder.patch_grid(*size)) for size in images.sizes)
    found, taken = is_image.sum(1).tolist(), 0
    for row, count in enumerate(counts):
        wanted = sum(grid.num_tokens for grid in grids[taken : taken + count])
        if wanted != found[row]:
            raise ValueError(
                f"row {row} has {found[row]} image tokens, and its {count} images make {wanted}: prepare text and "
                "images together, by the processor of this model"
            )
        taken += count
    lengths = present.sum(1).tolist()
    samples = tuple(
        SampleInfo(row, 1, str(row), "hf", count, 0, length)
        for row, (count, length) in enumerate(zip(counts, lengths, strict=True))
    )
    empty = ids.new_empty(0)
    return Batch(
        input_ids=ids.masked_fill(is_image, 0),
        labels=torch.full_like(ids, IGNORE),
        position_ids=positions,
        segment_ids=present.long(),
        images=images,
        image_grids=grids,
        image_positions=is_image.flatten().nonzero().squeeze(1),
        target_positions=empty,
        targets=empty,
        num_tokens=sum(lengths),
        samples=samples,
    )


def unpacked(pixel_values: Tensor | None, image_sizes: Tensor | None, rows: int) -> tuple[Images, list[int]]:
    """The images of a batch in order, and how many each row has.

    Raises:
        ValueError: for one of the two without the other, or other shapes than `[b, n, 3, h, w]` and `[b, n, 2]`.
    """
    if pixel_values is None and image_sizes is None:
        return Images.pack([]), [0] * rows
    if pixel_values is None or image_sizes is None:
        raise ValueError("pixel_values and image_sizes come together from the processor; one of them is missing")
    if pixel_values.ndim != 5 or image_sizes.shape != (*pixel_values.shape[:2], 2) or len(pixel_values) != rows:
        raise ValueError(
            f"pixel_values must be [b, n, 3, h, w] and image_sizes [b, n, 2] with b = {rows}; found "
            f"{list(pixel_values.shape)} and {list(image_sizes.shape)}"
        )
    if pixel_values.dtype != torch.uint8:
        raise ValueError(
            f"pixel_values must be uint8, as the encoder normalises them itself; found {pixel_values.dtype}"
        )
    sizes = [[(h, w) for h, w in row if h and w] for row in image_sizes.tolist()]
    images = [pixel_values[r, i, :, :h, :w] for r, row in enumerate(sizes) for i, (h, w) in enumerate(row)]
    packed = Images.pack(images) if images else Images(pixel_values.new_empty(0), ())
    return packed, [len(row) for row in sizes]
