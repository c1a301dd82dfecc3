"""Writing a model for transformers; it is read back and compared with the kit's own before it counts as done."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lit_vlm.core.lora import merge_adapters
from lit_vlm.core.part import standalone_class
from lit_vlm.core.quantised import quantised_kinds
from lit_vlm.core.tiling import as_they_come
from lit_vlm.core.written import check_new_folder, whole_folder
from lit_vlm.data.sample.chat_template import IMAGE_MARK, as_jinja
from lit_vlm.data.sample.format import SampleFormat
from lit_vlm.data.sample.spec import InputSpec
from lit_vlm.hf.compare import Differences, compare_folder, stop_ids
from lit_vlm.hf.config import SLOTS, LitVLMConfig
from lit_vlm.hf.model import LitVLMForConditionalGeneration
from lit_vlm.hf.processor import LitVLMProcessor
from lit_vlm.model.vlm import VLM


def export_hf(model: VLM, config: Mapping[str, Any], written: SampleFormat, spec: InputSpec, out: Path) -> Differences:
    """Write a model that `AutoModelForImageTextToText` and `AutoProcessor` load with `trust_remote_code=True`.

    Heads and teachers are left behind; adapters are merged into the weights. Ids, logits, gradients and greedy answers
    are compared with the kit's before the folder gets its name.

    Args:
        model: of any parts; loses its heads and is put into eval mode and fp32, in place.
        config: the config of its run.
        written: template, transform and `max_length` of its data.
        spec: what the data side knows of it.
        out: a folder that is new or empty.

    Raises:
        ValueError: for a folder that is not empty or cannot be written, ids, logits, gradients or answers that differ,
            and as `make_processor`.
    """
    check_new_folder(out)
    merge_adapters(model)
    model.heads = nn.ModuleDict()
    model.float().eval()
    wrapped, processor = _wrapped(model, config, written, spec), make_processor(model, config, written, spec)
    with whole_folder(out) as scratch:
        wrapped.save_pretrained(scratch)
        processor.save_pretrained(scratch)
        return compare_folder(model, written, spec, scratch)


def _wrapped(
    model: VLM, config: Mapping[str, Any], written: SampleFormat, spec: InputSpec
) -> LitVLMForConditionalGeneration:
    """The model, which shares its weights."""
    tokenizer = _tokenizer(spec)
    settings = LitVLMConfig(
        _slots(model, config),
        tokenizer.convert_tokens_to_ids(IMAGE_MARK),
        model.decoder.width,
        model.decoder.num_layers,
        model.decoder.vocab_size,
        quantised_kinds({name: model.slots()[name][0] for name in SLOTS}),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=spec.bos_id,
        eos_token_id=tokenizer.eos_token_id,
        **_scales(model),
    )
    with torch.device("meta"):
        wrapped = LitVLMForConditionalGeneration(settings)
    wrapped.inner.encoder, wrapped.inner.projector = model.encoder, model.projector
    wrapped.inner.embedder, wrapped.inner.decoder = model.embedder, model.decoder
    generation = wrapped.generation_config
    assert generation is not None
    generation.eos_token_id = sorted(stop_ids(written, spec))
    generation.pad_token_id, generation.bos_token_id = tokenizer.pad_token_id, spec.bos_id
    if settings.image_token_index < model.decoder.vocab_size:
        generation.suppress_tokens = [settings.image_token_index]
    return wrapped.eval()


def make_processor(model: VLM, config: Mapping[str, Any], written: SampleFormat, spec: InputSpec) -> LitVLMProcessor:
    """The processor of a model, for chats as its run's template writes them; arguments as for `export_hf`.

    Raises:
        ValueError: for a template that chats cannot be written by, or an embedder that puts tiles together.
    """
    if model.embedder.tile_map is not as_they_come:
        raise ValueError(
            "the processor of an exported folder tells a model nothing of how tiles make up a picture, and "
            f"model.embedder {type(model.embedder).__name__} asks for it; lit-vlm chat, serve and evaluate take the "
            "checkpoint itself"
        )
    tokenizer = _tokenizer(spec)
    template = written.template_for(spec)
    bos = tokenizer.bos_token if spec.bos_id is not None and not template.own_start else ""
    return LitVLMProcessor(
        tokenizer,
        _slots(model, config),
        model.decoder.width,
        model.decoder.vocab_size,
        config["data"]["transform"],
        written.max_length,
        written.template.typed_marks,
        as_jinja(template, tokenizer.eos_token or "", bos),
        template.own_start,
    )


def _tokenizer(spec: InputSpec) -> Any:
    """A copy of the tokenizer, with a mark for images."""
    tokenizer = copy.deepcopy(spec.tokenizer)
    if IMAGE_MARK not in tokenizer.get_vocab():
        tokenizer.add_tokens([IMAGE_MARK], special_tokens=True)
    return tokenizer


def _slots(model: VLM, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Slot → class and arguments of its part, which need no other file."""
    return {name: standalone_class(model.slots()[name][0], config["model"][name]) for name in SLOTS}


def _scales(model: VLM) -> dict[str, Any]:
    """What stands between states and logits in some families, for trainers that multiply states themselves (TRL)."""
    found = getattr(model.decoder, "config", None)
    names = ("logit_scale", "logits_scaling", "final_logit_softcapping")
    return {name: value for name in names if (value := getattr(found, name, None)) is not None}
