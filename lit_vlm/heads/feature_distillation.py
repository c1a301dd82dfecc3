"""Pull decoder states at image positions towards the features of a frozen vision model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_vlm.core.batch import Batch, Grid, VisualTokens, index_suffixes, patches_alone
from lit_vlm.core.losses import cosine_distance, smooth_l1_distance
from lit_vlm.core.transfer import send
from lit_vlm.heads.base import Head, Tap, at_patches
from lit_vlm.teachers.base import Teacher

DISTANCES = {"cosine": cosine_distance, "smooth_l1": smooth_l1_distance}


class FeatureDistillation(Head):
    """A two-layer MLP reads one layer at the image positions; its output is compared with the teacher's features.

    Where the teacher's grid differs from that of the image's tokens, the teacher's features are pooled or interpolated
    to the latter. The loss is the mean over an image's tokens, then over images.

    Args:
        width: width of the decoder.
        num_layers: blocks of the decoder.
        teacher: gives the targets.
        layer: the decoder layer that is read; negative counts from the end, −1 being the last.
        distance: `cosine`, or `smooth_l1`.
    """

    def __init__(
        self,
        width: int,
        num_layers: int,
        teacher: Callable[[], Teacher],
        layer: int = -1,
        distance: Literal["cosine", "smooth_l1"] = "cosine",
    ) -> None:
        super().__init__(width, num_layers)
        self.layer = layer if layer >= 0 else num_layers + 1 + layer
        self.taps = (self.layer,)
        self.teacher = teacher()
        self.distance = distance
        self.predictor = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, self.teacher.width))

    def loss(self, states: Mapping[Tap, Tensor], batch: Batch, targets: VisualTokens) -> Tensor:
        """The mean distance of each image's tokens, summed over images; see `Head.loss`.

        Raises:
            ValueError: when grids differ and one of them has other tokens than patches.
        """
        hidden = states[self.layer].flatten(0, 1)
        positions, grids = batch.image_positions, batch.image_grids
        if grids[0].suffix:  # task tokens show no part of the image
            positions = positions[send(index_suffixes(grids)[0], positions.device)]
            grids = tuple(grid._replace(suffix=0) for grid in grids)
        student = self.predictor(hidden[positions])  # [t, width of the teacher]
        distances = DISTANCES[self.distance](student, _on_grids(targets, grids))
        lengths = torch.tensor([grid.num_tokens for grid in grids])
        return (distances / send(lengths.repeat_interleave(lengths), distances.device)).sum()

    def predictions(self, states: Mapping[Tap, Tensor], batch: Batch) -> Mapping[str, VisualTokens]:
        """The predictor's output at each patch; see `Head.predictions`."""
        student = self.predictor(at_patches(states[self.layer], batch))
        return {f"layer {self.layer}": VisualTokens(student.float(), patches_alone(batch.image_grids))}


def _on_grids(tokens: VisualTokens, grids: tuple[Grid, ...]) -> Tensor:
    """Teacher features `[t', d]`, resampled to the grids of the sequence: `[t, d]`."""
    if tokens.grids == grids:
        return tokens.features
    parts = []
    for features, own, grid in zip(
        tokens.features.split([g.num_tokens for g in tokens.grids]), tokens.grids, grids, strict=True
    ):
        if own.num_tokens != own.rows * own.cols or grid.num_tokens != grid.rows * grid.cols:
            raise ValueError(
                "FeatureDistillation needs plain patch grids, without CLS or row-end tokens, on both sides"
            )
        feature_map = features.view(1, own.rows, own.cols, -1).permute(0, 3, 1, 2)
        if grid.rows <= own.rows and grid.cols <= own.cols:
            feature_map = F.adaptive_avg_pool2d(feature_map, (grid.rows, grid.cols))
        else:
            feature_map = F.interpolate(feature_map, (grid.rows, grid.cols), mode="bilinear", align_corners=False)
        parts.append(feature_map.flatten(2)[0].T)
    return torch.cat(parts)
