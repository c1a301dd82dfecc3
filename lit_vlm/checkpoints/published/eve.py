"""EVE's published weights (`EVELlamaForCausalLM`): patch embedding layer, projector, decoder, patch aligning layer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lit_vlm.checkpoints.published.family import Family
from lit_vlm.checkpoints.published.layout import Layout, Names, SlotStates, export_folder, load_folder
from lit_vlm.core.part import meta_parameters
from lit_vlm.core.pretrained import resolve
from lit_vlm.core.safetensors import read_folder
from lit_vlm.data import AspectGrid
from lit_vlm.data.sample.format import SampleFormat
from lit_vlm.decoders import HFDecoder
from lit_vlm.embedders import Splice
from lit_vlm.encoders import EvePatchEmbedding
from lit_vlm.heads import PatchAlignment
from lit_vlm.model.vlm import VLM
from lit_vlm.projectors import MLP

HEAD = "heads.align"
NAMES = Names(
    family="eve",
    dropped={
        "rotary_emb.inv_freq": "a buffer that older versions saved",
        "model.vision_tower_compressor.clip_layer.": "the teacher again",
        "model.vision_clip.": "the teacher, a frozen copy of the public CLIP, which is read from its own files",
    },
    # Longer beginnings first: the decoder's, `model.`, is the beginning of others too.
    slots={
        "model.vision_tower_compressor.": (HEAD, ""),
        "model.vision_tower.": ("encoder", ""),
        "model.mm_projector.": ("projector", "layers."),
        "lm_head.": ("decoder", "lm.lm_head."),
        "model.": ("decoder", "lm.model."),
    },
)


def _architecture(layout: Layout) -> VLM:
    weight = layout.weight("encoder", "patch_embedding.weight", 4)
    named = re.search(r"patch(\d+)", str(layout.config.get("mm_vision_tower") or ""))
    with meta_parameters():
        encoder = EvePatchEmbedding(
            width=layout.setting("mm_hidden_size", weight.shape[0]),
            patch=int(named[1]) if named else weight.shape[-1],
            # Published EVE has both, but its config.json names neither.
            local_attention=layout.config.get("local_attention", True),
            global_attention=layout.config.get("global_attention", True),
        )
        decoder = HFDecoder(config=layout.decoder_config("llama"), tokenizer=layout.tokenizer)
        projector = MLP(encoder.width, decoder.width, depth=2)
        return VLM(encoder, projector, Splice(decoder.width, decoder.vocab_size), decoder)


class Eve(Family):
    """EVE: a vision-language model without a vision encoder, as its own code saves it."""

    name = "eve"
    model_types = ("eve",)

    def read(self, source: str) -> SlotStates:
        """Weights of a folder or hub repository by slot; PAL is `heads.align`.

        Raises:
            ValueError: for a key that belongs to no slot.
        """
        return NAMES.slots_of(read_folder(resolve(source)), {})

    def load(self, source: str | Path | Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> VLM:
        """Build the model that the configuration describes, with all weights; raises as `load_published` does.

        PAL is left out, as only training needs it: name the weights in `model.stage.start_from` for that.
        """
        return load_folder(source, config, NAMES, _architecture)

    def export(self, model: VLM, out: Path, written: SampleFormat | None = None) -> float:
        """Write the model under published names, read it back, and compare logits.

        The teacher is not written: EVE's own code, too, reads the teacher from files of its own.

        Args:
            model: EvePatchEmbedding, MLP of depth 2, Splice and HFDecoder.
            out: a folder that is new or empty.
            written: template and transform of its data; EVE's preprocessor is named by the longer side of `AspectGrid`.

        Returns and raises as `Family.export`.
        """
        encoder, projector, decoder = model.encoder, model.projector, model.decoder
        if (
            not isinstance(encoder, EvePatchEmbedding)
            or not isinstance(projector, MLP)
            or len(projector.layers) != 3
            or not isinstance(model.embedder, Splice)
            or model.embedder.task_tokens
            or type(decoder) is not HFDecoder
        ):
            parts = [type(part).__name__ for part in (encoder, projector, model.embedder, decoder)]
            raise ValueError(
                "eve is EvePatchEmbedding, MLP of depth 2, Splice without task tokens and HFDecoder; this model is "
                f"{parts}"
            )
        head = next((name for name, part in model.heads.items() if isinstance(part, PatchAlignment)), None)
        config = decoder.config.to_dict() | {
            "model_type": "eve",
            "architectures": ["EVELlamaForCausalLM"],
            "mm_hidden_size": encoder.width,
            "mm_projector_type": "mlp2x_gelu",
            "mm_vision_select_layer": -2,
            "mm_vision_select_feature": "patch",
            "use_mm_proj": True,
            "requires_cliploss": head is not None,
        }
        for name in ("local_attention", "global_attention"):
            if getattr(encoder, name) is None:
                config[name] = False  # only this kit reads it: it expects these weights unless the config says false
        if written is not None and isinstance(written.transform, AspectGrid):
            config["mm_vision_tower"] = f"openai/eve-patch{encoder.patch}-anypixel-{written.transform.longest}"
        return export_folder(model, out, config, NAMES, {f"heads.{head}": HEAD}, self.load)
