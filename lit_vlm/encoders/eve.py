"""The patch embedding layer of EVE: no vision encoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_vlm.core.batch import Grid, Images, Patches, PixelSpec, VisualTokens, index_patches
from lit_vlm.core.lora import effective_weight
from lit_vlm.core.transfer import send
from lit_vlm.encoders.base import CLIP_MEAN, CLIP_STD, Encoder, PatchGrid
from lit_vlm.encoders.windows import lay_out, pixel_windows


class CrossAttention(nn.Module):
    """Each of n queries looks at m vectors of its own; the result is added to the query.

    The scale is width^-½ although there are several heads, as published. A single query per set lets the key and value
    projections move from the m vectors to the query and to their weighted mean: the same result for 2/5 of the
    operations at m = 4.

    Args:
        width: width c of queries and vectors.
        num_heads: attention heads.

    Raises:
        ValueError: when `num_heads` does not divide `width`.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width {width} does not divide into num_heads {num_heads}")
        self.num_heads = num_heads
        self.q = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width, bias=False))
        self.kv = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width, bias=False))
        self.proj = nn.Linear(width, width)

    def forward(self, query: Tensor, vectors: Tensor, mask: Tensor | None = None) -> Tensor:
        """Queries `[n, c]`, vectors `[n, m, c]` → `[n, c]`; `mask` `[n, m]` is False for vectors that do not count."""
        n, width = query.shape
        norm, linear = self.kv
        keys, values = effective_weight(linear).view(2, self.num_heads, -1, width)  # each [heads, c / heads, c]
        vectors = norm(vectors)
        folded = torch.einsum("nhd,hdc->nhc", self.q(query).view(n, self.num_heads, -1), keys)
        scores = folded @ vectors.transpose(1, 2) * width**-0.5  # [n, heads, m]
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None], float("-inf"))
        mean = scores.softmax(-1).to(vectors.dtype) @ vectors
        return query + self.proj(torch.einsum("nhc,hdc->nhd", mean, values).flatten(1))


class EvePatchEmbedding(Encoder):
    """Patches, each window of 2 × 2 made one token by cross-attention, a CLS token and row ends (EVE, section 3.1).

    An image of any size that is a multiple of two patches gives 1 + rows · (cols + 1) tokens. Images of a batch may
    differ in size; published EVE embeds a padded square and crops it, with the same result.

    Args:
        width: features per token.
        patch: pixels per patch side; a token covers 2 × 2 patches.
        num_heads: attention heads.
        local_attention: whether cross-attention (CA1) makes a window one token; False takes the mean of its patches.
        global_attention: whether a CLS token, made by cross-attention (CA2) over the image's tokens, comes first;
            False: no CLS token.

    Raises:
        ValueError: when `num_heads` does not divide `width`.
    """

    def __init__(
        self,
        width: int = 1024,
        patch: int = 14,
        num_heads: int = 8,
        local_attention: bool = True,
        global_attention: bool = True,
    ) -> None:
        super().__init__()
        self.width, self.patch = width, patch
        self.patch_grid = PatchGrid(2 * patch, prefix=int(global_attention), row_end=1)
        self.pixels = PixelSpec(size=None, multiple=2 * patch, mean=CLIP_MEAN)
        self.patch_embedding = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.split_embedding = nn.Parameter(torch.randn(width))
        self.local_attention = CrossAttention(width, num_heads) if local_attention else None
        self.class_embedding = nn.Parameter(torch.randn(width)) if global_attention else None
        self.global_attention = CrossAttention(width, num_heads) if global_attention else None
        self._set_normalisation(CLIP_MEAN, CLIP_STD)

    def forward(self, images: Images) -> VisualTokens:
        """Tokens `[t, d_e]`: per image CLS, then row by row, each row closed by the row-end token."""
        grids = tuple(self.patch_grid(*size) for size in images.sizes)
        windows = self.normalise(pixel_windows(images, self.patch), self.patch_embedding.weight.dtype)
        return VisualTokens(self.embed(windows, grids), grids)

    def embed(self, windows: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Tokens of normalised pixels.

        Args:
            windows: `[windows, 4, 3, patch, patch]`, as `pixel_windows` orders them.
            grids: layout of each image's tokens.

        Returns:
            `[t, d_e]`, in the order of `forward`.
        """
        cells = F.linear(windows.flatten(2), self.patch_embedding.weight.flatten(1))  # the convolution: [windows, 4, c]
        features = cells.mean(1)
        if self.local_attention is not None:
            features = self.local_attention(features, cells)
        patches = index_patches(grids)
        return lay_out(features, self._look_at_all(features, patches, len(grids)), self.split_embedding, patches, grids)

    def _look_at_all(self, features: Tensor, patches: Patches, n: int) -> Tensor | None:
        """The CLS token of each image, `[n, c]`; None without global attention."""
        if self.global_attention is None or self.class_embedding is None:
            return None
        lengths = patches.image.bincount(minlength=n)
        longest = int(lengths.max())
        within = torch.arange(len(patches.image)) - (lengths.cumsum(0) - lengths)[patches.image]
        places = send(patches.image * longest + within, features.device)
        mask = send(torch.arange(longest) < lengths[:, None], features.device)
        padded = features.new_zeros(n * longest, self.width).index_copy(0, places, features)
        query = self.class_embedding.expand(n, -1)
        return self.global_attention(query, padded.view(n, longest, self.width), mask)
