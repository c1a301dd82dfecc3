"""`LlavaNextForConditionalGeneration` of transformers: LLaVA-1.6, of the parts of LLaVA with tiles put together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import LlavaConfig, LlavaNextConfig

from lit_vlm.checkpoints.published.layout import SlotStates
from lit_vlm.checkpoints.published.llava_hf import LlavaFamily, check_projector
from lit_vlm.embedders import SpliceTiles

NEWLINE = "image_newline"


class LlavaNext(LlavaFamily):
    """LLaVA-1.6 as transformers' `LlavaNextForConditionalGeneration` saves it; it is read, not written.

    The weights go with `data.AnyRes`, whose `layouts` and `tile` are `image_grid_pinpoints` of config.json.
    """

    name = "llava_next"
    model_types = ("llava_next",)
    embedder = SpliceTiles

    def settings(self, found: Mapping[str, Any]) -> LlavaNextConfig:
        """The published configuration; raises ValueError for a projector or tokens that are not read."""
        settings = LlavaNextConfig(**found)
        check_projector(settings.projector_hidden_act)
        has_cls = settings.vision_config.model_type == "clip_vision_model"
        if has_cls and settings.vision_feature_select_strategy == "full":
            raise ValueError("vision_feature_select_strategy 'full': tiles with a CLS token are not put together here")
        return settings

    def slots(self, state: Mapping[str, Tensor], config: LlavaConfig | LlavaNextConfig) -> SlotStates:
        """Weights by slot, the newline's among them; raises as `llava_slots`."""
        own = {key for key in state if key.removeprefix("model.") == NEWLINE}
        slots = super().slots({key: value for key, value in state.items() if key not in own}, config)
        return slots | {"embedder": dict(zip(["newline"], (state[key] for key in own), strict=False))}

    def published(self, slot: str, name: str) -> str:
        """The published key of a weight."""
        return f"model.{NEWLINE}" if slot == "embedder" else super().published(slot, name)
