"""Writing models as transformers' `LlavaForConditionalGeneration`, task tokens as new words among them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    AutoProcessor,
    CLIPImageProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.models.llava.image_processing_llava import LlavaImageProcessor

from lit_vlm.checkpoints.published.layout import TOLERANCE, difference_of, new_folder, trial_batch
from lit_vlm.core.part import StateDict
from lit_vlm.data import ImageTransform, PadSquare, SquareCrop
from lit_vlm.data.records import Message, Text
from lit_vlm.data.sample.chat_template import IMAGE_MARK, as_jinja
from lit_vlm.data.sample.format import SampleFormat
from lit_vlm.data.sample.pieces import encode_pieces
from lit_vlm.data.sample.spec import InputSpec
from lit_vlm.decoders import HFDecoder
from lit_vlm.embedders import Splice
from lit_vlm.encoders import HFEncoder
from lit_vlm.model.vlm import VLM
from lit_vlm.projectors import MLP, Linear

PROJECTOR = {"linear_1": "layers.0", "linear_2": "layers.2"}
OWN_PROJECTOR = {ours: theirs for theirs, ours in PROJECTOR.items()}
WORDS = ("lm.model.embed_tokens.weight", "lm.lm_head.weight")
"""The word table and the output layer of a decoder, by its own keys."""


class _Parts(NamedTuple):
    """A model that the class can hold.

    Attributes:
        encoder: HFEncoder.
        layers: the linear layers of the projector, one or two.
        embedder: Splice, maybe with task tokens.
        decoder: HFDecoder.
    """

    encoder: HFEncoder
    layers: Sequence[nn.Linear]
    embedder: Splice
    decoder: HFDecoder


class _NewWords(NamedTuple):
    """Words that the model's tokenizer gets.

    Attributes:
        image: id of the image token.
        tasks: ids of the task tokens, in the order in which they stand behind an image.
        names: their texts.
    """

    image: int
    tasks: list[int]
    names: list[str]


def write_llava(model: VLM, out: Path, written: SampleFormat | None) -> float:
    """Write a model that `LlavaForConditionalGeneration.from_pretrained(out)` loads, and check that logits agree.

    The vision model is written without the blocks after the feature layer, so `vision_feature_layer` becomes −1. The
    token `<image>` is added to the tokenizer, and a row for it to the word table. Task tokens are constant vectors
    behind each image: they become words such as `<task_depth_0>`, which the chat template writes behind `<image>`. A
    single linear layer as projector is followed by the identity.

    Args:
        model: HFEncoder, Linear or MLP of depth 1 or 2, Splice and HFDecoder.
        out: a folder that is new or empty.
        written: template and transform of its data, for chat template and image processor; SquareCrop and PadSquare can
            be written.

    Returns:
        the largest difference of the logits on a random picture and text, in fp32.

    Raises:
        ValueError: for a model of other parts, a folder that is not empty, or logits that differ.
    """
    parts = _held(model)
    new_folder(out)
    model.float().eval()
    tokenizer = parts.decoder.tokenizer
    spec = InputSpec(tokenizer, model.encoder.pixels, model.encoder.patch_grid, model.grid_map)
    expected = None if written is None else _asked(written, spec)
    words = _add_words(tokenizer, parts.embedder)
    if written is not None:
        tokenizer.chat_template = _chat_template(written, spec, words)
    act = "gelu" if len(parts.layers) == 2 else "linear"
    rows = max([words.image, *words.tasks]) + 1
    config = llava_config(parts.encoder, parts.decoder, words.image, rows, act)
    target = LlavaForConditionalGeneration(config).eval()
    _fill(target, model, parts, words)
    target.generation_config.suppress_tokens = [words.image, *words.tasks]
    target.save_pretrained(out)
    tokenizer.save_pretrained(out)
    processor = _image_processor(parts.encoder, None if written is None else written.transform)
    if processor is not None:
        LlavaProcessor(
            image_processor=processor,
            tokenizer=tokenizer,
            patch_size=parts.encoder.patch_grid.patch,
            vision_feature_select_strategy=target.config.vision_feature_select_strategy,
            num_additional_image_tokens=parts.encoder.skip + parts.encoder.patch_grid.prefix,
            chat_template=tokenizer.chat_template,
        ).save_pretrained(out)
        AutoProcessor.from_pretrained(out)
    if expected is not None and tokenizer.chat_template is not None:
        _check_prompt(tokenizer, expected, words)
    difference = _compare(model, out, words)
    if not difference <= TOLERANCE:
        raise ValueError(f"the exported model's logits differ by {difference:.2e}, more than {TOLERANCE:g}: {out}")
    return difference


def llava_config(
    encoder: HFEncoder, decoder: HFDecoder, image_id: int, rows: int | None = None, act: str = "gelu"
) -> LlavaConfig:
    """The configuration of transformers' `LlavaForConditionalGeneration` with these parts, as far as they are built.

    Args:
        encoder: whose blocks behind the one that is read are left out.
        decoder: whose word table gets a row for the image token, where it lacks one.
        image_id: id of the image token.
        rows: rows of the word table at least; default: up to the image token's.
        act: what stands between the two layers of the projector.
    """
    grid = encoder.patch_grid(*(encoder.config.image_size,) * 2)
    text = decoder.config.to_dict()
    text["vocab_size"] = max(decoder.vocab_size, rows or image_id + 1)
    return LlavaConfig(
        vision_config=encoder.config.to_dict(),
        text_config=text,
        image_token_index=image_id,
        projector_hidden_act=act,
        image_seq_length=grid.num_tokens,
        vision_feature_layer=encoder.layers.from_last,
        vision_feature_select_strategy="default" if encoder.skip else "full",
        tie_word_embeddings=bool(decoder.config.tie_word_embeddings),
    )


def published_key(slot: str, name: str) -> str:
    """The key of a weight in the state dict of transformers' `LlavaForConditionalGeneration`."""
    if slot == "encoder":
        return f"model.vision_tower.{name.removeprefix('backbone.')}"
    if slot == "projector":
        layer, _, kind = name.rpartition(".")
        return f"model.multi_modal_projector.{OWN_PROJECTOR.get(layer, layer)}.{kind}"
    name = name.removeprefix("lm.")
    return name if name.startswith("lm_head.") else f"model.language_model.{name.removeprefix('model.')}"


