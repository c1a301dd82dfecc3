"""The head slot."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from lit_vlm.core.batch import Batch
from lit_vlm.core.flops import FlopsOf, Weights
from lit_vlm.core.part import Part
from lit_vlm.embedders.base import Embedder
from lit_vlm.teachers.base import Teacher

Normaliser = Literal["samples", "tokens", "supervised", "images", "visual_tokens", "text_tokens"]
WORDS = -1
"""Among the taps of a head: word vectors `[b, s, d]` of the ids, before images and text meet; without a graph."""
Tap = int | str
"""A layer, `WORDS`, or the name of a group of task tokens: its parameters `[q, d]`."""


class Head(Part, ABC):
    """An auxiliary loss on decoder states.

    Args:
        width: width of the decoder.
        num_layers: blocks of the decoder.

    Attributes:
        taps: what `forward` reads: layers, numbered as in `DecoderOutput`, `WORDS`, and groups of task tokens. For a
            head that reads no layer above 0 the decoder does not run.
        normaliser: which count of the global batch the summed loss is divided by.
        teacher: whose images the loader prepares, or None.
    """

    taps: tuple[Tap, ...] = ()
    normaliser: Normaliser = "images"
    teacher: Teacher | None = None

    def __init__(self, width: int, num_layers: int) -> None:
        super().__init__()
        self.width, self.num_layers = width, num_layers

    def connect(self, embedder: Embedder) -> None:
        """Learn where the task tokens that it reads are; called when a model is put together.

        Raises:
            ValueError: when the embedder has none of that name.
        """

    def flops(self) -> FlopsOf:
        """Operations on a batch, without those of the teacher: by default all weights read each visual token.

        Tokens behind an image that show no part of it do not count.
        """
        weights = Weights.of(self.parameters())
        return lambda batch: weights.on(sum(grid.num_tokens - grid.suffix for grid in batch.image_grids))

    @abstractmethod
    def forward(self, states: Mapping[Tap, Tensor], batch: Batch, teacher_images: object) -> Tensor:
        """The loss summed over what `normaliser` counts: a fp32 scalar.

        A batch without images must still use every parameter (with weight zero), or sharded training aborts.

        Args:
            states: `[b, s, d]` for each layer of `taps`, and what the others stand for.
            batch: where everything is.
            teacher_images: `Images` as the teacher wants them, of the same images in the same order; or the teacher's
                features of them (`VisualTokens`), if they were prepared; or None.
        """
