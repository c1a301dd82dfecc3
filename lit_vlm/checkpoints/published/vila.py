"""VILA's published weights: VILA-1.0 (one flat folder) and VILA-1.5 (`llm/`, `vision_tower/`, `mm_projector/`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import CLIPImageProcessor, SiglipImageProcessor

from lit_vlm.checkpoints.published.family import Family
from lit_vlm.checkpoints.published.layout import (
    Layout,
    Names,
    SlotStates,
    check_written,
    checked_sizes,
    load_layout,
    new_folder,
    published_state,
    read_config,
    write_config,
)
from lit_vlm.core.part import meta_parameters
from lit_vlm.core.pretrained import resolve
from lit_vlm.core.safetensors import read_folder
from lit_vlm.data import PadSquare, Resize
from lit_vlm.data.sample.format import SampleFormat
from lit_vlm.decoders import HFDecoder
from lit_vlm.embedders import Splice
from lit_vlm.encoders import S2, Encoder, HFEncoder
from lit_vlm.model.vlm import VLM
from lit_vlm.projectors import MLP, Downsample, Downsample3x3, Linear, Projector

PARTS = {"llm": "llm_cfg", "vision_tower": "vision_tower_cfg", "mm_projector": "mm_projector_cfg"}
"""Folder of VILA-1.5 → the key of that folder's configuration in the config.json of the whole."""
CLIP_L = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
}  # fmt: skip
DROPPED = {
    "rotary_emb.inv_freq": "a buffer that older versions saved",
    "position_ids": "a buffer that older versions saved",
    "post_layernorm": "the final norm of the vision model, which the feature layer does not reach",
    "vision_model.head.": "SigLIP's pooling head, which nothing reads",
    "vision_tower.head.": "the same, as transformers 5 saves it",
}
FOLDS = {"mlp_downsample": "col", "mlp_downsample_2x2_fix": "row"}
"""Projector type → order of its output tokens: column by column in VILA-1.5, row by row from NVILA on."""
VISION_CLASSES = {"clip_vision_model": "CLIPVisionModel", "siglip_vision_model": "SiglipVisionModel"}
_INDEX = re.compile(r"^layers\.(\d+)\.")


def _shift(by: int, name: str) -> str:
    """Add `by` to the layer number of a name; the published list counts the fold too, which has no weights."""
    return _INDEX.sub(lambda match: f"layers.{int(match[1]) + by}.", name)


def _kind(config: Mapping[str, Any]) -> str:
    inner = config.get("mm_projector_cfg") or config
    kind = str(inner.get("mm_projector_type") or "")
    if kind not in ("linear", "mlp_downsample_3x3_fix", *FOLDS) and not re.fullmatch(r"mlp\d+x_gelu", kind):
        raise ValueError(f"mm_projector_type is {kind!r}; known: linear, mlp2x_gelu, mlp_downsample and its fixes")
    return kind


def _select(config: Mapping[str, Any]) -> int:
    return int(config.get("mm_vision_select_layer", -2))


def _vision(config: Mapping[str, Any]) -> dict[str, Any]:
    """Configuration of the vision model; files of VILA-1.0 hold none, and their vision model is CLIP-L/14-336."""
    return dict(config.get("vision_tower_cfg") or config.get("vision_config") or CLIP_L)


def _names(config: Mapping[str, Any]) -> Names:
    kind = _kind(config)
    own = "linear." if kind == "linear" else "layers."
    backbone = f"{'inner.' if config.get('s2') else ''}backbone."
    if "llm_cfg" in config:
        slots = {
            "llm.lm_head.": ("decoder", "lm.lm_head."),
            "llm.model.": ("decoder", "lm.model."),
            # In published files, in the published model's state dict, and both as transformers 5 writes them.
            "vision_tower.vision_model.": ("encoder", backbone),
            "vision_tower.vision_tower.vision_model.": ("encoder", backbone),
            "vision_tower.vision_tower.": ("encoder", backbone),
            "vision_tower.": ("encoder", backbone),
            "mm_projector.layers.": ("projector", own),
        }
    else:
        slots = {
            "model.vision_tower.vision_tower.vision_model.": ("encoder", backbone),
            "model.vision_tower.vision_tower.": ("encoder", backbone),
            "model.mm_projector.": ("projector", own),
            "lm_head.": ("decoder", "lm.lm_head."),
            "model.": ("decoder", "lm.model."),
        }
    shifted = "downsample" in kind
    return Names(
        family="vila",
        dropped=DROPPED,
        slots=slots,
        rename=partial(_shift, -1 if shifted else 0),
        restore=partial(_restore, kind),
        split=_without_unused_blocks,
    )


