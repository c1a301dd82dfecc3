"""Fuyu's published weights: one linear map of patches, and a Persimmon that reads them."""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import FuyuConfig

from lit_vlm.checkpoints.published.family import Family
from lit_vlm.checkpoints.published.layout import (
    Layout,
    Names,
    SlotStates,
    checked_sizes,
    export_folder,
    load_folder,
)
from lit_vlm.core.part import meta_parameters
from lit_vlm.core.pretrained import plain_config, resolve
from lit_vlm.core.safetensors import read_folder
from lit_vlm.data.sample.format import SampleFormat
from lit_vlm.decoders import HFDecoder
from lit_vlm.embedders import Splice
from lit_vlm.encoders import LinearPatches
from lit_vlm.model.vlm import VLM
from lit_vlm.projectors import Identity

PATCHES = "vision_embed_tokens.weight"
NEWLINE = "image_newline_id"
"""Key of config.json for the id of `ROW_END`, in what is written here; transformers does not read it."""
PLACE, ROW_END = "|SPEAKER|", "|NEWLINE|"
ROW_END_ID = 71019
"""Id of `ROW_END` in the tokenizer of adept/fuyu-8b (transformers' test of its processor), for a bare state dict."""


def _side(weight: Tensor, shown: str) -> int:
    """Side of the patches that a weight `[d, 3·side·side]` takes; raises ValueError for other shapes."""
    side = isqrt(weight.shape[-1] // 3) if weight.ndim == 2 else 0
    if weight.ndim != 2 or 3 * side**2 != weight.shape[1]:
        raise ValueError(f"'{shown}' is {tuple(weight.shape)}, not [width, 3 · patch · patch]")
    return side


def _channels_first(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """A patch of Fuyu is flattened row by row, the colours of each pixel together; ours colour by colour."""
    if (weight := state.get(PATCHES)) is None:
        return state
    side = _side(weight, PATCHES)
    ours = weight.unflatten(1, (side, side, 3)).permute(0, 3, 1, 2).flatten(1)
    return {**state, PATCHES: ours.contiguous()}


def _channels_last(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Mapping[str, Tensor]:
    weight = state[PATCHES]
    side = _side(weight, PATCHES)
    return {**state, PATCHES: weight.unflatten(1, (3, side, side)).permute(0, 2, 3, 1).flatten(1).contiguous()}


NAMES = Names(
    family="fuyu",
    dropped={"rotary_emb.inv_freq": "a buffer that older versions saved"},
    slots={
        "vision_embed_tokens.": ("encoder", "linear."),
        "language_model.lm_head.": ("decoder", "lm.lm_head."),
        "language_model.model.": ("decoder", "lm.model."),
    },
    split=_channels_first,
    join=_channels_last,
)


def _language(config: Mapping[str, Any]) -> dict[str, Any]:
    """The decoder's configuration, which adept/fuyu-8b has among its own settings and others under `text_config`.

    Raises:
        ValueError: for an absent size, naming it.
    """
    given = config.get("text_config") or config
    checked_sizes(given, "config.json")
    return plain_config(FuyuConfig(**{key: value for key, value in config.items() if key != "model_type"}).text_config)


def _architecture(layout: Layout) -> VLM:
    language = _language(layout.config)
    patches = layout.weight("encoder", "linear.weight", 2)
    row_end: str | int = ROW_END if layout.tokenizer else int(layout.config.get(NEWLINE, ROW_END_ID))
    with meta_parameters():
        encoder = LinearPatches(width=language["hidden_size"], patch=_side(patches, PATCHES), row_end=False)
        decoder = HFDecoder(config=language, tokenizer=layout.tokenizer)
        projector = Identity(encoder.width, decoder.width)
        return VLM(encoder, projector, Splice(decoder.width, decoder.vocab_size, row_end=row_end), decoder)


class Fuyu(Family):
    """Fuyu-8B: linear patches straight into a decoder, the vector of a word behind each row."""

    name = "fuyu"
    model_types = ("fuyu",)
    row_ends = True

    def read(self, source: str) -> SlotStates:
        """Weights of a folder or hub repository by slot.

        Raises:
            ValueError: for a key that belongs to no slot, or patches of another shape.
        """
        return NAMES.slots_of(read_folder(resolve(source)), {})

    def load(self, source: str | Path | Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> VLM:
        """Build the model that the configuration describes, with all weights; raises as `load_published` does."""
        return load_folder(source, config, NAMES, _architecture)

    def export(self, model: VLM, out: Path, written: SampleFormat | None = None) -> float:
        """Write the model under published names, read it back, and compare logits.

        Args:
            model: LinearPatches and Splice with `row_end` of Splice alone, Identity and HFDecoder of type persimmon.
            out: a folder that is new or empty.
            written: not used, as Fuyu's configuration has no setting for it.

        Returns and raises as `Family.export`.
        """
        encoder, embedder, decoder = model.encoder, model.embedder, model.decoder
        if (
            not isinstance(encoder, LinearPatches)
            or encoder.row_end is not None
            or not isinstance(model.projector, Identity)
            or not isinstance(embedder, Splice)
            or embedder.task_tokens
            or embedder.row_end != ROW_END
            or not isinstance(decoder, HFDecoder)
            or decoder.config.model_type != "persimmon"
        ):
            parts = [type(part).__name__ for part in (encoder, model.projector, embedder, decoder)]
            raise ValueError(
                f"fuyu is LinearPatches with row_end false, Identity, Splice with row_end '{ROW_END}' and HFDecoder of "
                f"type persimmon; this model is {parts}, or has other settings"
            )
        place = decoder.tokenizer.get_vocab().get(PLACE)
        if place is None:
            raise ValueError(
                f"fuyu: the tokenizer has no '{PLACE}', with which Fuyu marks the places of patches: list it under "
                "model.decoder.init_args.new_tokens when the run starts"
            )
        config = FuyuConfig(
            text_config=plain_config(decoder.config),
            patch_size=encoder.patch_grid.patch,
            image_token_id=place,
            tie_word_embeddings=bool(decoder.config.tie_word_embeddings),
        ).to_dict() | {"architectures": ["FuyuForCausalLM"], NEWLINE: embedder.standalone({})["row_end"]}
        return export_folder(model, out, config, NAMES, {}, self.load)
