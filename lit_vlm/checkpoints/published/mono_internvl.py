"""Mono-InternVL's published weights: patches, a folding MLP, and an InternLM2 whose blocks have a visual expert."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lit_vlm.checkpoints.published.family import Family
from lit_vlm.checkpoints.published.hovle import tile_settings
from lit_vlm.checkpoints.published.layout import (
    Layout,
    Names,
    SlotStates,
    checked_sizes,
    export_folder,
    load_folder,
    read_config,
)
from lit_vlm.core.part import meta_parameters
from lit_vlm.core.pretrained import resolve
from lit_vlm.core.safetensors import read_folder
from lit_vlm.data.sample.format import SampleFormat
from lit_vlm.decoders import DivideAndConquer, internlm2
from lit_vlm.embedders import Splice
from lit_vlm.encoders import ConvPatches
from lit_vlm.model.vlm import VLM
from lit_vlm.projectors import Downsample

LANGUAGE = "language_model."
PUBLISHED = {
    "template": "internlm2-chat",
    "downsample_ratio": 0.5,
    "ps_version": "v2",
    "select_layer": -1,
}
"""Settings that the published code reads and that are fixed here."""


def _from_published(name: str) -> str:
    """Our name of a weight of a block; `feed_forward_ve` is the MLP of image tokens."""
    name, visual = re.subn(r"^(.*\.)?(\d+\.feed_forward)_ve\.", r"\g<1>\2.", name)
    return re.sub(r"\.mlp\.", f".mlp.{'vision' if visual else 'text'}.", internlm2.to_llama(name))


def _to_published(name: str) -> str:
    plain = re.sub(r"\.mlp\.(text|vision)\.", ".mlp.", name)
    published = internlm2.from_llama(plain)
    return published.replace(".feed_forward.", ".feed_forward_ve.") if ".mlp.vision." in name else published


def _split(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    for part in ("vision_config", "llm_config"):
        if not isinstance(config[part], Mapping):
            raise ValueError(f"config.json: {part} is {config[part]!r}, expected the settings of that part")
    for key in ("downsample_ratio", "ps_version", "select_layer"):
        if (found := config.get(key, PUBLISHED[key])) != PUBLISHED[key]:
            raise ValueError(f"config.json: {key} is {found!r}; Mono-InternVL is read with {PUBLISHED[key]!r} only")
    return internlm2.split_qkv(state, config["llm_config"])


def _join(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    return internlm2.fuse_qkv(state, config["llm_config"])


def _fused(name: str) -> str:
    return re.sub(r"\.attention\.w[qkv]\.weight$", f".{internlm2.FUSED}", name)


NAMES = Names(
    family="mono_internvl",
    dropped={},
    slots={
        "vision_model.embeddings.": ("encoder", ""),
        "mlp1.": ("projector", "layers."),
        f"{LANGUAGE}model.tok_embeddings.": ("decoder", "lm.model.embed_tokens."),
        f"{LANGUAGE}model.layers.": ("decoder", "lm.model.layers."),
        f"{LANGUAGE}model.norm.": ("decoder", "lm.model.norm."),
        f"{LANGUAGE}output.": ("decoder", "lm.lm_head."),
    },
    rename=_from_published,
    restore=_to_published,
    split=_split,
    join=_join,
    whole=_fused,
)


def _architecture(layout: Layout) -> VLM:
    own = layout.config["vision_config"]
    with meta_parameters():
        encoder = ConvPatches(
            width=own["hidden_size"],
            image_size=layout.config.get("force_image_size") or own["image_size"],
            patch=own["patch_size"],
            trained_size=own["image_size"],
        )
        language = checked_sizes(layout.config["llm_config"], "llm_config")
        decoder = DivideAndConquer(config=internlm2.as_llama(language), tokenizer=layout.tokenizer, split="mlp")
        projector = Downsample(encoder.width, decoder.width)
        return VLM(encoder, projector, Splice(decoder.width, decoder.vocab_size), decoder)


class MonoInternVL(Family):
    """Mono-InternVL, whose blocks have a second MLP for image tokens."""

    name = "mono_internvl"
    model_types = ("internvl_chat",)

    def read(self, source: str) -> SlotStates:
        """Weights of a folder or hub repository by slot.

        Raises:
            ValueError: for a key that belongs to no slot.
        """
        folder = resolve(source)
        return NAMES.slots_of(read_folder(folder), read_config(folder))

    def load(self, source: str | Path | Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> VLM:
        """Build the model that the configuration describes, with all weights; raises as `load_published` does."""
        return load_folder(source, config, NAMES, _architecture)

    def export(self, model: VLM, out: Path, written: SampleFormat | None = None) -> float:
        """Write the model under published names, read it back, and compare logits.

        Args:
            model: ConvPatches, Downsample, Splice and DivideAndConquer with `split: mlp`.
            out: a folder that is new or empty.
            written: template and transform of its data; the configuration says how many tiles `Tiles` makes.

        Returns and raises as `Family.export`.
        """
        encoder, projector, embedder, decoder = model.encoder, model.projector, model.embedder, model.decoder
        if (
            not isinstance(encoder, ConvPatches)
            or type(projector) is not Downsample
            or projector.token_order != "row"
            or not isinstance(embedder, Splice)
            or embedder.task_tokens
            or not isinstance(decoder, DivideAndConquer)
            or decoder.split != "mlp"
        ):
            parts = [type(part).__name__ for part in (encoder, projector, embedder, decoder)]
            raise ValueError(
                "mono_internvl is ConvPatches, Downsample by rows, Splice without task tokens and DivideAndConquer "
                f"with split mlp; this model is {parts}"
            )
        config: dict[str, Any] = PUBLISHED | {
            "model_type": "internvl_chat",
            "architectures": ["InternVLChatModel"],
            "force_image_size": encoder.pixels.size,
            "vision_config": {
                "model_type": "intern_vit_patch",
                "architectures": ["InternVisionPatchModel"],
                "hidden_size": encoder.width,
                "image_size": encoder.trained_side * encoder.patch,
                "patch_size": encoder.patch,
                "num_channels": 3,
            },
            "llm_config": internlm2.from_llama_config(decoder.config.to_dict())
            | {"model_type": "internlm2", "architectures": ["InternLM2VEForCausalLM"], "bias": False},
        }
        config |= tile_settings(written)
        return export_folder(model, out, config, NAMES, {}, self.load)
