"""The embedder slot."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from lit_vlm.core.batch import Batch, VisualTokens
from lit_vlm.core.flops import Flops, FlopsOf
from lit_vlm.core.part import Part
from lit_vlm.core.tiling import TileMap, as_they_come
from lit_vlm.decoders.base import Decoder
from lit_vlm.projectors.base import GridMap, same_grid


class Embedder(Part, ABC):
    """Text ids and visual tokens → the decoder's input vectors.

    Args:
        width: width of the decoder.
        vocab_size: rows of the decoder's word table.

    Attributes:
        grid_map: layout of an image's tokens after the projector → layout in the decoder's sequence. It is called in
            loader workers, like `Projector.grid_map`, so it must pickle.
        tile_map: (layout of a picture of tiles after `grid_map`, how these make it up) → layout in the decoder's
            sequence, for an embedder that puts tiles together. It must pickle too.
        task_tokens: group → places of its task tokens among the tokens that the embedder puts behind an image.
        adopts_all: whether `adopt` fills all weights of the embedder.
    """

    grid_map: GridMap
    tile_map: TileMap
    task_tokens: dict[str, range]
    adopts_all: bool = False

    def __init__(self, width: int, vocab_size: int) -> None:
        super().__init__()
        self.width, self.vocab_size = width, vocab_size
        self.grid_map = same_grid
        self.tile_map = as_they_come
        self.task_tokens = {}

    @abstractmethod
    def forward(
        self,
        batch: Batch,
        visual: VisualTokens | None,
        decoder: Decoder,
        cache: Any = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Input vectors `[b, s, d]`.

        Args:
            batch: ids and the positions of the images.
            visual: features `[t, d]` in the order of the batch's images; None while decoding continues.
            decoder: the model's decoder, whose word table may be read.
            cache: from `new_cache`, while decoding; then s counts the new positions only.
            attention_mask: `[b, past + s]`, 0 for padding; only with a cache.

        Raises:
            ValueError: where the visual tokens do not fit the batch's images; see `check_grids`.
        """

    @abstractmethod
    def words(self, input_ids: Tensor, decoder: Decoder) -> Tensor:
        """Word vectors, before images and text meet: `[b, s]` → `[b, s, d]`."""

    def connect(self, decoder: Decoder) -> None:
        """Look up what the embedder needs of the decoder besides its sizes; called when the model is put together.

        Raises:
            ValueError: where the decoder has not what the embedder asks for.
        """

    def task_parameters(self, name: str) -> Tensor:
        """Parameters of a group of task tokens, before any pooling: `[q, d]`.

        Args:
            name: the group, a key of `task_tokens`.

        Raises:
            ValueError: when there is no such group.
        """
        raise ValueError(f"{type(self).__name__} has no task tokens '{name}'")

    def adopt(self, decoder: Decoder) -> None:
        """Copy the weights that start as the decoder's own; called once, when the embedder starts anew.

        Raises:
            ValueError: when the decoder's weights do not fit.
        """

    def replaced(self, decoder: Decoder) -> Iterable[nn.Parameter]:
        """Parameters of the decoder that nothing reads behind this embedder, so that they never train."""
        return ()

    def flops(self) -> FlopsOf:
        """Operations of the embedder on a batch; by default none, for an embedder without layers of its own."""
        return lambda batch: Flops()

    def new_cache(self) -> Any:
        """An empty cache of what the embedder must remember while decoding; None if it remembers nothing."""
        return None

    def select_cache(self, cache: Any, rows: Tensor) -> Any:
        """A new cache that holds the rows `rows` `[b']` of another, which stays as it is."""
        return cache


def scatter_visual(embeds: Tensor, positions: Tensor, visual: VisualTokens) -> Tensor:
    """Put the visual tokens on their positions in the sequence.

    In a batch without images `visual` holds the tokens of the dummy image. They are added with weight zero, so that
    encoder and projector take part in forward and backward on every rank.

    Args:
        embeds: `[b, s, d]`.
        positions: `[t]`, index into b·s of each visual token; empty in a batch without images.
        visual: features `[t, d]` of the same images in the same order.

    Returns:
        `[b, s, d]`.
    """
    if not len(positions):
        return embeds + 0 * visual.features.sum().to(embeds.dtype)
    flat = embeds.flatten(0, 1).index_copy(0, positions, visual.features.to(embeds.dtype))
    return flat.view_as(embeds)


def check_grids(
    batch: Batch, visual: VisualTokens, grid_map: GridMap = same_grid, tile_map: TileMap = as_they_come
) -> None:
    """Check that the model's visual tokens fit the image positions that the collator laid out.

    Args:
        batch: with the layouts that the collator used.
        visual: tokens after the projector.
        grid_map: layout after the projector → layout in the sequence.
        tile_map: as `Embedder.tile_map`.

    Raises:
        ValueError: when the layouts differ.
    """
    grids = tuple(grid_map(grid) for grid in visual.grids)
    if batch.tilings and tile_map is not as_they_come:
        pairs = zip(grids, batch.tilings, strict=True)
        grids = tuple(grid if tiling is None else tile_map(grid, tiling) for grid, tiling in pairs)
    if batch.image_grids and grids != batch.image_grids:
        raise ValueError(
            f"encoder and projector gave {visual.features.shape[0]} visual tokens {visual.grids[:3]}, the batch has "
            f"{len(batch.image_positions)} image positions {batch.image_grids[:3]}: a part's grid is not what it does"
        )