def _held(model: VLM) -> _Parts:
    """The parts of a model; raises ValueError for one that the class cannot hold."""
    encoder, projector, embedder, decoder = model.encoder, model.projector, model.embedder, model.decoder
    layers = [projector.linear] if isinstance(projector, Linear) else []
    if isinstance(projector, MLP):
        layers = [layer for layer in projector.layers if isinstance(layer, nn.Linear)]
    if (
        not isinstance(encoder, HFEncoder)
        or len(layers) not in (1, 2)
        or not isinstance(embedder, Splice)
        or type(decoder) is not HFDecoder
    ):
        parts = [type(part).__name__ for part in (encoder, projector, embedder, decoder)]
        depth = f", its MLP of depth {len(layers)}" if len(layers) > 2 else ""
        raise ValueError(
            "llava-hf is HFEncoder, Linear or MLP of depth 1 or 2, Splice and HFDecoder; this model is "
            f"{', '.join(parts)}{depth}"
        )
    if encoder.skip > 1 or (len(encoder.layers.indices) > 1 and encoder.layers.merge == "sum"):
        what = "an encoder with register tokens" if encoder.skip > 1 else "the sum of several layers of an encoder"
        raise ValueError(f"llava-hf does not hold {what}, as this {encoder.config.model_type} has")
    return _Parts(encoder, layers, embedder, decoder)


def _add_words(tokenizer: Any, embedder: Splice) -> _NewWords:
    """Give a tokenizer the image token and one word for each task token."""
    names = [
        f"<task_{group}_{index}>" for group, places in embedder.task_tokens.items() for index in range(len(places))
    ]
    missing = [name for name in (IMAGE_MARK, *names) if name not in tokenizer.get_vocab()]
    tokenizer.add_tokens(missing, special_tokens=True)
    return _NewWords(tokenizer.convert_tokens_to_ids(IMAGE_MARK), tokenizer.convert_tokens_to_ids(names), names)


