"""`python -m tests.benchmarks.opened [RUN ...]`: what transformers makes of exported models, for docs/export.md.

Each recipe at tiny size, and the runs that are named, in the formats that transformers opens: whether a folder loads,
and whether it gives the kit's logits, greedy text, answers in a padded batch, and logits after a step of training.
"""

from __future__ import annotations

import copy
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image as PILImage
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging
from transformers.utils.logging import disable_progress_bar

from lit_vlm.checkpoints.published import export_published
from lit_vlm.checkpoints.published.layout import TOLERANCE, difference_of
from lit_vlm.commands.named_runs import name_checkpoint
from lit_vlm.data.records import Image, Message, Record, Text
from lit_vlm.data.sample.collate import collate, collate_prompts
from lit_vlm.data.sample.encode import Sample
from lit_vlm.data.sample.format import SampleFormat
from lit_vlm.data.sample.spec import InputSpec
from lit_vlm.evaluation.asker import load_run, run_config
from lit_vlm.hf.compare import stop_ids
from lit_vlm.hf.export import export_hf
from lit_vlm.model.generate import generate
from lit_vlm.model.vlm import VLM
from tests.exports import TINY, read

FORMATS = ("hf", "llava-hf")
COLUMNS = ("loads", "logits", "greedy text", "batch", "train step")
NEW_TOKENS = 16
RATE = 0.01
"""Learning rate of the step, plain gradient descent on all weights."""


@dataclass(frozen=True)
class Exported:
    """A model as the kit has it, and what an export needs beside it."""

    name: str
    vlm: VLM
    config: Mapping[str, Any]
    written: SampleFormat
    spec: InputSpec


def of_recipe(recipe: str) -> Exported:
    """A recipe at tiny size, with random weights."""
    module, config, written = read(recipe)
    return Exported(recipe, module.vlm, config, written, module.input_spec)


def of_run(run: str) -> Exported:
    """A trained run."""
    checkpoint = name_checkpoint(run)
    asker = load_run(checkpoint, "cpu", torch.float32)
    return Exported(run, asker.module.vlm, run_config(checkpoint), asker.format, asker.module.input_spec)


def outcome(model: Exported, family: str) -> list[str]:
    """The cells of a model in a format."""
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = Path(scratch) / "out"
        try:
            if family == "hf":
                export_hf(model.vlm, model.config, model.written, model.spec, out)
            else:
                export_published(family, model.vlm, out, model.written)
        except ValueError:
            return ["refused"] + [""] * (len(COLUMNS) - 1)
        loaded = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32, trust_remote_code=True).eval()
        processor = AutoProcessor.from_pretrained(out, trust_remote_code=True)
        samples, chats = asked(model, Path(scratch))
        alone = [_inputs(processor, [chat]) for chat in chats]
        together = _inputs(processor, chats)
        logits = max(_logits(model, loaded, one, inputs) for one, inputs in zip(samples, alone, strict=True))
        answers = [_answer(model, one) for one in samples]
        single = [_generated(loaded, inputs)[0] for inputs in alone]
        return [
            "yes",
            _difference(logits),
            _same(model, answers, single),
            _same(model, answers, _generated(loaded, together)),
            _difference(_after_a_step(model, loaded, samples[0], alone[0])),
        ]


def asked(model: Exported, folder: Path) -> tuple[list[Sample], list[Any]]:
    """Prompts with a picture, with two, and without, as the kit encodes them and as chats of transformers.

    Pictures have the encoder's own size where it has one: resizing is not what is compared.
    """
    side = getattr(getattr(model.vlm.encoder, "pixels", None), "size", None) or 32
    drawn = torch.randint(0, 256, (2, side, side, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    pictures = {name: PILImage.fromarray(one.numpy()) for name, one in zip("ab", drawn, strict=True)}
    for name, picture in pictures.items():
        picture.save(folder / f"{name}.png")
    encode = model.written.sample_encoder(model.spec, prompt=True)
    samples, chats = [], []
    for text, shown in (("What is in the picture?", "a"), ("What differs?", "ab"), ("What is a cube?", "")):
        message = Message("user", (*(Image(path=f"{name}.png") for name in shown), Text(text)))
        samples.append(encode(Record("asked", "asked", (message,)), folder))
        content = [{"type": "image", "image": pictures[name]} for name in shown]
        chats.append([{"role": "user", "content": [*content, {"type": "text", "text": text}]}])
    return samples, chats


def _inputs(processor: Any, chats: Sequence[Any]) -> Any:
    if hasattr(processor, "tokenizer"):
        processor.tokenizer.padding_side = "left"
    return processor.apply_chat_template(
        chats, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt", padding=True
    )


def _logits(model: Exported, loaded: Any, sample: Sample, inputs: Any) -> float:
    with torch.no_grad():
        ours = model.vlm.logits(collate([sample], pad_id=_pad(model)))
        theirs = loaded(**inputs).logits
    return difference_of(theirs[..., : ours.shape[-1]], ours)


def _answer(model: Exported, sample: Sample) -> list[int]:
    prompts = collate_prompts([sample], pad_id=_pad(model))
    return generate(model.vlm, prompts, stop_ids(model.written, model.spec), NEW_TOKENS)[0]


def _generated(loaded: Any, inputs: Any) -> list[list[int]]:
    found = loaded.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    return [row.tolist() for row in found[:, inputs["input_ids"].shape[1] :]]


def _after_a_step(model: Exported, loaded: Any, sample: Sample, inputs: Any) -> float:
    """The difference of logits after both have taken a step on a prompt's text."""
    vlm = copy.deepcopy(model.vlm)
    batch = collate([sample], pad_id=_pad(model))
    labels = torch.tensor([sample.ids])
    for start, grid in zip(sample.image_starts, sample.grids, strict=True):
        labels[0, start : start + grid.num_tokens] = -100

    def own() -> Tensor:
        return F.cross_entropy(vlm.logits(batch)[0, :-1].float(), labels[0, 1:])

    for module, loss in ((vlm, own), (loaded, lambda: loaded(**inputs, labels=labels).loss)):
        module.requires_grad_(True)
        optimizer = torch.optim.SGD(module.parameters(), RATE)
        loss().backward()
        optimizer.step()
    with torch.no_grad():
        ours, theirs = vlm.logits(batch), loaded(**inputs).logits
    return difference_of(theirs[..., : ours.shape[-1]], ours)


def _pad(model: Exported) -> int:
    return int(model.spec.tokenizer.pad_token_id)


def _difference(value: float) -> str:
    return "equal" if value <= TOLERANCE else f"to {value:.0e}"


def _same(model: Exported, expected: Sequence[Sequence[int]], found: Sequence[Sequence[int]]) -> str:
    """Where the kit ends an answer, transformers writes the id that ends it."""
    stops = stop_ids(model.written, model.spec)
    same = all(
        b[: len(a)] == list(a) and (len(a) == NEW_TOKENS or b[len(a)] in stops)
        for a, b in zip(expected, found, strict=True)
    )
    return "equal" if same else "differs"


def main(runs: Sequence[str]) -> None:
    """Print the table: the recipes' tiny models, then the runs."""
    logging.set_verbosity_error()
    disable_progress_bar()
    show = Console(width=200, highlight=False).print
    show("| model | format | " + " | ".join(COLUMNS) + " |")
    show("|---" * (len(COLUMNS) + 2) + "|")
    for name in (*TINY, *runs):
        for family in FORMATS:
            model = of_run(name) if name in runs else of_recipe(name)
            show(f"| {name} | `{family}` | " + " | ".join(outcome(model, family)) + " |")


if __name__ == "__main__":
    main(sys.argv[1:])
