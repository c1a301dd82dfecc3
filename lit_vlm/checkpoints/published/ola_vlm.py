"""OLA-VLM's published weights: `ola_llama` and `ola_phi3` after pre-training, `llava_llama` and `llava_phi3` later."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lit_vlm.checkpoints.published.family import Family
from lit_vlm.checkpoints.published.layout import Layout, Names, SlotStates, export_folder, load_folder, read_config
from lit_vlm.core.part import meta_parameters
from lit_vlm.core.pretrained import resolve
from lit_vlm.core.safetensors import read_folder
from lit_vlm.data import PadSquare
from lit_vlm.data.sample.format import SampleFormat
from lit_vlm.decoders import HFDecoder
from lit_vlm.embedders import Splice
from lit_vlm.encoders import Encoder, HFEncoder, TimmEncoder
from lit_vlm.heads import EmbeddingDistillation
from lit_vlm.heads.perceiver import Perceiver
from lit_vlm.model.vlm import VLM
from lit_vlm.projectors import MLP

TASKS = ("gen", "depth", "seg")
PREDICTOR = (
    (r"^layers\.(\d+)\.0\.norm1\.", r"layers.\1.norm_tokens."),
    (r"^layers\.(\d+)\.0\.norm2\.", r"layers.\1.norm_queries."),
    (r"^layers\.(\d+)\.0\.(to_\w+)\.", r"layers.\1.\2."),
    (r"^layers\.(\d+)\.1\.", r"layers.\1.ffn."),
)
WAY_BACK = (
    (r"^layers\.(\d+)\.norm_tokens\.", r"layers.\1.0.norm1."),
    (r"^layers\.(\d+)\.norm_queries\.", r"layers.\1.0.norm2."),
    (r"^layers\.(\d+)\.(to_\w+)\.", r"layers.\1.0.\2."),
    (r"^layers\.(\d+)\.ffn\.", r"layers.\1.1."),
)
DROPPED = {
    "rotary_emb.inv_freq": "a buffer that older versions saved",
    "da_v2_head.": "the teacher's own depth head, which only draws pictures",
    "embeddings.position_ids": "a buffer that older versions saved",
    "vision_tower.vision_tower.head.norm.": "the norm of ConvNeXt's classifier, which comes after the features",
}
SCALE = "_logit_scale"
EXPANDED = "expand_emb"
CLIP_TOWER = "model.vision_tower.vision_tower.vision_model."
CLIP_L = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 336, "patch_size": 14,
}  # fmt: skip


def own_predictor_key(key: str) -> str:
    """Our name of a predictor's weight, from its published name."""
    return _rename(key, PREDICTOR)


