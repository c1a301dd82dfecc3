"""`LlavaForConditionalGeneration` of transformers: LLaVA-1.5 and models of the same parts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoProcessor,
    CLIPImageProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.models.llava.image_processing_llava import LlavaImageProcessor

from lit_vlm.checkpoints.published.family import Family
from lit_vlm.checkpoints.published.layout import TOLERANCE, SlotStates, fill, read_config, trial_batch
from lit_vlm.core.part import meta_parameters
from lit_vlm.core.pretrained import resolve
from lit_vlm.core.safetensors import read_folder
from lit_vlm.data import ImageTransform, PadSquare, SquareCrop
from lit_vlm.decoders import HFDecoder
from lit_vlm.embedders import Splice
from lit_vlm.encoders import HFEncoder
from lit_vlm.model.vlm import VLM
from lit_vlm.projectors import MLP

IMAGE_TOKEN = "<image>"
PROJECTOR = {"linear_1": "layers.0", "linear_2": "layers.2"}
OWN_PROJECTOR = {ours: theirs for theirs, ours in PROJECTOR.items()}
DROPPED = {
    "position_ids": "a buffer that older versions saved",
    "rotary_emb.inv_freq": "a buffer that older versions saved",
    "post_layernorm": "the final norm of the vision model, which the feature layer does not reach",
}


def _settings(folder: str) -> LlavaConfig:
    return LlavaConfig(**read_config(folder))


def _feature_layer(config: LlavaConfig) -> int:
    if not isinstance(config.vision_feature_layer, int):
        raise ValueError(f"one vision_feature_layer is supported, this config has {config.vision_feature_layer}")
    return config.vision_feature_layer


def _kept(config: LlavaConfig) -> int:
    """How many blocks the vision model has up to the feature layer."""
    layer = _feature_layer(config)
    return layer if layer >= 0 else config.vision_config.num_hidden_layers + 1 + layer


def _architecture(config: LlavaConfig, tokenizer: str | None) -> VLM:
    has_cls = config.vision_config.model_type == "clip_vision_model"
    with meta_parameters():
        encoder = HFEncoder(
            config=config.vision_config.to_dict(),
            layer=_feature_layer(config),
            cls=has_cls and config.vision_feature_select_strategy == "full",
        )
        text = config.text_config.to_dict() | {"tie_word_embeddings": config.tie_word_embeddings}
        decoder = HFDecoder(config=text, tokenizer=tokenizer)
        projector = MLP(encoder.width, decoder.width, depth=2)
        return VLM(encoder, projector, Splice(decoder.width, decoder.vocab_size), decoder)


def _slots(state: Mapping[str, Tensor], config: LlavaConfig) -> SlotStates:
    """Weights by slot, without those of the vision model that come after the feature layer."""
    slots: SlotStates = {"encoder": {}, "projector": {}, "decoder": {}}
    kept = _kept(config)
    for key, value in state.items():
        place = _place(key, kept)
        if place is not None:
            slots[place[0]][place[1]] = value
    words = slots["decoder"].get("lm.model.embed_tokens.weight")
    if config.tie_word_embeddings and words is not None:
        slots["decoder"].setdefault("lm.lm_head.weight", words)
    return slots


def _published(slot: str, name: str) -> str:
    """The key of a weight in the state dict of transformers' `LlavaForConditionalGeneration`."""
    if slot == "encoder":
        return f"model.vision_tower.{name.removeprefix('backbone.')}"
    if slot == "projector":
        layer, _, kind = name.rpartition(".")
        return f"model.multi_modal_projector.{OWN_PROJECTOR.get(layer, layer)}.{kind}"
    name = name.removeprefix("lm.")
    return name if name.startswith("lm_head.") else f"model.language_model.{name.removeprefix('model.')}"


def _place(key: str, num_blocks: int) -> tuple[str, str] | None:
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
    raise ValueError(f"'{key}' is no key of the family llava-hf")


def _num_prefix(encoder: HFEncoder) -> int:
    return encoder.skip + encoder.patch_grid.prefix


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


def llava_config(encoder: HFEncoder, decoder: HFDecoder, image_id: int) -> LlavaConfig:
    """The configuration of transformers' `LlavaForConditionalGeneration` with these parts, as far as they are built.

    Args:
        encoder: whose blocks behind the one that is read are left out.
        decoder: whose word table gets a row for the image token, where it lacks one.
        image_id: id of the image token.
    """
    grid = encoder.patch_grid(*(encoder.config.image_size,) * 2)
    text = decoder.config.to_dict()
    text["vocab_size"] = max(decoder.vocab_size, image_id + 1)
    return LlavaConfig(
        vision_config=encoder.config.to_dict(),
        text_config=text,
        image_token_index=image_id,
        image_seq_length=grid.num_tokens,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default" if encoder.skip else "full",
        tie_word_embeddings=bool(decoder.config.tie_word_embeddings),
    )


