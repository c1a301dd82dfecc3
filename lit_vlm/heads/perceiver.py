"""A small Perceiver resampler: queries from outside read decoder states by cross-attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lit_vlm.core.flops import Flops, Weights, attention
from lit_vlm.projectors import PerceiverLayer


class Perceiver(nn.Module):
    """Decoder states → a fixed number of target features (OLA-VLM, section 3; one layer as published).

    Tokens and queries from outside pass the same input layer; tokens are not updated between layers.

    Args:
        in_width: width of tokens, and of queries from outside.
        out_width: width of the target features.
        num_queries: target features per image.
        width: inner width.
        own_queries: whether learned queries take the place of those from outside.
        num_layers: number of perceiver layers.
        num_heads: attention heads.
        head_dim: width of an attention head.
        ffn_ratio: inner width of the feed-forward, as a multiple of `width`.
    """

    def __init__(
        self,
        in_width: int,
        out_width: int,
        num_queries: int,
        width: int,
        own_queries: bool = False,
        num_layers: int = 1,
        num_heads: int = 4,
        head_dim: int = 32,
        ffn_ratio: int = 1,
    ) -> None:
        super().__init__()
        self.num_queries = num_queries
        self.latents = nn.Parameter(torch.randn(1, num_queries, width) / width**0.5) if own_queries else None
        self.proj_in = nn.Linear(in_width, width)
        self.layers = nn.ModuleList(PerceiverLayer(width, num_heads, head_dim, ffn_ratio) for _ in range(num_layers))
        self.proj_out = nn.Linear(width, out_width)
        self.norm_out = nn.LayerNorm(out_width)

    def forward(
        self, tokens: Tensor, queries: Tensor | None = None, rows: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Features of n images: `[n, num_queries, out_width]`.

        Args:
            tokens: `[b, s, in_width]`.
            queries: `[n, q, in_width]`, or `[1, q, in_width]` shared by all images; if q divides `num_queries` they are
                repeated in turn, otherwise all become their mean. None with `own_queries`.
            rows: `[n]`, the row of `tokens` that each image reads; default: n = b, and image i reads row i.
            mask: `[n, s]`, True at the tokens that an image reads; default: all.
        """
        if self.latents is not None:
            x = self.latents
        else:
            assert queries is not None
            x = self.proj_in(self._fit(queries))
        tokens = self.proj_in(tokens)
        for layer in self.layers:
            x = layer(tokens, x, mask, rows)
        out: Tensor = self.norm_out(self.proj_out(x))
        return out

    def flops(self, own: bool) -> Callable[[int, Sequence[int]], Flops]:
        """A function that counts operations, from the tokens of all rows and the list of tokens that each image reads.

        Args:
            own: whether each image brings queries of its own; otherwise all images share them before the first layer.
        """
        w_in, w_out = Weights.of(self.proj_in.parameters()), Weights.of(self.proj_out.parameters())
        layers = [layer for layer in self.layers if isinstance(layer, PerceiverLayer)]
        kv, q = ([Weights.of(getattr(layer, name).parameters()) for layer in layers] for name in ("to_kv", "to_q"))
        after = [Weights.of([*layer.to_out.parameters(), *layer.ffn.parameters()]) for layer in layers]

        def of(tokens: int, lengths: Sequence[int]) -> Flops:
            answers = self.num_queries * len(lengths)
            asked = answers if own else self.num_queries
            total = w_in.on(tokens + (0 if self.latents is not None else asked)) + w_out.on(answers)
            pairs = sum(self.num_queries * (length + self.num_queries) for length in lengths)
            for index, layer in enumerate(layers):
                queries = asked if index == 0 else answers
                total += kv[index].on(tokens + queries) + q[index].on(queries) + after[index].on(answers)
                total += attention(layer.to_q.out_features, pairs)
            return total

        return of

    def _fit(self, queries: Tensor) -> Tensor:
        count = queries.shape[1]
        if count == self.num_queries:
            return queries
        if self.num_queries > 1 and self.num_queries % count == 0:
            return queries.repeat(1, self.num_queries // count, 1)
        return queries.mean(1, keepdim=True).expand(-1, self.num_queries, -1)
