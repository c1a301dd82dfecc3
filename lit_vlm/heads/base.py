"""The head slot."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Literal, final

import torch
from torch import Tensor, nn

from lit_vlm.core.batch import Batch, Images, VisualTokens, index_patches
from lit_vlm.core.flops import FlopsOf, Weights
from lit_vlm.core.part import Part
from lit_vlm.core.transfer import send
from lit_vlm.embedders.base import Embedder
from lit_vlm.teachers.base import Teacher

CountName = Literal["samples", "tokens", "supervised", "images", "visual_tokens", "text_tokens"]
Normaliser = CountName | Callable[[Batch], float]
WORDS = -1
"""The tap that stands for word vectors `[b, s, d]` of the ids, before images and text meet; without a graph."""
Tap = int | str
"""What a head reads: a layer's number, `WORDS`, or the name of a group of task tokens: its parameters `[q, d]`."""


class Head(Part, ABC):
    """An auxiliary loss on decoder states: a member writes `loss`, and `forward` does what all of them have in common.

    Args:
        width: width of the decoder.
        num_layers: blocks of the decoder.

    Attributes:
        taps: what `loss` reads: layers, numbered as in `DecoderOutput`, `WORDS`, and groups of task tokens. For a
            head that reads no layer above 0 the decoder does not run.
        normaliser: what the summed loss is divided by, over all micro-batches and ranks of an optimizer step: the name
            of a count, or a count of the head's own: a function of a batch on the CPU. The function is called before
            any forward pass, and must pickle: a small object, or a function of a module (set on the instance).
        teacher: the network that gives the targets, whose images the loader prepares; None for a head without one.
    """

    taps: tuple[Tap, ...] = ()
    normaliser: Normaliser = "images"
    teacher: Teacher | None = None

    def __init__(self, width: int, num_layers: int) -> None:
        super().__init__()
        self.width, self.num_layers = width, num_layers

    def connect(self, embedder: Embedder) -> None:
        """Find the task tokens that the head reads in the embedder; called when a model is put together.

        Raises:
            ValueError: when the embedder has no group of that name.
        """

    @final
    def blocks(self) -> tuple[nn.Module, ...]:
        """Empty: the blocks of a head would not run on a rank without images, and sharded training needs them to."""
        return ()

    def flops(self) -> FlopsOf:
        """Operations on a batch, without those of the teacher: by default each visual token meets all weights.

        The suffix tokens of an image, which show no part of it, do not count.
        """
        weights = Weights.of(self.parameters())
        return lambda batch: weights.on(sum(grid.num_tokens - grid.suffix for grid in batch.image_grids))

    @abstractmethod
    def loss(self, states: Mapping[Tap, Tensor], batch: Batch, targets: VisualTokens) -> Tensor:
        """The loss summed over what `normaliser` counts: a fp32 scalar.

        A head with a teacher, or one that counts images or visual tokens, is not asked for a batch without images.

        Args:
            states: the tensor of each tap: `[b, s, d]` for a layer and for `WORDS`, `[q, d]` for task tokens.
            batch: the batch that the states belong to, with the positions of images and samples.
            targets: the teacher's features in fp32, without a graph; one grid for each of `batch.image_grids`, in that
                order. Empty for a head without a teacher.

        Raises:
            ValueError: where the targets do not fit the batch or the head.
        """

    def predictions(self, states: Mapping[Tap, Tensor], batch: Batch) -> Mapping[str, VisualTokens]:
        """What the head takes the teacher's features of the pictures to be, to be looked at.

        Args:
            states: the tensor of each tap, as for `loss`.
            batch: the batch that the states belong to, with at least one image.

        Returns:
            where it is read, in words → features of patches alone, in fp32, one grid for each of `batch.image_grids`;
            by default none: not all heads predict something that lies on a picture.
        """
        return {}

    def nothing(self, states: Mapping[Tap, Tensor]) -> Tensor:
        """The loss of a batch without images: a zero whose graph holds every parameter and every state.

        Sharded training needs each of them in the graph on every rank. A head whose `loss` makes collective calls makes
        them here too, as the other ranks wait for this one.
        """
        parts = [parameter.float().sum() for parameter in self.parameters()]
        parts += [state[..., :1].float().sum() for state in states.values()]
        return 0 * torch.stack(parts).sum() if parts else torch.zeros(())

    def forward(self, states: Mapping[Tap, Tensor], batch: Batch, given: Images | VisualTokens | None = None) -> Tensor:
        """The loss against the teacher's targets, which are computed here unless they were prepared.

        Teachers run in the precision of the step, as the head does.

        Args:
            states: tensors by tap, those of `taps` among them.
            batch: the batch that the states belong to.
            given: the batch's images in their order, as `Images` that the teacher wants, or as `VisualTokens` with the
                teacher's features if these were prepared; None for a head without a teacher.

        Raises:
            ValueError: where the targets do not fit the batch, or the loss is no fp32 scalar.
        """
        own = {tap: states[tap] for tap in self.taps}
        of_images = self.teacher is not None or self.normaliser in ("images", "visual_tokens")
        if of_images and not batch.image_grids:
            return self.nothing(own)
        loss = self.loss(own, batch, self._targets(batch, given))
        if not isinstance(loss, Tensor) or loss.shape or loss.dtype != torch.float32:
            found = f"{loss.dtype} {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(
                f"{type(self).__name__}.loss returned {found} and must return a sum, one fp32 number. What it is "
                "divided by is known before the forward pass: set `normaliser` to the name of a count, or to a function"
            )
        return loss

    def _targets(self, batch: Batch, given: Images | VisualTokens | None) -> VisualTokens:
        if self.teacher is None:
            return VisualTokens(torch.empty(0, 0, device=batch.image_positions.device), ())
        name, expected = type(self).__name__, len(batch.image_grids)
        if given is None:
            raise ValueError(
                f"{name} has a teacher, and the batch brings neither its images (Batch.teacher_images) nor "
                f"its features (Batch.prepared); expected those of {expected} images"
            )
        targets = self.teacher.targets(given)
        found = (len(targets.grids), targets.features.shape[-1])
        if found != (expected, self.teacher.width):
            raise ValueError(
                f"{name}: its teacher {type(self.teacher).__name__} gives targets of {found[0]} images, {found[1]} "
                f"wide; expected those of the batch's {expected} images, {self.teacher.width} wide (Teacher.width)"
            )
        return targets


def at_patches(state: Tensor, batch: Batch) -> Tensor:
    """A layer's states `[b, s, d]` at the patches of a batch's images, without the tokens around them: `[p, d]`."""
    positions = batch.image_positions
    return state.flatten(0, 1)[positions[send(index_patches(batch.image_grids).position, positions.device)]]


def counted(normaliser: Normaliser, batch: Batch) -> float:
    """What a batch adds to the denominator of a loss.

    Args:
        normaliser: the head's `normaliser`.
        batch: a micro-batch.

    Raises:
        ValueError: where a count of the head's own is no finite number from 0 up.
    """
    if isinstance(normaliser, str):
        return float(getattr(batch.counts, normaliser))
    found = float(normaliser(batch))
    if not (math.isfinite(found) and found >= 0):
        raise ValueError(f"the count that a loss is divided by is {found}; it must be a number from 0 up")
    return found
