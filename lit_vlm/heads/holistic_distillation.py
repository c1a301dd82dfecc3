"""Losses of HoVLE's first stage: image tokens learn from a vision model, text tokens from word vectors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from lit_vlm.core.batch import Batch, Grid, VisualTokens, patches_alone
from lit_vlm.heads.base import WORDS, Head, Tap, at_patches
from lit_vlm.heads.feature_distillation import DISTANCES
from lit_vlm.projectors.downsample import fold
from lit_vlm.teachers.base import Teacher

Match = Literal["pool", "merge"]


class HolisticDistillation(Head):
    """The embedder's output at image positions against a frozen vision model (HoVLE, first stage, image term).

    The decoder does not run. The paper names neither the teacher nor how its patches meet the image's fewer tokens, so
    both are arguments. The loss is one minus the cosine, averaged over all image tokens of the global batch.

    Args:
        width: width of the decoder.
        num_layers: blocks of the decoder.
        teacher: gives the targets.
        ratio: how many patches of the teacher lie along each side of an image token.
        match: where the teacher has several patches for a token: `pool` takes their mean, `merge` puts them side by
            side, as a 2 × 2 merge does before a connector.
        predictor: `linear` maps the embedder's output by a layer that is thrown away after the stage; `none` compares
            the output as it is, for teachers of the decoder's width, such as a vision model with its connector.
        distance: `cosine`, or `smooth_l1`.

    Raises:
        ValueError: with `predictor: none`, when targets have another width than the decoder.
    """

    taps = (0,)
    normaliser = "visual_tokens"

    def __init__(
        self,
        width: int,
        num_layers: int,
        teacher: Callable[[], Teacher],
        ratio: int = 2,
        match: Match = "merge",
        predictor: Literal["linear", "none"] = "linear",
        distance: Literal["cosine", "smooth_l1"] = "cosine",
    ) -> None:
        super().__init__(width, num_layers)
        self.teacher = teacher()
        self.match, self.distance, self.ratio = match, distance, ratio
        target = self.teacher.width * (ratio**2 if match == "merge" else 1)
        if predictor == "none" and target != width:
            raise ValueError(f"predictor is none, but targets are {target} wide and the decoder is {width}: use linear")
        self.predictor = nn.Linear(width, target) if predictor == "linear" else nn.Identity()

    def loss(self, states: Mapping[Tap, Tensor], batch: Batch, targets: VisualTokens) -> Tensor:
        """The distances of all image tokens, summed; see `Head.loss`.

        Raises:
            ValueError: when the teacher's grids are not `ratio` times those of the image tokens.
        """
        hidden = states[0].flatten(0, 1)
        expected = self._on_tokens(targets, batch.image_grids)
        return DISTANCES[self.distance](self.predictor(hidden[batch.image_positions]), expected).sum()

    def predictions(self, states: Mapping[Tap, Tensor], batch: Batch) -> Mapping[str, VisualTokens]:
        """What the embedder's output is compared as, at each patch; see `Head.predictions`."""
        student = self.predictor(at_patches(states[0], batch))
        return {"the embedder's output": VisualTokens(student.float(), patches_alone(batch.image_grids))}

    def _on_tokens(self, teacher: VisualTokens, grids: tuple[Grid, ...]) -> Tensor:
        """The teacher's features for each image token: `[t, d']`."""
        expected = tuple(grid._replace(rows=grid.rows * self.ratio, cols=grid.cols * self.ratio) for grid in grids)
        if teacher.grids != expected:
            raise ValueError(
                f"the teacher of HolisticDistillation gives {teacher.grids[0]} where the image has {grids[0]}: with "
                f"ratio {self.ratio} it must give {expected[0]}; choose another ratio, teacher or image size"
            )
        merged = fold(teacher, self.ratio) if self.ratio > 1 else teacher.features
        if self.match == "merge":
            return merged
        return merged.unflatten(1, (self.ratio**2, -1)).mean(1)


class WordDistillation(Head):
    """The embedder's output at text positions against the word vectors that go in (HoVLE, first stage, text term).

    The embedder's word table is a copy of the decoder's, so its output stays close to the word vectors that the decoder
    knows; keep the table frozen while this loss is on. The decoder does not run. The loss is one minus the cosine,
    averaged over all text tokens of the global batch.

    Args:
        width: width of the decoder.
        num_layers: blocks of the decoder.
        distance: `cosine`, or `smooth_l1`, which also keeps the length of the vectors.
    """

    taps = (0, WORDS)
    normaliser = "text_tokens"

    def __init__(self, width: int, num_layers: int, distance: Literal["cosine", "smooth_l1"] = "cosine") -> None:
        super().__init__(width, num_layers)
        self.distance = distance

    def loss(self, states: Mapping[Tap, Tensor], batch: Batch, targets: VisualTokens) -> Tensor:
        """The distances of all text tokens, summed; see `Head.loss`."""
        text = (batch.segment_ids > 0).flatten().float()
        text = text.index_fill(0, batch.image_positions, 0.0)
        distances = DISTANCES[self.distance](states[0].flatten(0, 1), states[WORDS].flatten(0, 1))
        return torch.dot(distances, text)
