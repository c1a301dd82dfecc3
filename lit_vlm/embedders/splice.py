"""Splice: the decoder's own word vectors, with visual tokens on the image positions, and task tokens behind them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lit_vlm.core.batch import Batch, Grid, VisualTokens, index_row_ends, index_suffixes
from lit_vlm.core.transfer import send
from lit_vlm.decoders.base import Decoder
from lit_vlm.embedders.base import Embedder, check_grids, scatter_visual
from lit_vlm.projectors.base import InTurn


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


def with_row_end(grid: Grid) -> Grid:
    """Adds to the layout of an image a token that closes each row.

    Raises:
        ValueError: when a token closes the rows already.
    """
    if grid.row_end:
        raise ValueError(
            "embedder Splice: row_end closes rows of patches, and the encoder closes them already: set the encoder's "
            "row_end to false, or the embedder's to null"
        )
    return grid._replace(row_end=1)


class Splice(Embedder):
    """The decoder's word vectors, with each image's tokens on its positions (LLaVA, VILA, EVE, Fuyu).

    With task tokens (OLA-VLM, section 3) every image is followed by learned vectors, in named groups that heads read.
    A group may have more parameters than tokens: then each token is the mean of an equal number of consecutive ones.

    Args:
        width: width of the decoder.
        vocab_size: rows of the decoder's word table.
        task_tokens: group → number of its tokens after each image, in the order of the sequence.
        pooled_from: group → number of its parameters, where there are more than tokens; a multiple of these.
        token_std: standard deviation of new parameters; 1, as published, is far above that of word vectors.
        row_end: a token of the decoder's tokenizer, whose word vector closes each row of patches (`|NEWLINE|` of
            Fuyu-8B, Adept 2023), or its id; for encoders that close no rows themselves.

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
        row_end: str | int | None = None,
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
        self.row_end = row_end
        self._row_end_id: int | None = None
        if start:
            self.grid_map = WithSuffix(start)
        if row_end is not None:
            self.grid_map = InTurn(with_row_end, self.grid_map)

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

    def connect(self, decoder: Decoder) -> None:
        """Look up the id of `row_end`.

        Raises:
            ValueError: when it is no token of the decoder's tokenizer, or no row of its word table.
        """
        if self.row_end is None:
            return
        if isinstance(self.row_end, int):
            if not 0 <= self.row_end < self.vocab_size:
                raise ValueError(
                    f"model.embedder: row_end is {self.row_end}, and the decoder's word table has {self.vocab_size} "
                    "rows: give the id or the letters of one of its tokens"
                )
            self._row_end_id = self.row_end
            return
        tokenizer = decoder.tokenizer
        found = tokenizer.convert_tokens_to_ids(self.row_end)
        if found is None or tokenizer.convert_ids_to_tokens(found) != self.row_end:
            raise ValueError(
                f"model.embedder: row_end is '{self.row_end}', and the decoder's tokenizer ({tokenizer.name_or_path}) "
                f"has no such token: name one that it has, or add this one: --model.decoder.init_args.new_tokens "
                f"'{json.dumps([self.row_end])}'"
            )
        self._row_end_id = found

    def standalone(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments with the id of `row_end` in place of its letters, which need a tokenizer."""
        return {**arguments, "row_end": self._row_end_id} if self.row_end is not None else dict(arguments)

    def forward(
        self,
        batch: Batch,
        visual: VisualTokens | None,
        decoder: Decoder,
        cache: Any = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Input vectors `[b, s, d]`; arguments and errors as in `Embedder.forward`."""
        if visual is None:
            return self.words(batch.input_ids, decoder)
        check_grids(batch, visual, self.grid_map)
        tokens = self.task_vectors() if self.tasks else None
        if not batch.image_grids:
            embeds = scatter_visual(self.words(batch.input_ids, decoder), batch.image_positions, visual)
            return embeds if tokens is None else embeds + 0 * tokens.sum().to(embeds.dtype)
        ids, places, own = batch.input_ids, batch.image_positions, batch.image_grids
        if self.row_end is not None:
            # In the ids, so that the word table is read once: sharded, it must run as often on every rank.
            ids, places = self._closed_rows(batch, decoder)
            own = tuple(grid._replace(row_end=0) for grid in own)
        embeds = self.words(ids, decoder)
        if tokens is None:
            return scatter_visual(embeds, places, visual)
        others, suffixes = (send(index, embeds.device) for index in index_suffixes(own))
        embeds = scatter_visual(embeds, places[others], visual)
        behind = tokens.to(embeds.dtype).repeat(len(suffixes), 1)
        return embeds.flatten(0, 1).index_copy(0, places[suffixes.flatten()], behind).view_as(embeds)

    def _closed_rows(self, batch: Batch, decoder: Decoder) -> tuple[Tensor, Tensor]:
        """The ids `[b, s]` with that of `row_end` behind each row, and the positions of all other visual tokens."""
        if self._row_end_id is None:  # where no model was put together
            self.connect(decoder)
        assert self._row_end_id is not None
        ids, places = batch.input_ids, batch.image_positions
        others, ends = (send(index, ids.device) for index in index_row_ends(batch.image_grids))
        return ids.flatten().index_fill(0, places[ends], self._row_end_id).view_as(ids), places[others]

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
