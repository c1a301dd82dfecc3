"""Projectors that map each token on its own."""

from __future__ import annotations

from torch import nn

from lit_vlm.core.batch import VisualTokens
from lit_vlm.projectors.base import Projector


class Identity(Projector):
    """No projection: the encoder already has the decoder's width (Fuyu-style models).

    Args:
        in_width: width of the encoder.
        out_width: width of the decoder, which must be the same.

    Raises:
        ValueError: when the widths differ.
    """

    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__(in_width, out_width)
        if in_width != out_width:
            raise ValueError(
                f"projector Identity needs an encoder of the decoder's width {out_width}, this one gives {in_width}: "
                f"set model.encoder.width {out_width} where the encoder has that argument, or use projector Linear"
            )

    def forward(self, tokens: VisualTokens) -> VisualTokens:
        """`[t, in_width]` → the same tokens."""
        return tokens


class MLP(Projector):
    """Linear layers with GELU (exact, erf) between them; `mlp2x_gelu` of LLaVA-1.5 is depth 2.

    Args:
        in_width: width of the encoder.
        out_width: width of the decoder, and of every hidden layer.
        depth: number of linear layers.

    Raises:
        ValueError: for a depth below 1.
    """

    def __init__(self, in_width: int, out_width: int, depth: int = 2) -> None:
        super().__init__(in_width, out_width)
        if depth < 1:
            raise ValueError(f"projector depth must be at least 1, not {depth}")
        layers: list[nn.Module] = [nn.Linear(in_width, out_width)]
        for _ in range(depth - 1):
            layers += [nn.GELU(), nn.Linear(out_width, out_width)]
        self.layers = nn.Sequential(*layers)

    def forward(self, tokens: VisualTokens) -> VisualTokens:
        """`[t, in_width]` → `[t, out_width]`."""
        return VisualTokens(self.layers(tokens.features), tokens.grids)


class Linear(Projector):
    """One linear layer (VILA, paper section 3)."""

    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__(in_width, out_width)
        self.linear = nn.Linear(in_width, out_width)

    def forward(self, tokens: VisualTokens) -> VisualTokens:
        """`[t, in_width]` → `[t, out_width]`."""
        return VisualTokens(self.linear(tokens.features), tokens.grids)
