"""HoVLE's published weights: a holistic embedding and an InternLM2, both with query, key and value in one matrix."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lit_vlm.checkpoints.published.family import Family
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
from lit_vlm.data import Tiles
from lit_vlm.data.sample.format import SampleFormat
from lit_vlm.decoders import HFDecoder, internlm2
from lit_vlm.embedders import Holistic
from lit_vlm.encoders import ConvPatches
from lit_vlm.model.vlm import VLM
from lit_vlm.projectors import Identity, PatchMerge

EMBEDDING, LANGUAGE = "embedding_model.", "language_model."


def split_qkv(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Take the published query-key-value matrices apart, in the holistic embedding and in the decoder."""
    own, language = _stacks(state)
    return internlm2.split_qkv(own, config["embedding_config"]) | internlm2.split_qkv(language, config["llm_config"])


def fuse_qkv(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Join query, key and value again: the inverse of `split_qkv`."""
    own, language = _stacks(state)
    return internlm2.fuse_qkv(own, config["embedding_config"]) | internlm2.fuse_qkv(language, config["llm_config"])


def _stacks(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    own = {key: value for key, value in state.items() if key.startswith(EMBEDDING)}
    return own, {key: value for key, value in state.items() if key not in own}


def tile_settings(written: SampleFormat | None) -> dict[str, Any]:
    """What a configuration of InternVL's code says of the tiles that a model's data were cut into."""
    transform = None if written is None else written.transform
    if not isinstance(transform, Tiles):
        return {"dynamic_image_size": False}
    return {
        "dynamic_image_size": True,
        "min_dynamic_patch": transform.min_tiles,
        "max_dynamic_patch": transform.max_tiles,
        "use_thumbnail": transform.thumbnail,
    }


def _fused(name: str) -> str:
    """The published matrix that a query, key or value projection is a part of."""
    return re.sub(r"\.attention\.w[qkv]\.weight$", f".{internlm2.FUSED}", name)


@dataclass(frozen=True)
class Hovle(Family):
    """HoVLE, or HoVLE-HD, which merges patches behind the holistic embedding's layers.

    Attributes:
        name: the family's name, `hovle` or `hovle_hd`.
        hd: whether patches are merged behind the embedding's layers.
    """

    name: str
    hd: bool
    model_types = ("internvl_chat",)

    @property
    def names(self) -> Names:
        """The published keys and the slots that they belong to."""
        merge = ("embedder", "merger.layers.") if self.hd else ("projector", "layers.")
        return Names(
            family=self.name,
            dropped={},
            slots={
                f"{EMBEDDING}vision_embeddings.": ("encoder", ""),
                f"{EMBEDDING}pixel_shuffle_proj.": merge,
                f"{EMBEDDING}llm_text_embeddings.": ("embedder", "stack.embed_tokens."),
                f"{EMBEDDING}encoder.": ("embedder", "stack.layers."),
                f"{LANGUAGE}model.tok_embeddings.": ("decoder", "lm.model.embed_tokens."),
                f"{LANGUAGE}model.layers.": ("decoder", "lm.model.layers."),
                f"{LANGUAGE}model.norm.": ("decoder", "lm.model.norm."),
                f"{LANGUAGE}output.": ("decoder", "lm.lm_head."),
            },
            rename=internlm2.to_llama,
            restore=internlm2.from_llama,
            split=self._split,
            join=fuse_qkv,
            whole=_fused,
        )

    def read(self, source: str) -> SlotStates:
        """Weights of a folder or hub repository by slot.

        Raises:
            ValueError: for a key that belongs to no slot.
        """
        folder = resolve(source)
        config = read_config(folder)
        return self.names.slots_of(read_folder(folder), config)

    def load(self, source: str | Path | Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> VLM:
        """Build the model that the configuration describes, with all weights; raises as `load_published` does."""
        return load_folder(source, config, self.names, self._architecture)

    def _split(self, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
        # The configuration is checked first, as it decides which keys belong to the model.
        self._check(config)
        return split_qkv(state, config)

    def _check(self, config: Mapping[str, Any]) -> None:
        for part in ("embedding_config", "llm_config"):
            if not isinstance(config[part], Mapping):
                raise ValueError(f"config.json: {part} is {config[part]!r}, expected the settings of that part")
        own, expected = config["embedding_config"], "post" if self.hd else "pre"
        if (found := own.get("pixel_shuffle_loc", expected)) != expected:
            other = BASE if self.hd else HD
            raise ValueError(f"embedding_config.pixel_shuffle_loc is '{found}': load it as '{other.name}'")
        for key, accepted in (("special_token_maps", ({}, None)), ("normalize_encoder_output", (False, None))):
            if (found := own.get(key, config.get(key))) not in accepted:
                raise ValueError(f"config.json: {key} is {found!r}, which {self.name} does not have here")

    def _architecture(self, layout: Layout) -> VLM:
        own = layout.config["embedding_config"]
        language = checked_sizes(layout.config["llm_config"], "llm_config")
        patch = int(own.get("patch_size") or layout.weight("encoder", "patch_embedding.weight", 4).shape[-1])
        words = own.get("llm_vocab_size") or layout.weight("embedder", "stack.embed_tokens.weight", 2).shape[0]
        scaling = own.get("rope_scaling")
        with meta_parameters():
            decoder = HFDecoder(config=internlm2.as_llama(language), tokenizer=layout.tokenizer)
            encoder = ConvPatches(
                width=own["hidden_size"],
                image_size=layout.config.get("force_image_size") or own["image_size"],
                patch=patch,
                trained_size=own["image_size"],
            )
            projector = (Identity if self.hd else PatchMerge)(encoder.width, decoder.width)
            embedder = Holistic(
                decoder.width,
                words,
                num_layers=own["num_hidden_layers"],
                num_heads=own["num_attention_heads"],
                num_kv_heads=own["num_key_value_heads"],
                ffn_width=own["intermediate_size"],
                rope_theta=own.get("rope_theta", 10000.0),
                rope_scaling=scaling and {"rope_type": scaling["type"], "factor": scaling["factor"]},
                max_positions=own.get("max_position_embeddings", 4096),
                norm_eps=own.get("rms_norm_eps", 1e-5),
                merge=2 if self.hd else 1,
            )
            return VLM(encoder, projector, embedder, decoder)

    def export(self, model: VLM, out: Path, written: SampleFormat | None = None) -> float:
        """Write the model under published names, read it back, and compare logits.

        Args:
            model: ConvPatches, PatchMerge (or Identity, for HD), Holistic and HFDecoder.
            out: a folder that is new or empty.
            written: template and transform of its data; the configuration says how many tiles `Tiles` makes.

        Returns and raises as `Family.export`.
        """
        encoder, embedder, decoder = model.encoder, model.embedder, model.decoder
        if (
            not isinstance(encoder, ConvPatches)
            or type(model.projector) is not (Identity if self.hd else PatchMerge)
            or not isinstance(embedder, Holistic)
            or (embedder.merge > 1) != self.hd
            or embedder.image_attention != "causal"
            or type(decoder) is not HFDecoder
        ):
            parts = [type(part).__name__ for part in (encoder, model.projector, embedder, decoder)]
            between = "Identity, Holistic with merge 2" if self.hd else "PatchMerge, Holistic without merge"
            raise ValueError(f"{self.name} is ConvPatches, {between} and HFDecoder; this model is {parts}")
        own = embedder.config
        config: dict[str, Any] = {
            "model_type": "internvl_chat",
            "architectures": ["InternVLChatModel"],
            "template": "internlm2-chat",
            "downsample_ratio": 0.5,
            "force_image_size": encoder.pixels.size,
            "embedding_config": internlm2.from_llama_config(own.to_dict())
            | {
                "model_type": "holistic_embedding",
                "image_size": encoder.trained_side * encoder.patch,
                "patch_size": encoder.patch,
                "num_channels": 3,
                "downsample_ratio": 0.5,
                "pixel_shuffle_loc": "post" if self.hd else "pre",
                "use_pixel_shuffle_proj": True,
                "llm_vocab_size": own.vocab_size,
                "llm_hidden_size": own.hidden_size,
                "special_token_maps": {},
                "use_ls": False,
            },
            "llm_config": internlm2.from_llama_config(decoder.config.to_dict())
            | {"model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"], "bias": False},
        }
        config |= tile_settings(written)
        return export_folder(model, out, config, self.names, {}, self.load)


BASE, HD = Hovle("hovle", hd=False), Hovle("hovle_hd", hd=True)