def _fill(target: LlavaForConditionalGeneration, model: VLM, parts: _Parts, words: _NewWords) -> None:
    """Copy all weights; an unused final norm stays as made.

    New rows of word table and output layer are the mean of the others; those of task tokens in the table are their
    vectors.
    """
    state = target.state_dict()
    first, *others = parts.layers
    tasks = parts.embedder.task_vectors() if words.tasks else None
    tables = WORDS if target.config.tie_word_embeddings else WORDS[:1]  # a tied output layer is the same table
    projector: StateDict = {"layers.0.weight": first.weight, "layers.0.bias": _bias(first)}
    second = others[0] if others else None
    identity = torch.eye(first.out_features) if second is None else second.weight
    projector |= {
        "layers.2.weight": identity,
        "layers.2.bias": torch.zeros(first.out_features) if second is None else _bias(second),
    }
    slots = {"encoder": parts.encoder.state_dict(), "projector": projector, "decoder": parts.decoder.state_dict()}
    for slot, own in slots.items():
        for name, value in own.items():
            key = published_key(slot, name)
            if slot == "decoder" and name in WORDS:
                value = _with_rows(value, state[key].shape[0], tasks if name in tables else None, words)
            state[key] = value.detach().clone()
    target.load_state_dict(state)


def _bias(layer: nn.Linear) -> Tensor:
    return torch.zeros(layer.out_features) if layer.bias is None else layer.bias


def _with_rows(table: Tensor, rows: int, tasks: Tensor | None, words: _NewWords) -> Tensor:
    """A table `[v, d]` with more rows, those of the task tokens being their vectors `[k, d]`."""
    grown = torch.cat([table, table.mean(0, keepdim=True).expand(rows - len(table), -1)])
    if tasks is not None:
        grown = grown.index_copy(0, torch.tensor(words.tasks), tasks.to(grown.dtype))
    return grown


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


def _chat_template(written: SampleFormat, spec: InputSpec, words: _NewWords) -> str | None:
    """How chats are written, task tokens included; None, with a warning, for a template that jinja cannot write."""
    template = written.template_for(spec)
    bos = spec.tokenizer.bos_token if spec.bos_id is not None and not template.own_start else ""
    behind = "".join(words.names)
    try:
        return as_jinja(template, spec.tokenizer.eos_token or "", bos, behind)
    except ValueError as error:
        where = f"; behind each {IMAGE_MARK} a prompt must have {behind}" if behind else ""
        warnings.warn(f"no chat template is written: {error}{where}", stacklevel=3)
        return None


_QUESTION = Message("user", (Text("What is this?"),))


def _asked(written: SampleFormat, spec: InputSpec) -> list[int] | None:
    """Ids of a question as the kit writes it; None where the template writes nothing of it."""
    template = written.template_for(spec)
    pieces = template.prompt([_QUESTION], spec.tokenizer.eos_token or "")
    return encode_pieces(pieces, spec, not template.own_start)[0] or None


def _check_prompt(tokenizer: Any, expected: list[int], words: _NewWords) -> None:
    """Warn where transformers spells a prompt otherwise than the kit did in training."""
    chat = [{"role": "user", "content": [{"type": "text", "text": _QUESTION.text}]}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    begins = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    found = tokenizer(text, add_special_tokens=not begins).input_ids
    if found != expected:
        warnings.warn(f"transformers writes a prompt as {found}, the kit wrote it as {expected}", stacklevel=3)


def _compare(model: VLM, out: Path, words: _NewWords) -> float:
    """Largest difference of the logits between the model and the written one, on a random picture and text."""
    loaded = LlavaForConditionalGeneration.from_pretrained(out, dtype=torch.float32).eval()
    batch = trial_batch(model)
    _, images = next(batch.images.groups())
    pixels = model.encoder.normalise(images, torch.float32)
    ids = batch.input_ids.clone()
    places = batch.image_positions
    ids.view(-1)[places] = torch.tensor([words.image] * (len(places) - len(words.tasks)) + words.tasks)
    with torch.no_grad():
        ours = model.logits(batch)
        theirs = loaded(input_ids=ids, pixel_values=pixels).logits[..., : ours.shape[-1]]
    return difference_of(theirs, ours)