def _restore(kind: str, rest: str) -> str:
    """The published name of a projector's weight behind `layers.`; names of other slots stay as they are."""
    match = re.match(r"^(\d+)\.(weight|bias)$", rest)
    return f"{int(match[1]) + 1}.{match[2]}" if match and "downsample" in kind else rest


def _without_unused_blocks(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Mapping[str, Tensor]:
    layer, depth = _select(config), int(_vision(config)["num_hidden_layers"])
    kept = layer if layer >= 0 else depth + 1 + layer

    def used(key: str) -> bool:
        match = re.search(r"vision_tower.*\.encoder\.layers\.(\d+)\.", key)
        return match is None or int(match[1]) < kept

    return {key: value for key, value in state.items() if used(key)}


def _read(source: str, given: Mapping[str, Any] | None = None) -> Layout:
    """A published folder or hub repository by slot; `given` replaces its configuration."""
    folder = Path(resolve(source, folders=("", *PARTS)))
    config = dict(given or read_config(str(folder)))
    if not (folder / "llm").is_dir():
        return _layout(read_folder(str(folder)), config, str(folder))
    state: dict[str, Tensor] = {}
    for part, key in PARTS.items():
        if not (folder / part).is_dir():
            raise ValueError(f"{folder} has a folder llm/ and no {part}/: VILA-1.5 is three folders and config.json")
        if not given or not isinstance(given.get(key), Mapping):
            config[key] = read_config(str(folder / part))
        state |= {f"{part}.{name}": value for name, value in read_folder(str(folder / part)).items()}
    return _layout(state, config, str(folder / "llm"))


def _layout(state: Mapping[str, Tensor], config: Mapping[str, Any], tokenizer: str | None) -> Layout:
    if paths := [key for key in PARTS.values() if isinstance(config.get(key), str)]:
        raise ValueError(
            f"{', '.join(paths)}: expected the configuration of that part itself, found the name of a folder"
        )
    names = _names(config)
    return Layout(config, names.slots_of(state, config), tokenizer, names.seen_in(state))


def _architecture(layout: Layout) -> VLM:
    config = layout.config
    llm = checked_sizes(config["llm_cfg"], "llm_cfg") if "llm_cfg" in config else layout.decoder_config("llama")
    with meta_parameters():
        decoder = HFDecoder(config={"model_type": "llama"} | llm, tokenizer=layout.tokenizer)
        encoder = _encoder(config)
        projector = _projector(_kind(config), encoder.width, decoder.width)
        return VLM(encoder, projector, Splice(decoder.width, decoder.vocab_size), decoder)


def _encoder(config: Mapping[str, Any]) -> Encoder:
    vision = _vision(config)
    if vision.get("model_type") in ("clip_vision_model",) and (config.get("mm_vision_select_feature") == "cls_patch"):
        raise ValueError("mm_vision_select_feature cls_patch of a vision model with CLS token is not built")
    plain = partial(HFEncoder, config=vision, layer=_select(config))
    if not config.get("s2"):
        return plain()
    return S2(plain, [int(scale) for scale in str(config["s2_scales"]).split(",")])


def _projector(kind: str, in_width: int, out_width: int) -> Projector:
    if kind == "linear":
        return Linear(in_width, out_width)
    if kind == "mlp_downsample_3x3_fix":
        return Downsample3x3(in_width, out_width)
    if kind in FOLDS:
        return Downsample(in_width, out_width, "col" if FOLDS[kind] == "col" else "row")
    return MLP(in_width, out_width, depth=int(kind.removeprefix("mlp").split("x")[0]))


def _type_of(projector: Projector) -> str | None:
    if isinstance(projector, Linear):
        return "linear"
    if isinstance(projector, MLP):
        return f"mlp{(len(projector.layers) + 1) // 2}x_gelu"
    if isinstance(projector, Downsample3x3):
        return "mlp_downsample_3x3_fix"
    if isinstance(projector, Downsample):
        return next(kind for kind, order in FOLDS.items() if order == projector.token_order)
    return None


def _processor(encoder: HFEncoder) -> CLIPImageProcessor | SiglipImageProcessor:
    """The image processor, which published folders hold beside the vision model."""
    side = encoder.pixels.size
    shared = {"image_mean": encoder.pixel_mean.flatten().tolist(), "image_std": encoder.pixel_std.flatten().tolist()}
    if encoder.config.model_type == "clip_vision_model":
        square = {"height": side, "width": side}
        return CLIPImageProcessor(size={"shortest_edge": side}, crop_size=square, **shared)
    return SiglipImageProcessor(size={"height": side, "width": side}, **shared)


class Vila(Family):
    """VILA, of the first version and of 1.5: three folders in one."""

    name = "vila"
    model_types = ("llava_llama",)

    def read(self, source: str) -> SlotStates:
        """Weights of a folder or hub repository by slot.

        Raises:
            ValueError: for a key that belongs to no slot, or a missing folder.
        """
        return _read(source).slots

    def load(self, source: str | Path | Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> VLM:
        """Build the model that the configuration describes, with all weights; raises as `load_published` does.

        Keys of a state dict of VILA-1.5 begin with the names of its folders: `llm.`, `vision_tower.`, `mm_projector.`.
        Its configuration holds those of the folders as `llm_cfg`, `vision_tower_cfg` and `mm_projector_cfg`.
        """
        if isinstance(source, Mapping) and config is None:
            raise ValueError("a state dict says nothing of attention heads and layers: pass config as well")
        layout = _layout(source, config or {}, None) if isinstance(source, Mapping) else _read(str(source), config)
        return load_layout(layout, _architecture, layout.config.get("llm_cfg") or layout.config)

    def export(self, model: VLM, out: Path, written: SampleFormat | None = None) -> float:
        """Write the model in the three folders of VILA-1.5, read it back, and compare logits.

        The vision model is written without the blocks after the feature layer; `mm_vision_select_layer` becomes −1.

        Args:
            model: HFEncoder, or S2 over one; Linear, MLP or a Downsample of VILA; Splice and HFDecoder.
            out: a folder that is new or empty.
            written: template and transform of its data.

        Returns and raises as `Family.export`.
        """
        encoder, decoder, kind = model.encoder, model.decoder, _type_of(model.projector)
        inner = encoder.inner if isinstance(encoder, S2) else encoder
        splice = isinstance(model.embedder, Splice) and not model.embedder.task_tokens
        if (
            not (isinstance(inner, HFEncoder) and inner.patch_grid.prefix == 0 and inner.is_plain)
            or kind is None
            or not splice
            or (type(decoder) is not HFDecoder)
        ):
            parts = [type(part).__name__ for part in (encoder, model.projector, model.embedder, decoder)]
            raise ValueError(
                "vila is HFEncoder or S2, read at one layer and without CLS or register tokens, Linear, MLP or "
                f"Downsample, Splice without task tokens and HFDecoder; this model is {', '.join(parts)}"
            )
        new_folder(out)
        # VILA's loader chooses the class by this name.
        vision = inner.config.to_dict() | {
            "architectures": [VISION_CLASSES.get(inner.config.model_type, type(inner.backbone).__name__)]
        }
        config: dict[str, Any] = {
            "model_type": "llava_llama",
            "architectures": ["LlavaLlamaModel"],
            "resume_path": ".",
            "model_dtype": "torch.float32",
            "llm_cfg": decoder.config.to_dict()
            | {"tie_word_embeddings": False, "architectures": [type(decoder.lm).__name__]},
            "vision_tower_cfg": vision,
            "mm_projector_cfg": {"model_type": "v2l_projector", "mm_projector_type": kind},
            "hidden_size": decoder.width,
            "mm_hidden_size": encoder.width,
            "mm_vision_select_layer": -1,
            "mm_vision_select_feature": "patch" if inner.skip else "cls_patch",
            "mm_use_im_start_end": False,
            "mm_use_im_patch_token": False,
            "s2": isinstance(encoder, S2),
        }
        if isinstance(encoder, S2):
            config |= {"s2_scales": ",".join(map(str, encoder.scales)), "s2_max_split_size": encoder.side}
        transform = None if written is None else written.transform
        if isinstance(transform, PadSquare | Resize):
            config["image_aspect_ratio"] = "pad" if isinstance(transform, PadSquare) else "resize"
        write_config(out, config)
        model.float().eval()
        state = published_state(model, _names(config), {})
        for part, key in PARTS.items():
            (out / part).mkdir()
            own = {name.removeprefix(f"{part}."): value for name, value in state.items() if name.startswith(f"{part}.")}
            save_torch_state_dict(own, out / part)
            write_config(out / part, config[key])
        decoder.tokenizer.save_pretrained(out / "llm")
        _processor(inner).save_pretrained(out / "vision_tower")
        return check_written(model, out, partial(self.load, config=None))
