"""`LlavaNextForConditionalGeneration` of transformers: LLaVA-1.6, of the parts of LLaVA with tiles put together."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import LlavaNextConfig

from lit_vlm.checkpoints.published.family import Family
from lit_vlm.checkpoints.published.layout import SlotStates, fill, read_config
from lit_vlm.checkpoints.published.llava_hf import check_projector, llava_slots, make_llava
from lit_vlm.checkpoints.published.llava_written import published_key
from lit_vlm.core.pretrained import resolve
from lit_vlm.core.safetensors import read_folder
from lit_vlm.embedders import SpliceTiles
from lit_vlm.model.vlm import VLM

NEWLINE = "image_newline"


def _settings(found: Mapping[str, Any]) -> LlavaNextConfig:
    """The published configuration; raises ValueError for a projector or tokens that are not read."""
    settings = LlavaNextConfig(**found)
    check_projector(settings.projector_hidden_act)
    has_cls = settings.vision_config.model_type == "clip_vision_model"
    if has_cls and settings.vision_feature_select_strategy == "full":
        raise ValueError("vision_feature_select_strategy 'full': tiles with a CLS token are not put together here")
    return settings


def _slots(state: Mapping[str, Tensor], config: LlavaNextConfig) -> SlotStates:
    own = {key for key in state if key.removeprefix("model.") == NEWLINE}
    slots = llava_slots({key: value for key, value in state.items() if key not in own}, config, LlavaNext.name)
    return slots | {"embedder": dict(zip(["newline"], (state[key] for key in own), strict=False))}


def _published(slot: str, name: str) -> str:
    return f"model.{NEWLINE}" if slot == "embedder" else published_key(slot, name)


class LlavaNext(Family):
    """LLaVA-1.6 as transformers' `LlavaNextForConditionalGeneration` saves it; it is read, not written.

    The weights go with `data.AnyRes`, whose `layouts` and `tile` are `image_grid_pinpoints` of config.json.
    """

    name = "llava_next"
    model_types = ("llava_next",)

    def read(self, source: str) -> SlotStates:
        """Weights of a folder or hub repository by slot.

        Raises:
            ValueError: for a key that belongs to no slot.
        """
        folder = resolve(source)
        return _slots(read_folder(folder), _settings(read_config(folder)))

    def load(self, source: str | Path | Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> VLM:
        """Build the model that the configuration describes, with all weights; raises as `load_published` does."""
        if isinstance(source, Mapping):
            if config is None:
                raise ValueError("a state dict says nothing of attention heads and layers: pass config as well")
            settings, state, folder = _settings(config), source, None
        else:
            folder = resolve(str(source))
            settings = _settings(config or read_config(folder))
            state = read_folder(folder)
        model = make_llava(settings, folder, SpliceTiles)
        fill(model, _slots(state, settings), _published)
        return model.eval()
