"""Perceiver resampler: a fixed number of learned queries read all tokens of an image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_vlm.core.batch import Grid, VisualTokens
from lit_vlm.core.transfer import send
from lit_vlm.projectors.base import Projector


class PerceiverLayer(nn.Module):
    """Queries attend to tokens and to themselves, then pass a feed-forward.

    Source: the resampler of Flamingo (Alayrac et al. 2022, section 2.1).

    Pre-norm, separate norms for tokens and queries, no biases in the projections.

    Args:
        width: width d of tokens and queries.
        num_heads: attention heads.
        head_dim: width of a head; the inner width is num_heads · head_dim.
        ffn_ratio: inner width of the feed-forward, as a multiple of d.
    """

    def __init__(self, width: int, num_heads: int, head_dim: int, ffn_ratio: float) -> None:
        super().__init__()
        inner = num_heads * head_dim
        self.num_heads = num_heads
        self.norm_tokens = nn.LayerNorm(width)
        self.norm_queries = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)
        self.ffn = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, int(width * ffn_ratio), bias=False),
            nn.GELU(),
            nn.Linear(int(width * ffn_ratio), width, bias=False),
        )

    def forward(
        self, tokens: Tensor, queries: Tensor, mask: Tensor | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """Update the queries of n readers.

        Keys and values of tokens are computed once per row, and those of shared queries once for all readers.

        Args:
            tokens: `[b, p, d]`.
            queries: `[n, q, d]`, or `[1, q, d]` that all n readers share.
            mask: bool `[n, p]`, False for tokens that are not to be read.
            rows: `[n]`, the row of `tokens` that each reader reads; default: n = b, and reader i reads row i.

        Returns:
            `[n, q, d]`.
        """
        queries_in = self.norm_queries(queries)
        keys, values = (self._heads(x) for x in self.to_kv(self.norm_tokens(tokens)).chunk(2, dim=-1))
        own_keys, own_values = (self._heads(x) for x in self.to_kv(queries_in).chunk(2, dim=-1))
        if rows is not None:
            keys, values = keys[rows], values[rows]
        n = keys.shape[0]
        k = torch.cat([keys, own_keys.expand(n, -1, -1, -1)], dim=2)  # [n, heads, p + q, head_dim]
        v = torch.cat([values, own_values.expand(n, -1, -1, -1)], dim=2)
        if mask is not None:
            mask = F.pad(mask, (0, queries.shape[1]), value=True)[:, None, None]  # [n, 1, 1, p + q]
        q = self._heads(self.to_q(queries_in)).expand(n, -1, -1, -1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        queries = queries + self.to_out(out.transpose(1, 2).flatten(2))
        return queries + self.ffn(queries)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


@dataclass(frozen=True)
class FixedTokens:
    """Map of layouts that gives every image the same number of tokens, whatever its size."""

    num_tokens: int

    def __call__(self, grid: Grid) -> Grid:
        """One row of `num_tokens`."""
        return Grid(1, self.num_tokens)


class Resampler(Projector):
    """Learned queries read an image's tokens through perceiver layers: any image becomes `num_queries` tokens.

    Args:
        in_width: width of the encoder.
        out_width: width of the decoder.
        num_queries: tokens per image.
        depth: perceiver layers.
        head_dim: width of an attention head.
        ffn_ratio: inner width of the feed-forward, as a multiple of the encoder's width.
    """

    def __init__(
        self,
        in_width: int,
        out_width: int,
        num_queries: int = 64,
        depth: int = 2,
        head_dim: int = 64,
        ffn_ratio: float = 4.0,
    ) -> None:
        super().__init__(in_width, out_width)
        self.grid_map = FixedTokens(num_queries)
        self.queries = nn.Parameter(torch.randn(num_queries, in_width) * 0.02)
        num_heads = max(1, in_width // head_dim)
        self.layers = nn.ModuleList(PerceiverLayer(in_width, num_heads, head_dim, ffn_ratio) for _ in range(depth))
        self.out = nn.Linear(in_width, out_width)

    def forward(self, tokens: VisualTokens) -> VisualTokens:
        """`[t, in_width]` → `[n · num_queries, out_width]`."""
        padded, mask = pad_images(tokens)
        queries = self.queries.to(padded.dtype).expand(padded.shape[0], -1, -1)
        for layer in self.layers:
            queries = layer(padded, queries, mask)
        grids = tuple(self.grid_map(grid) for grid in tokens.grids)
        return VisualTokens(self.out(queries).flatten(0, 1), grids)


def pad_images(tokens: VisualTokens) -> tuple[Tensor, Tensor | None]:
    """Put the tokens of each image into a row of its own, padded with zeros on the right.

    Returns:
        `[n, p, d_e]`, and a bool mask `[n, p]`, False for padding; None when all images have p tokens.
    """
    lengths = [grid.num_tokens for grid in tokens.grids]
    if len(set(lengths)) == 1:
        return tokens.features.view(len(lengths), lengths[0], -1), None
    padded = nn.utils.rnn.pad_sequence(list(tokens.features.split(lengths)), batch_first=True)
    sizes = send(torch.tensor(lengths), padded.device)
    return padded, torch.arange(padded.shape[1], device=padded.device) < sizes[:, None]
