"""`LlavaForConditionalGeneration` of transformers: LLaVA-1.5 and models of the same parts."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import LlavaConfig, LlavaNextConfig

from lit_vlm.checkpoints.published.family import Family
from lit_vlm.checkpoints.published.layout import SlotStates, fill, read_config
from lit_vlm.checkpoints.published.llava_written import PROJECTOR, published_key, write_llava
from lit_vlm.core.part import meta_parameters
from lit_vlm.core.pretrained import resolve
from lit_vlm.core.safetensors import read_folder
from lit_vlm.data.sample.format import SampleFormat
from lit_vlm.decoders import HFDecoder
from lit_vlm.embedders import Embedder, Splice
from lit_vlm.encoders import HFEncoder
from lit_vlm.model.vlm import VLM
from lit_vlm.projectors import MLP

DROPPED = {
    "position_ids": "a buffer that older versions saved",
    "rotary_emb.inv_freq": "a buffer that older versions saved",
    "post_layernorm": "the final norm of the vision model, which the feature layer does not reach",
}


def check_projector(act: str) -> None:
    """Refuse a projector that is no MLP of two layers with GELU, such as a written `Linear`; raises ValueError."""
    if act != "gelu":
        raise ValueError(
            f"projector_hidden_act '{act}': a projector with it is not read; start from the checkpoint that it was "
            "written from"
        )


def _kept(config: LlavaConfig | LlavaNextConfig) -> int:
    """How many blocks the vision model has up to the last feature layer."""
    layers, depth = config.vision_feature_layer, config.vision_config.num_hidden_layers
    return max(one if one >= 0 else depth + 1 + one for one in (layers if isinstance(layers, list) else [layers]))


def make_llava(
    config: LlavaConfig | LlavaNextConfig, tokenizer: str | None, embedder: Callable[[int, int], Embedder]
) -> VLM:
    """The model that a configuration describes, on the meta device.

    Args:
        config: the published one.
        tokenizer: folder of the decoder's tokenizer; None: it has none.
        embedder: (width of the decoder, rows of its word table) → embedder.
    """
    has_cls = config.vision_config.model_type == "clip_vision_model"
    with meta_parameters():
        encoder = HFEncoder(
            config=config.vision_config.to_dict(),
            layer=config.vision_feature_layer,
            cls=has_cls and config.vision_feature_select_strategy == "full",
        )
        text = config.text_config.to_dict() | {"tie_word_embeddings": config.tie_word_embeddings}
        decoder = HFDecoder(config=text, tokenizer=tokenizer)
        projector = MLP(encoder.width, decoder.width, depth=2)
        return VLM(encoder, projector, embedder(decoder.width, decoder.vocab_size), decoder)


def llava_slots(state: Mapping[str, Tensor], config: LlavaConfig | LlavaNextConfig, family: str) -> SlotStates:
    """Weights by slot, without those of the vision model that come after the feature layer.

    Args:
        state: weights under published names.
        config: the published configuration.
        family: name of the family, for messages.

    Raises:
        ValueError: for a key that belongs to no slot.
    """
    slots: SlotStates = {"encoder": {}, "projector": {}, "decoder": {}}
    kept = _kept(config)
    for key, value in state.items():
        place = _place(key, kept, family)
        if place is not None:
            slots[place[0]][place[1]] = value
    words = slots["decoder"].get("lm.model.embed_tokens.weight")
    if config.tie_word_embeddings and words is not None:
        slots["decoder"].setdefault("lm.lm_head.weight", words)
    return slots


def _place(key: str, num_blocks: int, family: str) -> tuple[str, str] | None:
    """(slot, own key) of a published key; None for a key that is dropped, for a reason stated below.

    Keys may be those of files from before or after transformers 4.52, with or without `vision_model.`.

    Raises:
        ValueError: for a key that belongs to no slot.
    """
    if any(mark in key for mark in DROPPED):
        return None
    name = key.removeprefix("model.")
    if name.startswith("vision_tower."):
        rest = name.removeprefix("vision_tower.").removeprefix("vision_model.")
        if (match := re.match(r"encoder\.layers\.(\d+)\.", rest)) and int(match[1]) >= num_blocks:
            return None  # blocks after the feature layer
        if rest.startswith("head."):
            return None  # SigLIP's pooling head, which the feature layer does not reach
        return "encoder", f"backbone.{rest}"
    if name.startswith("multi_modal_projector."):
        layer, _, kind = name.removeprefix("multi_modal_projector.").partition(".")
        if layer in PROJECTOR:
            return "projector", f"{PROJECTOR[layer]}.{kind}"
    if name.startswith("language_model."):
        rest = name.removeprefix("language_model.")
        return "decoder", f"lm.{rest}" if rest.startswith(("model.", "lm_head.")) else f"lm.model.{rest}"
    if name == "lm_head.weight":
        return "decoder", "lm.lm_head.weight"
    raise ValueError(f"'{key}' is no key of the family {family}")


def llava_parts(model: VLM) -> tuple[HFEncoder, MLP, HFDecoder]:
    """The parts of a model that transformers' `LlavaForConditionalGeneration` can be.

    Raises:
        ValueError: for a model of other parts.
    """
    encoder, projector, decoder = model.encoder, model.projector, model.decoder
    if (
        not isinstance(encoder, HFEncoder)
        or not isinstance(projector, MLP)
        or len(projector.layers) != 3
        or not isinstance(model.embedder, Splice)
        or model.embedder.task_tokens
        or not isinstance(decoder, HFDecoder)
    ):
        parts = [type(part).__name__ for part in (encoder, projector, model.embedder, decoder)]
        raise ValueError(
            "llava-hf is HFEncoder, MLP of depth 2, Splice without task tokens and HFDecoder; this model is "
            f"{', '.join(parts)}"
        )
    return encoder, projector, decoder


class LlavaFamily(Family):
    """A family of transformers' LLaVA classes: encoder, MLP, decoder and what puts their vectors together.

    Attributes:
        embedder: (width of the decoder, rows of its word table) → embedder.
    """

    embedder: Callable[[int, int], Embedder]

    @abstractmethod
    def settings(self, found: Mapping[str, Any]) -> LlavaConfig | LlavaNextConfig:
        """The published configuration; raises ValueError for what is not read."""

    def slots(self, state: Mapping[str, Tensor], config: LlavaConfig | LlavaNextConfig) -> SlotStates:
        """Weights by slot; raises as `llava_slots`."""
        return llava_slots(state, config, self.name)

    def published(self, slot: str, name: str) -> str:
        """The published key of a weight."""
        return published_key(slot, name)

    def read(self, source: str) -> SlotStates:
        """Weights of a folder or hub repository by slot.

        Raises:
            ValueError: for a key that belongs to no slot.
        """
        folder = resolve(source)
        return self.slots(read_folder(folder), self.settings(read_config(folder)))

    def load(self, source: str | Path | Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> VLM:
        """Build the model that the configuration describes, with all weights; raises as `load_published` does."""
        if isinstance(source, Mapping):
            if config is None:
                raise ValueError("a state dict says nothing of attention heads and layers: pass config as well")
            settings, state, folder = self.settings(config), source, None
        else:
            folder = resolve(str(source))
            settings = self.settings(config or read_config(folder))
            state = read_folder(folder)
        model = make_llava(settings, folder, self.embedder)
        fill(model, self.slots(state, settings), self.published)
        return model.eval()


class LlavaHf(LlavaFamily):
    """LLaVA as transformers' `LlavaForConditionalGeneration` saves it."""

    name = "llava-hf"
    model_types = ("llava",)
    embedder = Splice

    def settings(self, found: Mapping[str, Any]) -> LlavaConfig:
        """The published configuration; raises as `check_projector`."""
        settings = LlavaConfig(**found)
        check_projector(settings.projector_hidden_act)
        return settings

    def export(self, model: VLM, out: Path, written: SampleFormat | None = None) -> float:
        """Write a model that `LlavaForConditionalGeneration.from_pretrained(out)` loads; see `write_llava`.

        Args:
            model: HFEncoder, Linear or MLP of depth 1 or 2, Splice and HFDecoder.
            out: a folder that is new or empty.
            written: template and transform of its data.

        Returns and raises as `Family.export`.
        """
        return write_llava(model, out, written)
