"""Comparing an exported model, read back by transformers, with the kit's own."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from PIL import Image as PILImage
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from lit_vlm.checkpoints.published.layout import TOLERANCE, difference_of
from lit_vlm.data.records import Image, Message, Record, RecordError, Text
from lit_vlm.data.sample.collate import collate, collate_prompts
from lit_vlm.data.sample.encode import Sample
from lit_vlm.data.sample.format import SampleFormat
from lit_vlm.data.sample.spec import InputSpec
from lit_vlm.hf.processor import LitVLMProcessor
from lit_vlm.model.generate import generate
from lit_vlm.model.vlm import VLM

NEW_TOKENS = 8
"""Length of the answers that are compared."""


@dataclass(frozen=True)
class Differences:
    """The largest differences between a model and what was read back, in fp32.

    Attributes:
        logits: of the logits, over prompts with a picture, with two, and without, padded together; see `difference_of`.
        gradients: of the projector's gradients, relative to the largest of them; 0 for one without parameters.
    """

    logits: float
    gradients: float


def stop_ids(written: SampleFormat, spec: InputSpec) -> set[int]:
    """Ids that end an answer: those of any template, and the one that closes an answer in this one."""
    closing = written.closing_id(spec)
    return set(spec.stop_ids) | ({closing} if closing is not None else set())


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


def compare_folder(model: VLM, written: SampleFormat, spec: InputSpec, folder: Path) -> Differences:
    """Compare a model with the one that a folder holds; as `compare`."""
    loaded = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True).eval()
    return compare(model, written, spec, loaded, loaded.inner.projector, folder)


def compare(
    model: VLM, written: SampleFormat, spec: InputSpec, loaded: Any, projector: nn.Module, folder: Path
) -> Differences:
    """Compare a model with what transformers read back: ids, logits, gradients, greedy answers.

    Args:
        model: as the kit has it, in eval mode and fp32.
        written: template, transform and `max_length` of its data.
        spec: what the data side knows of it.
        loaded: what was read back, a `LitVLMForConditionalGeneration` or PEFT's model around one.
        projector: that of `loaded`.
        folder: where its processor is; files are written beside it for a while.

    Raises:
        ValueError: naming what differs.
    """
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
    logits = max(difference_of(theirs, ours) for ours, theirs in rows)
    gradients = _gradients(model, loaded, projector, batch, inputs, rows)
    if not max(logits, gradients) <= TOLERANCE:
        raise ValueError(
            f"what was read back differs: logits by {logits:.2e}, gradients by {gradients:.2e}; allowed is "
            f"{TOLERANCE:g}"
        )
    stops = stop_ids(written, spec)
    answers = generate(model, prompts, stops, NEW_TOKENS)
    found = loaded.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    for row, written_ids in enumerate(answers):
        # A row of the word table beyond the tokenizer's may stand for images in the export, which never writes it.
        answer = list(takewhile(lambda token: token != processor.image_token_id, written_ids))
        ends = found[row, len(answer) : len(answer) + 1].tolist()
        stopped = answer != written_ids or len(answer) == NEW_TOKENS or set(ends) <= stops
        if found[row, : len(answer)].tolist() != answer or not stopped:
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
    loaded: Any,
    projector: nn.Module,
    batch: Any,
    inputs: Mapping[str, Tensor],
    rows: Sequence[tuple[Tensor, Tensor]],
) -> float:
    """Largest difference of the projector's gradients, relative to the largest of them.

    Of one part alone, as the gradients of a whole model take as much memory as it.
    """
    ours, theirs = list(model.projector.parameters()), list(projector.parameters())
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
