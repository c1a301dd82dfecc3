"""A decoder without weights, for stages that leave the decoder out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from torch import Tensor, nn

from lit_vlm.core.batch import Grid, Segments
from lit_vlm.decoders.base import Decoder, DecoderOutput


class AbsentDecoder(Decoder):
    """Width, layers, vocabulary and tokenizer of a decoder without its weights, for stages whose losses never run it.

    Args:
        decoder: the decoder that is left out.
    """

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.width, self.num_layers, self.vocab_size = decoder.width, decoder.num_layers, decoder.vocab_size
        self._tokenizer = decoder.tokenizer

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the decoder that is left out."""
        return self._tokenizer

    def embed(self, input_ids: Tensor) -> Tensor:
        """Refuse to run.

        Raises:
            ValueError: always, naming `model.stage.leave_out`.
        """
        self._refuse()

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
        """Refuse to run.

        Raises:
            ValueError: always, naming `model.stage.leave_out`.
        """
        self._refuse()

    def logits(self, hidden: Tensor) -> Tensor:
        """Refuse to run.

        Raises:
            ValueError: always, naming `model.stage.leave_out`.
        """
        self._refuse()

    def head_parameters(self) -> list[nn.Parameter]:
        """An empty list, as there is no output layer."""
        return []

    def recompute_blocks(self, enabled: bool) -> None:
        """Do nothing, as there are no blocks."""

    def new_cache(self) -> Any:
        """Refuse to run.

        Raises:
            ValueError: always, naming `model.stage.leave_out`.
        """
        self._refuse()

    def select_cache(self, cache: Any, rows: Tensor) -> Any:
        """Refuse to run.

        Raises:
            ValueError: always, naming `model.stage.leave_out`.
        """
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise ValueError(
            "the decoder is left out of this stage (model.stage.leave_out), and something needs it: a loss or a head "
            "that reads its layers, an embedder without words of its own, or a callback that generates"
        )
