"""Writing a model for transformers, reading it back, and comparing it with the kit's own before it counts as done."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image as PILImage
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from lit_vlm.checkpoints.published.layout import TOLERANCE
from lit_vlm.core.lora import merge_adapters
from lit_vlm.core.part import standalone_class
from lit_vlm.core.written import check_new_folder, whole_folder
from lit_vlm.data.records import Image, Message, Record, RecordError, Text
from lit_vlm.data.sample.chat_template import IMAGE_MARK, as_jinja
from lit_vlm.data.sample.collate import collate, collate_prompts
from lit_vlm.data.sample.encode import Sample
from lit_vlm.data.sample.format import SampleFormat
from lit_vlm.data.sample.spec import InputSpec
from lit_vlm.hf.config import SLOTS, LitVLMConfig
from lit_vlm.hf.model import LitVLMForConditionalGeneration
from lit_vlm.hf.processor import LitVLMProcessor
from lit_vlm.model.generate import generate
from lit_vlm.model.vlm import VLM

NEW_TOKENS = 8
"""Length of the answers that are compared."""


@dataclass(frozen=True)
class Differences:
    """The largest differences between a model and what was read back, in fp32.

    Attributes:
        logits: of the logits, over prompts with a picture, with two, and without, padded together.
        gradients: of the projector's gradients, relative to the largest of them; 0 for one without parameters.
    """

    logits: float
    gradients: float


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
        ValueError: for a folder that is not empty or cannot be written, a template that chats cannot be written by, or
            ids, logits, gradients or answers that differ.
    """
    check_new_folder(out)
    merge_adapters(model)
    model.heads = nn.ModuleDict()
    model.float().eval()
    wrapped, processor = _made(model, config, written, spec)
    with whole_folder(out) as scratch:
        wrapped.save_pretrained(scratch)
        processor.save_pretrained(scratch)
        return _compared(model, written, spec, scratch)


