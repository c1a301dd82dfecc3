"""Splice: the decoder's own word vectors, with visual tokens on the image positions, and task tokens behind them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lit_vlm.core.batch import Batch, Grid, VisualTokens, index_suffixes
from lit_vlm.core.transfer import send
from lit_vlm.decoders.base import Decoder
from lit_vlm.embedders.base import Embedder, check_grids, scatter_visual


@dataclass(frozen=True)
class WithSuffix:
    """Adds to the layout of an image the `suffix` tokens of the embedder that follow it."""

    suffix: int

    def __call__(self, grid: Grid) -> Grid:
        """The layout with the suffix.

        Raises:
            ValueError: when the image has a suffix already.
        """
        if grid.suffix:
            raise ValueError("embedder Splice: task tokens need images that end with their patches")
        return grid._replace(suffix=self.suffix)


class Splice(Embedder):
    """The decoder's word vectors, with each image's tokens on its positions (LLaVA, VILA, EVE).

    With task tokens (OLA-VLM, section 3) every image is followed by learned vectors, in named groups that heads read.
    A group may have more parameters than tokens: then each token is the mean of an equal number of consecutive ones.

    Args:
        width: width of the decoder.
        vocab_size: rows of the decoder's word table.
        task_tokens: group → number of its tokens after each image, in the order of the sequence.
        pooled_from: group → number of its parameters, where there are more than tokens; a multiple of these.
        token_std: standard deviation of new parameters; 1, as published, is far above that of word vectors.

    Raises:
        ValueError: for groups without tokens, or parameters that their tokens do not divide.
    """

    def __init__(
        self,
        width: int,
        vocab_size: int,
        task_tokens: dict[str, int] | None = None,
        pooled_from: dict[str, int] | None = None,
        token_std: float = 1.0,
    ) -> None:
        super().__init__(width, vocab_size)
        counts = task_tokens or {}
        self._check_counts(counts, pooled_from or {})
        start = 0
        for name, count in counts.items():
            self.task_tokens[name] = range(start, start + count)
            start += count
        self.tasks = nn.ParameterDict(
            {
                name: nn.Parameter(torch.randn((pooled_from or {}).get(name, count), width) * token_std)
                for name, count in counts.items()
            }
        )
        if start:
            self.grid_map = WithSuffix(start)

    def _check_counts(self, counts: Mapping[str, int], parameters: Mapping[str, int]) -> None:
        """Refuse numbers of tokens and parameters that do not fit; raises ValueError."""
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"embedder.task_tokens.{name} is {count}: leave a group without tokens out")
            if parameters.get(name, count) < 1 or parameters.get(name, count) % count:
                raise ValueError(
                    f"embedder.pooled_from.{name} {parameters[name]} is no multiple of its {count} task_tokens"
                )
        if unknown := parameters.keys() - counts.keys():
            raise ValueError(f"embedder.pooled_from names {sorted(unknown)}, of which task_tokens has none")

    def forward(
        self,
        batch: Batch,
        visual: VisualTokens | None,
        decoder: Decoder,
        cache: Any = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Input vectors `[b, s, d]`; arguments and errors as in `Embedder.forward`."""
        embeds = self.words(batch.input_ids, decoder)
        if visual is None:
            return embeds
        check_grids(batch, visual, self.grid_map)
        if not self.tasks:
            return scatter_visual(embeds, batch.image_positions, visual)
        tokens = self.task_vectors().to(embeds.dtype)
        if not batch.image_grids:
            return scatter_visual(embeds, batch.image_positions, visual) + 0 * tokens.sum()
        others, suffixes = (send(index, embeds.device) for index in index_suffixes(batch.image_grids))
        embeds = scatter_visual(embeds, batch.image_positions[others], visual)
        places = batch.image_positions[suffixes.flatten()]
        return embeds.flatten(0, 1).index_copy(0, places, tokens.repeat(len(suffixes), 1)).view_as(embeds)

    def task_vectors(self) -> Tensor:
        """Vectors of the task tokens that follow each image: `[suffix, d]`."""
        return torch.cat(
            [self.tasks[name].unflatten(0, (len(place), -1)).mean(1) for name, place in self.task_tokens.items()]
        )

    def task_parameters(self, name: str) -> Tensor:
        """Parameters of a group of task tokens, before pooling: `[q, d]`."""
        return self.tasks[name]

    def words(self, input_ids: Tensor, decoder: Decoder) -> Tensor:
        """The decoder's word vectors: `[b, s]` → `[b, s, d]`."""
        return decoder.embed(input_ids)
