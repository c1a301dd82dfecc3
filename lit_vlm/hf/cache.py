"""The cache of a whole model, as transformers' `generate` handles it."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from lit_vlm.model.vlm import VLM, DecodingCache


class LitVLMCache(Cache):
    """What embedder and decoder remember of the positions so far; `generate` reorders it between beams.

    Args:
        vlm: the model, whose parts know how to select rows of their caches.

    Attributes:
        held: the caches of the parts.
        length: number of positions that were seen, padding included.
    """

    def __init__(self, vlm: VLM) -> None:
        super().__init__(layer_class_to_replicate=DynamicLayer)
        self._vlm = vlm
        self.held: DecodingCache = vlm.new_cache()
        self.length = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> LitVLMCache:
        """A copy of what is remembered, for prompts that are continued several times; the model is not copied."""
        twin = LitVLMCache(self._vlm)
        twin.held, twin.length = copy.deepcopy(self.held, memo), self.length
        return twin

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of positions that were seen, padding included; that of all layers, whichever is asked for."""
        return self.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows `beam_idx` `[b']`, in this order."""
        self.held = self._vlm.select_cache(self.held, beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse: parts of the kit do not take back what they have seen.

        Raises:
            NotImplementedError: always; assisted generation needs it.
        """
        raise NotImplementedError("assisted generation takes tokens back, which a model of lit-vlm does not")

    @property
    def is_compileable(self) -> bool:
        """False, as it grows with each step."""
        return False
