"""The head slot."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from lit_vlm.batch import Batch
from lit_vlm.part import Part
from lit_vlm.teachers.base import Teacher

Normaliser = Literal["samples", "tokens", "supervised", "images", "visual_tokens", "text_tokens"]
WORDS = -1
"""Among the taps of a head: word vectors `[b, s, d]` of the ids, before images and text meet; without a graph."""


class Head(Part, ABC):
    """An auxiliary loss on decoder states.

    Args:
        width: width of the decoder.
        num_layers: blocks of the decoder.

    Attributes:
        taps: the layers whose states `forward` reads, numbered as in `DecoderOutput`, and `WORDS`. For a head that
            reads no layer above 0 the decoder does not run.
        normaliser: which count of the global batch the summed loss is divided by.
        teacher: whose images the loader prepares, or None.
    """

    taps: tuple[int, ...] = ()
    normaliser: Normaliser = "images"
    teacher: Teacher | None = None

    def __init__(self, width: int, num_layers: int) -> None:
        super().__init__()
        self.width, self.num_layers = width, num_layers

    @abstractmethod
    def forward(self, states: Mapping[int, Tensor], batch: Batch, teacher_images: object) -> Tensor:
        """The loss summed over what `normaliser` counts: a fp32 scalar.

        A batch without images must still use every parameter (with weight zero), or sharded training aborts.

        Args:
            states: `[b, s, d]` for each of `taps`.
            batch: where everything is.
            teacher_images: `Images` as the teacher wants them, of the same images in the same order; or the teacher's
                features of them (`VisualTokens`), if they were prepared; or None.
        """