def _rename(key: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        key, found = re.subn(pattern, replacement, key)
        if found:
            break
    return key


def _to_own(key: str) -> str:
    if key.startswith("predictors."):
        _, index, rest = key.split(".", 2)
        return f"predictors.{index}.{own_predictor_key(rest.removeprefix('projector.'))}"
    return re.sub(r"^backbone\.(stem|stages)\.(\d+)\.", r"backbone.\1_\2.", key)


def _to_published(key: str) -> str:
    if match := re.match(r"^(\d+)\.((?:proj_|norm_|layers|latents).*)$", key):  # behind `predictors.`
        return f"{match[1]}.projector.{_rename(match[2], WAY_BACK)}"
    return re.sub(r"^(stem|stages)_(\d+)\.", r"\1.\2.", key)


def _names(convolutional: bool) -> Names:
    """Names of a model; the encoder's depend on whether it is a ConvNeXt or a CLIP, whose keys have one level more."""
    # Longer beginnings first: the decoder's, `model.`, is the beginning of others too.
    slots = {
        CLIP_TOWER: ("encoder", "backbone."),
        "model.vision_tower.vision_tower.": ("encoder", "backbone."),
        "model.mm_projector.": ("projector", "layers."),
        **{f"model.special_{task}_tokens": ("embedder", f"tasks.{task}") for task in TASKS},
        **{f"image_{task}_heads.": (f"heads.{task}", "predictors.") for task in TASKS},
        **{f"{task}{SCALE}": (f"heads.{task}", "logit_scale") for task in TASKS},
        "lm_head.": ("decoder", "lm.lm_head."),
        "model.": ("decoder", "lm.model."),
    }
    if convolutional:
        del slots[CLIP_TOWER]
    return Names("ola_vlm", DROPPED, slots, _to_own, _to_published, _split, _join)


def _split(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """The weights with scales as vectors of one number, and without CLIP's blocks after the layer that is read."""
    if wrong := [key for key, value in state.items() if key.endswith(SCALE) and value.numel() != 1]:
        raise ValueError(f"'{wrong[0]}' is {tuple(state[wrong[0]].shape)}, expected a single number")
    state = {key: value.view(1) if key.endswith(SCALE) else value for key, value in state.items()}
    norm, blocks = f"{CLIP_TOWER}post_layernorm.", f"{CLIP_TOWER}encoder.layers."
    numbers = {int(match[1]) for key in state if (match := re.match(rf"{re.escape(blocks)}(\d+)\.", key))}
    if not numbers:
        return state
    kept = _kept(config, max(numbers) + 1, whole=any(key.startswith(norm) for key in state))
    if lost := sorted(set(range(kept)) - numbers):
        raise ValueError(
            f"there is no '{blocks}{lost[0]}.': config.json asks for {kept} blocks up to the one that is read"
        )
    unused = (norm, *(f"{blocks}{number}." for number in numbers if number >= kept))
    return {key: value for key, value in state.items() if not key.startswith(unused)}


def _kept(config: Mapping[str, Any], found: int, whole: bool) -> int:
    """How many blocks CLIP has up to layer −2, which is read.

    Args:
        config: the published one. Its `vision_config`, if any, describes the blocks in the files, as `export` writes
            it, or a whole CLIP; without one the files hold all of CLIP-L.
        found: number of blocks in the files.
        whole: whether the files also hold the norm after the blocks, which a whole CLIP has.
    """
    said = (config.get("vision_config") or {}).get("num_hidden_layers")
    if said is None:
        return int(CLIP_L["num_hidden_layers"]) - 1
    return int(said) - 1 if whole and found == said else int(said)


def _join(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """The weights with scales as single numbers, as published files have them."""
    return {key: value.view(()) if key.endswith(SCALE) else value for key, value in state.items()}


NAMES = _names(convolutional=False)


def _architecture(layout: Layout) -> VLM:
    model_type = str(layout.config.get("model_type", ""))
    llama = "phi3" not in model_type
    counts, parameters = _task_tokens(layout)
    with meta_parameters():
        decoder = HFDecoder(config=layout.decoder_config("llama" if llama else "phi3"), tokenizer=layout.tokenizer)
        encoder = _encoder(layout)
        embedder = Splice(
            decoder.width,
            decoder.vocab_size,
            task_tokens=counts or None,
            pooled_from=parameters or None,
        )
        return VLM(encoder, MLP(encoder.width, decoder.width, depth=2), embedder, decoder)


def _encoder(layout: Layout) -> Encoder:
    """The encoder of the published weights: ConvNeXt, or CLIP of `vision_config`, or CLIP-L/14 without one."""
    name = str(layout.config.get("mm_vision_tower") or "")
    if any(key.startswith("backbone.stages_") for key in layout.slots.get("encoder", {})):
        match = re.search(r"-res(\d+)$", name)
        timm_name = str(layout.config.get("timm_name") or "convnext_xxlarge.clip_laion2b_soup")
        return TimmEncoder(timm_name, None, image_size=int(match[1]) if match else 768)
    blocks = {
        key.split(".")[3] for key in layout.slots.get("encoder", {}) if key.startswith("backbone.encoder.layers.")
    }
    if not blocks:
        raise ValueError(f"there is neither '{CLIP_TOWER}encoder.layers.' nor a ConvNeXt")
    given = layout.config.get("vision_config") or CLIP_L
    return HFEncoder(config={**given, "model_type": "clip_vision_model"}, layer=len(blocks))


def _task_tokens(layout: Layout) -> tuple[dict[str, int], dict[str, int]]:
    """Tokens behind an image by group, in order, and the parameters of each group.

    Raises:
        ValueError: where weights and configuration disagree, naming key and setting.
    """
    config = layout.config
    found = {key.removeprefix("tasks."): value for key, value in layout.slots.get("embedder", {}).items()}
    keys = {task: layout.names.shown("embedder", f"tasks.{task}") for task in (*TASKS, *found)}
    if not (count := int(config.get("num_task_tokens") or 0)):
        if found:
            raise ValueError(
                f"the weights hold task tokens ({keys[next(iter(found))]}), and the configuration does not say "
                "how many: num_task_tokens"
            )
        return {}, {}
    order = str(config["aux_mode"]).split("-")
    if unknown := set(order) - set(TASKS):
        raise ValueError(f"aux_mode names {sorted(unknown)}; there are {', '.join(TASKS)}")
    if missing := [keys[task] for task in order if task not in found]:
        raise ValueError(f"there is no {', '.join(missing)}, and aux_mode is {config['aux_mode']}")
    if surplus := [keys[task] for task in found if task not in order]:
        raise ValueError(f"there is {', '.join(surplus)}, and aux_mode is {config['aux_mode']}")
    if (form := config.get("task_token_format", EXPANDED)) != EXPANDED and "llava" in str(config.get("model_type")):
        raise ValueError(f"task_token_format is '{form}', and only {EXPANDED} is built")
    for task in order:
        said = count if task == "gen" else (config.get(f"image_{task}") or {}).get("num_tokens", len(found[task]))
        if len(found[task]) != said or said % count:
            wanted = (
                "num_task_tokens" if task == "gen" else f"image_{task}.num_tokens {said}, a multiple of num_task_tokens"
            )
            raise ValueError(f"{keys[task]} is {tuple(found[task].shape)}, not of {wanted} {count} rows")
    return dict.fromkeys(order, count), {task: len(found[task]) for task in order}


def _is_ola(model: VLM) -> bool:
    projector = model.projector
    return (
        isinstance(model.encoder, TimmEncoder | HFEncoder)
        and model.encoder.is_plain
        and isinstance(projector, MLP)
        and len(projector.layers) == 3
        and isinstance(model.embedder, Splice)
        and set(model.embedder.task_tokens) <= set(TASKS)
        and len({len(places) for places in model.embedder.task_tokens.values()}) <= 1
        and type(model.decoder) is HFDecoder
    )


def _head_config(head: EmbeddingDistillation, task: str) -> dict[str, Any]:
    """A head's published settings, layers counted from 1; without weights of losses, which a stage has, not a model."""
    first = head.predictors[0]
    assert isinstance(first, Perceiver)
    layer = first.layers[0]
    assert isinstance(layer.to_q, nn.Linear)
    return {
        "depth": len(first.layers),
        "num_heads": layer.num_heads,
        "dim_head": layer.to_q.out_features // int(str(layer.num_heads)),
        "num_tokens": first.num_queries,
        "output_dim": first.proj_out.out_features,
        "ff_mult": 1,
        f"{'img' if task == 'gen' else task}_layer_indices": "-".join(str(index) for index in head.layers),
        **({"use_intermediate_depth": False} if task == "depth" else {}),
    }


class OlaVlm(Family):
    """OLA-VLM, with its task tokens and predictors."""

    name = "ola_vlm"
    model_types = ("ola_llama", "ola_phi3", "llava_llama", "llava_phi3")

    def read(self, source: str) -> SlotStates:
        """Weights of a folder or hub repository by slot; predictors are `heads.gen`, `heads.depth` and `heads.seg`.

        Raises:
            ValueError: for a key that belongs to no slot.
        """
        folder = resolve(source)
        return NAMES.slots_of(read_folder(folder), read_config(folder))

    def load(self, source: str | Path | Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> VLM:
        """Build the model that the configuration describes, with all weights; raises as `load_published` does.

        Predictors are left out, as only training needs them: name the weights in `model.stage.start_from` for that.
        """
        return load_folder(source, config, NAMES, _architecture)

    def export(self, model: VLM, out: Path, written: SampleFormat | None = None) -> float:
        """Write the model under published names, read it back, and compare logits.

        Predictors are written if the model has any, as in files after pre-training; blocks of CLIP after the layer
        that is read are not.

        Args:
            model: HFEncoder or TimmEncoder, MLP of depth 2, Splice and HFDecoder.
            out: a folder that is new or empty.
            written: template and transform of its data.

        Returns and raises as `Family.export`.
        """
        if not _is_ola(model):
            parts = [type(part).__name__ for part in (model.encoder, model.projector, model.embedder, model.decoder)]
            raise ValueError(
                "ola_vlm is TimmEncoder, or HFEncoder, read at one layer and without register tokens, MLP of depth 2, "
                f"Splice with task tokens among {', '.join(TASKS)}, "
                f"equally many of each, and HFDecoder; this model is {parts} with "
                f"{ {name: len(places) for name, places in model.embedder.task_tokens.items()} }"
            )
        encoder, decoder = model.encoder, model.decoder
        assert isinstance(decoder, HFDecoder)
        padded = written is not None and isinstance(written.transform, PadSquare)
        heads = {name: head for name, head in model.heads.items() if isinstance(head, EmbeddingDistillation)}
        places = {f"heads.{name}": f"heads.{head.tokens or name}" for name, head in heads.items()}
        form = "phi3" if decoder.config.model_type == "phi3" else "llama"
        config = decoder.config.to_dict() | {
            "model_type": f"{'ola' if heads else 'llava'}_{form}",
            "aux_mode": "-".join(model.embedder.task_tokens),
            "num_task_tokens": next((len(place) for place in model.embedder.task_tokens.values()), 0),
            "task_token_format": EXPANDED,
            "mm_hidden_size": encoder.width,
            "mm_projector_type": "mlp2x_gelu",
            "mm_vision_select_layer": -2,
            "mm_vision_select_feature": "patch",
            "image_aspect_ratio": "pad" if padded else "square",
        }
        convolutional = isinstance(encoder, TimmEncoder)
        if isinstance(encoder, TimmEncoder):
            config |= {"mm_vision_tower": f"{encoder.name}-res{encoder.pixels.size}", "timm_name": encoder.name}
        elif isinstance(encoder, HFEncoder):
            config |= {"mm_vision_tower": encoder.name, "vision_config": encoder.config.to_dict()}
        for task in ("depth", "seg"):
            if task in model.embedder.task_tokens:  # the published classes make parameters by this number
                config[f"image_{task}"] = {"num_tokens": len(model.embedder.task_parameters(task))}
        for name, head in heads.items():
            config[f"image_{head.tokens or name}"] = _head_config(head, head.tokens or name)
            config |= {"pass_text_to_aux": head.text != "none", "use_contrastive": head.contrastive > 0}
            config |= {"contrastive_loss_weight": head.contrastive}
        return export_folder(model, out, config, _names(convolutional), places, partial(self.load, config=None))
