"""What the data side knows of a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from lit_vlm.core.batch import Batch, Grid, PixelSpec
from lit_vlm.core.tiling import TileMap, Tiling, as_they_come

END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<|end_of_text|>")


@dataclass(frozen=True)
class InputSpec:
    """Everything that loader workers need; it holds no module and no weights, and it pickles.

    Attributes:
        tokenizer: the decoder's fast tokenizer.
        pixels: what the encoder wants of an image.
        patch_grid: (height, width) of an image in pixels → layout of its tokens after the encoder.
        grid_map: layout after the encoder → layout in the decoder's sequence.
        teacher_pixels: head → what its teacher wants of an image.
        known: head → name of the map that a picture must carry (`records.Image.maps`) in place of a teacher's features.
        networks: head or `encoder` → identity of the network whose features may be prepared.
        own_counts: head → count that its loss is divided by, for heads that define one of their own.
        decoded_for: teachers' wishes that, besides the encoder's, decide at which fraction of its size a JPEG is
            decoded; None: the values of `teacher_pixels`.
        fixed_rows: whether packed rows are padded to the most positions of a row, so that all have one length.
        end_ids: ids that end an answer as the decoder was published (`Decoder.end_ids`).
        tile_map: (layout that `grid_map` gives a picture of tiles, how these make it up) → layout in the sequence;
            default: tiles stay as they come.
    """

    tokenizer: Any
    pixels: PixelSpec
    patch_grid: Callable[[int, int], Grid]
    grid_map: Callable[[Grid], Grid]
    teacher_pixels: dict[str, PixelSpec] = field(default_factory=dict)
    known: dict[str, str] = field(default_factory=dict)
    networks: dict[str, str] = field(default_factory=dict)
    own_counts: dict[str, Callable[[Batch], float]] = field(default_factory=dict)
    decoded_for: tuple[PixelSpec, ...] | None = None
    fixed_rows: bool = False
    end_ids: frozenset[int] = frozenset()
    tile_map: TileMap = as_they_come

    def grid(self, height: int, width: int, tiling: Tiling | None = None) -> Grid:
        """Layout in the decoder's sequence of an image of this size in pixels.

        Args:
            height: in pixels; of all tiles, one below the other, for a picture of several.
            width: in pixels.
            tiling: how the tiles make up the picture; None: they stay as they come.

        Raises:
            ValueError: for a picture of several tiles, where a token would mix patches of two tiles; and as the parts'
                own maps of layouts.
        """
        grid = self.grid_map(self.patch_grid(height, width))
        side = self.pixels.size
        if side and width == side and height > side:
            one = self.grid_map(self.patch_grid(side, side))
            if grid.num_tokens != height // side * one.num_tokens:
                patches = self.patch_grid(side, side)
                raise ValueError(
                    f"data.transform makes tiles of {patches.rows} × {patches.cols} patches, and the projector or the "
                    "embedder would merge patches of two tiles: for a fold set the encoder's image_size to an even "
                    "number of patches; otherwise take a projector that keeps each patch (MLP, Linear), not Resampler, "
                    "an encoder without a CLS token, or a data.transform without tiles"
                )
        return grid if tiling is None else self.tile_map(grid, tiling)

    def grid_of(self, features: Grid, tiling: Tiling | None) -> Grid:
        """Layout in the decoder's sequence of an image whose features `features` lays out; `tiling` as for `grid`."""
        grid = self.grid_map(features)
        return grid if tiling is None else self.tile_map(grid, tiling)

    def without_teachers(self) -> InputSpec:
        """A copy for questions: without the needs of heads, but with the same pixels for the encoder as in training."""
        teachers = tuple(self.teacher_pixels.values())
        return replace(self, teacher_pixels={}, known={}, decoded_for=self.decoded_for or teachers)

    @cached_property
    def bos_id(self) -> int | None:
        """The id that the tokenizer puts in front of a text; None if it puts none there."""
        ids = self.tokenizer("a").input_ids
        return self.tokenizer.bos_token_id if ids and ids[0] == self.tokenizer.bos_token_id else None

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end an answer in any template: the end of text, end-of-turn marks of the tokenizer, and `end_ids`.

        The id that closes an answer in the template of a prompt comes with the prompt: `Batch.stop_ids`.
        """
        vocab = self.tokenizer.get_vocab()
        ids = {self.tokenizer.eos_token_id, *(vocab[mark] for mark in END_OF_TURN if mark in vocab)}
        return frozenset(ids - {None}) | self.end_ids
