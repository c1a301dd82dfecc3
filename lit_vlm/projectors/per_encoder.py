"""A projector for each encoder of an ensemble."""

from __future__ import annotations

import torch
from torch import nn

from lit_vlm.core.batch import VisualTokens, index_suffixes
from lit_vlm.core.transfer import send
from lit_vlm.projectors.base import Projector
from lit_vlm.projectors.mlp import MLP


class PerEncoder(Projector):
    """An MLP for each encoder of `encoders.Ensemble` with `fuse: tokens` (OLA-VLM's baseline with joined tokens).

    Args:
        in_width: width of the ensemble, which is that of its widest encoder.
        out_width: width of the decoder.
        widths: width of each encoder, in the ensemble's order.
        depth: linear layers of each MLP.

    Raises:
        ValueError: for fewer than two widths, or widths whose largest is not `in_width`.
    """

    def __init__(self, in_width: int, out_width: int, widths: list[int], depth: int = 2) -> None:
        super().__init__(in_width, out_width)
        if len(widths) < 2 or max(widths) != in_width:
            raise ValueError(
                f"projector PerEncoder: widths {widths} are those of the encoders of an Ensemble with fuse: tokens, "
                f"whose widest is {in_width}"
            )
        self.members = nn.ModuleList(MLP(width, out_width, depth).layers for width in widths)
        self.widths = list(widths)

    def forward(self, tokens: VisualTokens) -> VisualTokens:
        """`[t, in_width]` → `[t, out_width]`.

        Raises:
            ValueError: when the tokens behind the patches do not divide among the encoders.
        """
        others, suffixes = (send(index, tokens.features.device) for index in index_suffixes(tokens.grids))
        count, rest = divmod(suffixes.shape[1], len(self.widths) - 1)
        if rest or not count:
            raise ValueError(
                f"projector PerEncoder: {suffixes.shape[1]} tokens behind the patches for {len(self.widths) - 1} "
                "further encoders; use encoders.Ensemble with fuse: tokens, and as many widths as it has encoders"
            )
        places = [others, *(part.flatten() for part in suffixes.split(count, dim=1))]
        projected = [
            member(tokens.features[place][:, :width])
            for member, place, width in zip(self.members, places, self.widths, strict=True)
        ]
        out = torch.empty(len(tokens.features), self.out_width, dtype=projected[0].dtype, device=tokens.features.device)
        out = out.index_copy(0, torch.cat(places), torch.cat(projected))
        return VisualTokens(out, tokens.grids)
