"""An exported model, as transformers loads, trains and asks it."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from lit_vlm.core.batch import IGNORE
from lit_vlm.hf.backbone import LitVLMModel, LitVLMPreTrainedModel
from lit_vlm.hf.cache import LitVLMCache
from lit_vlm.hf.config import LitVLMConfig
from lit_vlm.model.vlm import VLM


class LitVLMForConditionalGeneration(LitVLMPreTrainedModel, GenerationMixin):
    """A model of the kit behind the interface of transformers; teachers and heads are left behind.

    Inputs come from `LitVLMProcessor`. Rows may be padded on either side; positions count tokens alone.

    Args:
        config: what the model is made of.

    Attributes:
        model: all of it but the output layer.
    """

    def __init__(self, config: LitVLMConfig) -> None:
        asked = config._attn_implementation_internal
        super().__init__(config)
        # It has just become the default of transformers, where nothing was asked for: that is for the parts to say.
        config._attn_implementation_internal = asked
        self.model = LitVLMModel(config)
        self.post_init()

    @property
    def inner(self) -> VLM:
        """The model as the kit has it."""
        return self.model.vlm

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: LitVLMCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of all positions, and with labels the mean loss over those that have one.

        Args:
            input_ids: as for `LitVLMModel.forward`, and so are the other arguments that are not named here.
            attention_mask: see there.
            pixel_values: see there.
            image_sizes: see there.
            labels: `[b, s]`, aligned with `input_ids`; -100, and image tokens, carry no loss.
            position_ids: see there.
            past_key_values: see there.
            inputs_embeds: see there.
            use_cache: see there.
            output_hidden_states: see there.
            logits_to_keep: logits of the last so many positions only, or of these; 0: all.
            num_items_in_batch: what the summed loss is divided by, in place of the number of labels.
            kwargs: see there.

        Raises:
            ValueError: as `LitVLMModel.forward`, and for labels without the logits of all positions.
        """
        output = self.model(
            input_ids,
            attention_mask,
            pixel_values,
            image_sizes,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_hidden_states,
            **kwargs,
        )
        hidden = output.last_hidden_state
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
        logits = self.inner.decoder.logits(hidden if isinstance(keep, int) else hidden[:, keep])
        return CausalLMOutputWithPast(
            loss=None if labels is None else self._loss(logits, labels, input_ids, num_items_in_batch),
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
        )

    def _loss(self, logits: Tensor, labels: Tensor, input_ids: Tensor | None, items: Tensor | int | None) -> Tensor:
        if logits.shape[1] != labels.shape[1]:
            raise ValueError("labels need the logits of all positions: leave logits_to_keep at 0")
        targets = labels.masked_fill(input_ids == self.config.image_token_index, IGNORE)[:, 1:].to(logits.device)
        summed = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets.flatten(), reduction="sum")
        mean = summed / (targets != IGNORE).sum().clamp(min=1)
        # Whoever counted the items counted labels of image tokens as well.
        return mean if items is None else mean * (labels[:, 1:] != IGNORE).sum() / items

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """False: `forward` makes the cache, as embedders have one of their own."""
        return False

    def get_output_embeddings(self) -> nn.Module:
        """The decoder's output layer."""
        return self.language_model().get_output_embeddings()