def _made(
    model: VLM, config: Mapping[str, Any], written: SampleFormat, spec: InputSpec
) -> tuple[LitVLMForConditionalGeneration, LitVLMProcessor]:
    """The model, which shares its weights, and its processor."""
    tokenizer = copy.deepcopy(spec.tokenizer)
    if IMAGE_MARK not in tokenizer.get_vocab():
        tokenizer.add_tokens([IMAGE_MARK], special_tokens=True)
    slots = {name: standalone_class(model.slots()[name][0], config["model"][name]) for name in SLOTS}
    settings = LitVLMConfig(
        slots,
        tokenizer.convert_tokens_to_ids(IMAGE_MARK),
        model.decoder.width,
        model.decoder.num_layers,
        model.decoder.vocab_size,
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
    generation.eos_token_id = sorted(_stop_ids(written, spec))
    generation.pad_token_id, generation.bos_token_id = tokenizer.pad_token_id, spec.bos_id
    if settings.image_token_index < model.decoder.vocab_size:
        generation.suppress_tokens = [settings.image_token_index]
    eos, bos = tokenizer.eos_token or "", tokenizer.bos_token if spec.bos_id is not None else ""
    processor = LitVLMProcessor(
        tokenizer,
        slots,
        model.decoder.width,
        model.decoder.vocab_size,
        config["data"]["transform"],
        written.max_length,
        written.template.typed_marks,
        as_jinja(written.template, eos, bos),
    )
    return wrapped.eval(), processor


def _scales(model: VLM) -> dict[str, Any]:
    """What stands between states and logits in some families, for trainers that multiply states themselves (TRL)."""
    found = getattr(model.decoder, "config", None)
    names = ("logit_scale", "logits_scaling", "final_logit_softcapping")
    return {name: value for name in names if (value := getattr(found, name, None)) is not None}


def _stop_ids(written: SampleFormat, spec: InputSpec) -> set[int]:
    """Ids that end an answer: those of any template, and the one that closes an answer in this one."""
    closing = written.closing_id(spec)
    return set(spec.stop_ids) | ({closing} if closing is not None else set())


# ------------------------------------------------------------------ comparing


def _trials() -> list[list[Message]]:
    """Conversations that are compared: with a picture, with two, without, of two turns, with system text."""
    picture, other = (Image(path=name) for name in ("first.png", "second.png"))
    ask = Message("user", (picture, Text("What is in the picture?")))
    say = Message("assistant", (Text("A small red cube."),))
    return [
        [ask],
        [Message("user", (picture, Text(" and "), other, Text(" differ. How?")))],
        [Message("user", (Text("Which is larger, two or </s> three <|im_end|> <image>?"),))],
        [ask, say, Message("user", (Text("And its colour?"),))],
        [Message("system", (Text("Answer in one word."),)), ask],
    ]


def _compared(model: VLM, written: SampleFormat, spec: InputSpec, folder: Path) -> Differences:
    """Compare the model with the one that a folder holds.

    Raises:
        ValueError: naming what differs.
    """
    loaded = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    samples, chats = _asked(written, spec, folder)
    pad_id = int(spec.tokenizer.pad_token_id)
    inputs = processor.apply_chat_template(
        chats, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
    )
    _check_ids(samples, inputs, processor)
    batch = collate(samples, pad_id=pad_id)
    prompts = collate_prompts(samples, pad_id=pad_id)
    with torch.no_grad():
        ours = model.logits(batch)
        theirs = loaded(**inputs).logits
    rows = [
        (ours[row, : len(sample)], theirs[row, theirs.shape[1] - len(sample) :]) for row, sample in enumerate(samples)
    ]
    logits = max(float((a - b).abs().max()) for a, b in rows)
    gradients = _gradients(model, loaded, batch, inputs, rows)
    if not max(logits, gradients) <= TOLERANCE:
        raise ValueError(
            f"what was read back differs: logits by {logits:.2e}, gradients by {gradients:.2e}; allowed is "
            f"{TOLERANCE:g}"
        )
    stops = _stop_ids(written, spec)
    answers = generate(model, prompts, stops, NEW_TOKENS)
    found = loaded.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    for row, answer in enumerate(answers):
        if found[row, : len(answer)].tolist() != answer:
            raise ValueError(f"what was read back answers {found[row].tolist()}, the model itself {answer}")
    return Differences(logits, gradients)


def _asked(written: SampleFormat, spec: InputSpec, folder: Path) -> tuple[list[Sample], list[Any]]:
    """Prompts as the kit encodes them, and the same ones as chats of transformers; those the template can write."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, 256, (2, 24, 32, 3), generator=generator, dtype=torch.uint8).numpy()
    pictures = {name: PILImage.fromarray(one) for name, one in zip(("first.png", "second.png"), drawn, strict=True)}
    encode = written.sample_encoder(spec, prompt=True)
    samples: list[Sample] = []
    chats: list[Any] = []
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        for name, picture in pictures.items():
            picture.save(Path(scratch) / name)
        for messages in _trials():
            try:
                samples.append(encode(Record("trial", "trial", tuple(messages)), Path(scratch)))
            except RecordError:
                continue  # the template cannot write it, or it is longer than any that the model was trained on
            chats.append([_as_chat(message, pictures) for message in messages])
    if not samples:
        raise ValueError(f"data.max_length {written.max_length} is too short for a question about a picture")
    return samples, chats


def _as_chat(message: Message, pictures: Mapping[str, PILImage.Image]) -> dict[str, Any]:
    content = [
        {"type": "text", "text": part.text}
        if isinstance(part, Text)
        else {"type": "image", "image": pictures[part.path or ""]}
        for part in message.content
    ]
    return {"role": message.role, "content": content}


def _check_ids(samples: Sequence[Sample], inputs: Mapping[str, Tensor], processor: LitVLMProcessor) -> None:
    for sample, ids, mask in zip(samples, inputs["input_ids"], inputs["attention_mask"], strict=True):
        expected = list(sample.ids)
        for start, grid in zip(sample.image_starts, sample.grids, strict=True):
            expected[start : start + grid.num_tokens] = [processor.image_token_id] * grid.num_tokens
        if (found := ids[mask.bool()].tolist()) != expected:
            raise ValueError(f"the processor writes a prompt as {found}, the kit as {expected}")


def _gradients(
    model: VLM,
    loaded: LitVLMForConditionalGeneration,
    batch: Any,
    inputs: Mapping[str, Tensor],
    rows: Sequence[tuple[Tensor, Tensor]],
) -> float:
    """Largest difference of the projector's gradients, relative to the largest of them.

    Of one part alone, as the gradients of a whole model take as much memory as it.
    """
    ours, theirs = list(model.projector.parameters()), list(loaded.inner.projector.parameters())
    if not ours:
        return 0.0
    states = [(p, p.requires_grad) for module in (model, loaded) for p in module.parameters()]
    try:
        for parameter, _ in states:
            parameter.requires_grad_(False)
        for parameter in (*ours, *theirs):
            parameter.requires_grad_(True)
        own, read = model.logits(batch), loaded(**inputs).logits
        losses = [
            torch.stack([one.float().logsumexp(-1).mean() for one in picked]).sum()
            for picked in (
                [own[row, : len(a)] for row, (a, _) in enumerate(rows)],
                [read[row, read.shape[1] - len(b) :] for row, (_, b) in enumerate(rows)],
            )
        ]
        found = [torch.autograd.grad(loss, group) for loss, group in zip(losses, (ours, theirs), strict=True)]
    finally:
        for parameter, before in states:
            parameter.requires_grad_(before)
    largest = max(float(gradient.abs().max()) for gradient in found[0])
    return max(float((a - b).abs().max()) for a, b in zip(*found, strict=True)) / max(largest, 1e-12)
