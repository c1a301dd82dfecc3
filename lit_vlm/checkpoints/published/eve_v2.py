"""EVEv2's published weights: patch embedding, and a Qwen2 with a second set of weights for image tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from statistics import mode
from typing import Any

from torch import Tensor

from lit_vlm.checkpoints.published.family import Family
from lit_vlm.checkpoints.published.layout import Layout, Names, SlotStates, export_folder, load_folder
from lit_vlm.core.part import meta_parameters
from lit_vlm.core.pretrained import resolve
from lit_vlm.core.safetensors import read_folder
from lit_vlm.data.sample.format import SampleFormat
from lit_vlm.decoders import DivideAndConquer
from lit_vlm.embedders import Splice
from lit_vlm.encoders import EveV2PatchEmbedding
from lit_vlm.model.vlm import VLM
from lit_vlm.projectors import Identity

SPLIT = r"(q_proj|k_proj|v_proj|o_proj|mlp|input_layernorm|post_attention_layernorm)\."


def _from_published(name: str) -> str:
    """Our name of a published weight of the decoder; `moe_` marks the weights for image tokens."""
    name, moved = re.subn(rf"\.moe_{SPLIT}", r".\1.vision.", name)
    return name if moved else re.sub(rf"(layers\.\d+\.(?:self_attn\.)?){SPLIT}", r"\1\2.text.", name)


def _to_published(name: str) -> str:
    name = re.sub(rf"\.{SPLIT}vision\.", r".moe_\1.", name)
    return re.sub(rf"\.{SPLIT}text\.", r".\1.", name)


NAMES = Names(
    family="eve_v2",
    dropped={"rotary_emb.inv_freq": "a buffer that older versions saved"},
    slots={
        "model.vision_tower.": ("encoder", ""),
        "lm_head.": ("decoder", "lm.lm_head."),
        "model.": ("decoder", "lm.model."),
    },
    rename=_from_published,
    restore=_to_published,
)


def _architecture(layout: Layout) -> VLM:
    first = layout.weight("encoder", "patch_embedding.0.weight", 4)
    bias = layout.weight("encoder", "patch_embedding.0.bias", 1)
    second = layout.weight("encoder", "patch_embedding.2.weight", 4)
    # config.json has no number of channels. Take the one that most weights have: the error then names the odd weight.
    hidden = mode([first.shape[0], bias.shape[0], second.shape[1]])
    width = layout.setting("hidden_size", second.shape[0])
    named = re.search(r"patch(\d+)", str(layout.config.get("mm_vision_tower") or ""))
    patch = int(named[1]) if named else mode(first.shape[2:])
    with meta_parameters():
        encoder = EveV2PatchEmbedding(width=width, hidden=hidden, patch=patch)
        decoder = DivideAndConquer(config=layout.decoder_config("qwen2"), tokenizer=layout.tokenizer)
        projector = Identity(encoder.width, decoder.width)
        return VLM(encoder, projector, Splice(decoder.width, decoder.vocab_size), decoder)


class EveV2(Family):
    """EVEv2, whose decoder has a second set of weights for image tokens."""

    name = "eve_v2"
    model_types = ("eve", "eve-qwen2")

    def read(self, source: str) -> SlotStates:
        """Weights of a folder or hub repository by slot.

        Raises:
            ValueError: for a key that belongs to no slot.
        """
        return NAMES.slots_of(read_folder(resolve(source)), {})

    def load(self, source: str | Path | Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> VLM:
        """Build the model that the configuration describes, with all weights; raises as `load_published` does."""
        return load_folder(source, config, NAMES, _architecture)

    def export(self, model: VLM, out: Path, written: SampleFormat | None = None) -> float:
        """Write the model under published names, read it back, and compare logits.

        Args:
            model: EveV2PatchEmbedding, Identity, Splice and DivideAndConquer.
            out: a folder that is new or empty.
            written: not used, as EVEv2's configuration has no setting for it.

        Returns and raises as `Family.export`.
        """
        encoder, decoder = model.encoder, model.decoder
        if (
            not isinstance(encoder, EveV2PatchEmbedding)
            or not isinstance(model.projector, Identity)
            or not isinstance(model.embedder, Splice)
            or model.embedder.task_tokens
            or not isinstance(decoder, DivideAndConquer)
        ):
            parts = [type(part).__name__ for part in (encoder, model.projector, model.embedder, decoder)]
            raise ValueError(
                "eve_v2 is EveV2PatchEmbedding, Identity, Splice without task tokens and DivideAndConquer; this model "
                f"is {parts}"
            )
        config = decoder.config.to_dict() | {
            "model_type": "eve",
            "architectures": ["EVEQwen2ForCausalLM"],
            "mm_hidden_size": encoder.width,
            "add_moe": True,
            "moe_part": "layernorm-self_attn-mlp",
        }
        return export_folder(model, out, config, NAMES, {}, self.load)