def _fill(target: LlavaForConditionalGeneration, model: VLM) -> None:
    """Copy all weights. New rows of the word table are the mean of the others; an unused final norm stays as made."""
    state = target.state_dict()
    for key, value in model.state_dict().items():
        name = _published(*key.split(".", 1))
        if state[name].shape != value.shape:
            extra = state[name].shape[0] - value.shape[0]
            value = torch.cat([value, value.mean(0, keepdim=True).expand(extra, -1)])
        state[name] = value.detach().clone()
    target.load_state_dict(state)


def _image_processor(encoder: HFEncoder, transform: ImageTransform | None) -> Any:
    """The image processor that resizes as the run did; None where transformers has no such processor."""
    mean, std = encoder.pixel_mean.flatten().tolist(), encoder.pixel_std.flatten().tolist()
    side = encoder.pixels.size
    common = {"image_mean": mean, "image_std": std, "crop_size": {"height": side, "width": side}}
    if isinstance(transform, SquareCrop):
        return CLIPImageProcessor(size={"shortest_edge": side}, **common)
    if isinstance(transform, PadSquare):
        return LlavaImageProcessor(size={"shortest_edge": side}, do_pad=True, **common)
    return None


def _compare(model: VLM, out: Path, image_id: int) -> float:
    """Largest difference of the logits between the model and the written one, on a random picture and text."""
    loaded = LlavaForConditionalGeneration.from_pretrained(out, dtype=torch.float32).eval()
    batch = trial_batch(model)
    _, images = next(batch.images.groups())
    pixels = model.encoder.normalise(images, torch.float32)
    ids = batch.input_ids.clone()
    ids.view(-1)[batch.image_positions] = image_id
    with torch.no_grad():
        ours = model.logits(batch)
        theirs = loaded(input_ids=ids, pixel_values=pixels).logits[..., : ours.shape[-1]]
    return float((ours - theirs).abs().max())


class LlavaHf(Family):
    """LLaVA as transformers' `LlavaForConditionalGeneration` saves it."""

    name = "llava-hf"
    model_types = ("llava",)

    def read(self, source: str) -> SlotStates:
        """Weights of a folder or hub repository by slot.

        Raises:
            ValueError: for a key that belongs to no slot.
        """
        folder = resolve(source)
        return _slots(read_folder(folder), _settings(folder))

    def load(self, source: str | Path | Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> VLM:
        """Build the model that the configuration describes, with all weights; raises as `load_published` does."""
        if isinstance(source, Mapping):
            if config is None:
                raise ValueError("a state dict says nothing of attention heads and layers: pass config as well")
            settings, state, folder = LlavaConfig(**config), source, None
        else:
            folder = resolve(str(source))
            settings = LlavaConfig(**config) if config else _settings(folder)
            state = read_folder(folder)
        model = _architecture(settings, folder)
        fill(model, _slots(state, settings), _published)
        return model.eval()

    def export(self, model: VLM, out: Path, transform: ImageTransform | None = None) -> float:
        """Write a model that `LlavaForConditionalGeneration.from_pretrained(out)` loads, and check that logits agree.

        The vision model is written without the blocks after the feature layer, so `vision_feature_layer` becomes −1.
        The token `<image>` is added to the tokenizer, and a row for it to the word table.

        Args:
            model: HFEncoder, MLP of depth 2, Splice and HFDecoder.
            out: a folder that is new or empty.
            transform: how pictures were resized, for the image processor; SquareCrop and PadSquare can be written.

        Returns and raises as `Family.export`.
        """
        encoder, _, decoder = llava_parts(model)
        if out.exists() and any(out.iterdir()):
            raise ValueError(f"{out} is not empty")
        model.float().eval()
        tokenizer = decoder.tokenizer
        image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) if IMAGE_TOKEN in tokenizer.get_vocab() else None
        if image_id is None:
            tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
            image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        target = LlavaForConditionalGeneration(llava_config(encoder, decoder, image_id)).eval()
        _fill(target, model)
        target.generation_config.suppress_tokens = [image_id]
        target.save_pretrained(out)
        tokenizer.save_pretrained(out)
        processor = _image_processor(encoder, transform)
        if processor is not None:
            LlavaProcessor(
                image_processor=processor,
                tokenizer=tokenizer,
                patch_size=encoder.patch_grid.patch,
                vision_feature_select_strategy=target.config.vision_feature_select_strategy,
                num_additional_image_tokens=_num_prefix(encoder),
            ).save_pretrained(out)
            AutoProcessor.from_pretrained(out)
        difference = _compare(model, out, image_id)
        if difference > TOLERANCE:
            raise ValueError(f"the exported model's logits differ by {difference:.2e}, more than {TOLERANCE:g}: {out}")
        return difference
