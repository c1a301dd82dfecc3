"""The decoder slot."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lit_vlm.core.batch import Batch, Grid, Segments
from lit_vlm.core.flops import Flops, FlopsOf, Weights, attention, causal_pairs, pairs_ahead
from lit_vlm.core.part import Part
from lit_vlm.decoders.images import BIDIRECTIONAL, ImageAttention
from lit_vlm.decoders.stack import Recompute


@dataclass
class DecoderOutput:
    """What the blocks of a decoder give for a batch.

    Attributes:
        hidden: `[b, s, d]`, after the final norm; what `logits` reads.
        taps: the hidden states that were asked for, by layer number: 0 the input vectors, l the output of block l, and
            the number of the last layer the states after the final norm (as transformers numbers hidden states).
    """

    hidden: Tensor
    taps: dict[int, Tensor] = field(default_factory=dict)


class Decoder(Part, ABC):
    """A causal language model, in three pieces: word table, blocks, logits.

    Attributes:
        width: width d of the decoder's states.
        num_layers: number of blocks.
        vocab_size: rows of the word table.
        tokenizer: the fast tokenizer that made the vocabulary.
        recompute: whether blocks are recomputed in the backward pass, to save memory; `offload`: from inputs on the
            host.
        image_attention: what a token of an image sees of it: what stands before it (`causal`), or all of it
            (`bidirectional`). All else is causal.
    """

    width: int
    num_layers: int
    vocab_size: int
    recompute: Recompute = False
    image_attention: ImageAttention = "causal"

    @property
    def family(self) -> str:
        """Name of the decoder in messages."""
        return type(self).__name__

    @property
    @abstractmethod
    def tokenizer(self) -> Any:
        """The fast tokenizer that made the vocabulary."""

    @property
    def end_ids(self) -> frozenset[int]:
        """Ids that end an answer as the model was published, beside the tokenizer's end of text."""
        return frozenset()

    def carried(self) -> str | None:
        """In words, the layers that carry a state along a row, such as recurrent ones; None if there are none."""
        return None

    @abstractmethod
    def embed(self, input_ids: Tensor) -> Tensor:
        """Word vectors: `[b, s]` → `[b, s, d]`."""

    @abstractmethod
    def forward(
        self,
        embeds: Tensor,
        position_ids: Tensor,
        taps: Sequence[int] = (),
        cache: Any = None,
        attention_mask: Tensor | None = None,
        visual: Tensor | None = None,
        segments: Segments | None = None,
        grids: Sequence[Grid] | None = None,
    ) -> DecoderOutput:
        """Run the blocks.

        Args:
            embeds: `[b, s, d]`.
            position_ids: `[b, s]`. Where they restart a new segment begins, and attention does not cross.
            taps: layers whose states are wanted; no other state is kept.
            cache: from `new_cache`, while decoding; then s counts the new positions only.
            attention_mask: `[b, past + s]`, 0 for padding; only with a cache.
            visual: `[t]`, index into b·s of the image tokens, for decoders that treat them differently from text. With
                a cache, only the first positions that it gets have images.
            segments: lengths of the segments that `position_ids` make, as in `Batch.segments`, so that no one must read
                them from the device; None if they are not known. They change no result.
            grids: layout of each image's tokens, as in `Batch.image_grids`: where one image ends and the next begins.

        Raises:
            ValueError: for a tap that is no layer of this decoder, or image tokens without grids where images see
                all of themselves.
        """

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """States after the final norm → logits over the vocabulary: `[..., d]` → `[..., v]`."""

    @property
    def attention_width(self) -> int:
        """Width of all query heads of all blocks together."""
        return self.num_layers * self.width

    def token_weights(self, visual: bool) -> Weights:
        """The weights of the blocks that a token is multiplied with.

        Args:
            visual: True for an image token, False for a text token.
        """
        return Weights.of(parameter for block in self.blocks() for parameter in block.parameters())

    def flops(self) -> FlopsOf:
        """Operations of the blocks on a batch; `logits` is counted apart."""
        text, visual, heads = self.token_weights(False), self.token_weights(True), self.attention_width

        def of(batch: Batch) -> Flops:
            counts = batch.counts
            pairs = causal_pairs(sample.num_tokens for sample in batch.samples)
            if self.image_attention == BIDIRECTIONAL:
                pairs += pairs_ahead(grid.picture_tokens for grid in batch.image_grids)
            scores = attention(heads, pairs)
            return text.on(counts.text_tokens) + visual.on(counts.visual_tokens) + scores

        return of

    @abstractmethod
    def head_parameters(self) -> list[nn.Parameter]:
        """The parameters that `logits` uses."""

    @abstractmethod
    def recompute_blocks(self, enabled: bool) -> None:
        """Switch the recomputation of blocks in the backward pass on or off; does nothing where `recompute` is off."""

    @abstractmethod
    def new_cache(self) -> Any:
        """An empty key-value cache."""

    @abstractmethod
    def select_cache(self, cache: Any, rows: Tensor) -> Any:
        """A new cache of the rows `rows` `[b']` of another, which stays as it is; a row may be taken repeatedly."""
