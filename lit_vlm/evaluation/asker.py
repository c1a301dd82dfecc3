"""Prompts for a model, its answers and their likelihoods, written as the data of its training was written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import yaml
from jsonargparse import ArgumentParser

import lit_vlm.heads
import lit_vlm.teachers  # noqa: F401 - class names of configs
from lit_vlm.checkpoints.folder import find_checkpoint, run_folder
from lit_vlm.checkpoints.weights import read_slots
from lit_vlm.core.batch import IGNORE, Batch
from lit_vlm.core.bits import Kind
from lit_vlm.core.lora import merge_adapters
from lit_vlm.core.quantised import quantise_parts, round_to
from lit_vlm.core.sampling import Sampling
from lit_vlm.core.tokenizers import IncrementalText
from lit_vlm.data import ImageTransform, Template
from lit_vlm.data.records import Message, Record, Text
from lit_vlm.data.sample.collate import collate_prompts
from lit_vlm.data.sample.encode import Sample, SampleEncoder
from lit_vlm.data.sample.format import SampleFormat
from lit_vlm.data.sample.spec import InputSpec
from lit_vlm.model.build import build
from lit_vlm.model.generate import Continuation, score_continuations, stream
from lit_vlm.training.module import LitVLM

LONGEST_ANSWER = 512
"""Positions of an answer that is scored, at most, which a sample may have beyond the run's `max_length`."""
Ended = Literal["stop", "length"]
"""Why an answer ends: by a token that ends it, or as it may have no more of them."""
Form = Literal["prompt", "answer", "document"]
"""Which sample a record becomes: one that ends before the last answer, one with the answer, or text to predict."""


class Piece(NamedTuple):
    """What is new of an answer.

    Attributes:
        text: often one token's, or "" where a letter needs more of them.
        ended: why the answer ends here; None if it goes on.
        num_tokens: tokens of the answer so far.
    """

    text: str
    ended: Ended | None
    num_tokens: int


@dataclass(frozen=True)
class Asker:
    """A model with template and transform of its run. The records that it takes name their pictures by absolute paths.

    Under sharded training every rank must call the methods that run the model.

    Attributes:
        module: the LightningModule, with its model built.
        format: template, image transform and `max_length` of the run's data.
    """

    module: LitVLM
    format: SampleFormat

    @property
    def spec(self) -> InputSpec:
        """What the data side must know of the model; see `LitVLM.input_spec`."""
        return self.module.input_spec.without_teachers()

    @property
    def pad_id(self) -> int:
        """The token id at padded positions."""
        return int(self.module.input_spec.tokenizer.pad_token_id)

    def sample_encoder(self, form: Form) -> SampleEncoder:
        """An encoder of records: it refuses prompts beyond `max_length`, cuts documents, gives answers more room."""
        extra = LONGEST_ANSWER if form == "answer" else 0
        too_long: Literal["truncate", "drop"] = "truncate" if form == "document" else "drop"
        return self.format.sample_encoder(self.spec, too_long, form == "prompt", extra)

    def encode(self, records: Sequence[Record], form: Form = "prompt") -> list[Sample]:
        """Encode records as samples of a form.

        Raises:
            RecordError: with the reason why a record cannot be used.
        """
        encode = self.sample_encoder(form)
        return [encode(record, Path("/")) for record in records]

    def written(self, record: Record) -> str:
        """The prompt as text, with `<image>` for each image."""
        return self.format.prompt(record.messages, self.module.input_spec)

    def pieces(self, record: Record) -> list[str | None]:
        """The prompt as text in pieces, and None where an image stands; a typed `<image>` is text like any other."""
        return self.format.pieces(record.messages, self.module.input_spec)

    def batch(self, samples: Sequence[Sample]) -> Batch:
        """A batch of left-padded prompts on the model's device, one sample per row."""
        return collate_prompts(samples, pad_id=self.pad_id).to(self.module.device)

    def answer(
        self, samples: Sequence[Sample], max_new_tokens: int = 64, temperature: float = 0.0, top_p: float = 1.0
    ) -> list[str]:
        """The text that the model writes behind each prompt.

        Args:
            samples: in the form `prompt`.
            max_new_tokens: length of an answer at most.
            temperature: 0 takes the likeliest token; above, one is drawn.
            top_p: draw from the likeliest tokens of this share.

        Raises:
            ValueError: as `LitVLM.answer`.
        """
        with self.evaluating():
            return self.module.answer(self.batch(samples), max_new_tokens, temperature, top_p)

    def stream(self, samples: Sequence[Sample], sampling: Sequence[Sampling]) -> Iterator[list[Piece | None]]:
        """The text that the model writes behind each prompt, piece by piece; together it is that of `answer`.

        Args:
            samples: in the form `prompt`.
            sampling: how each of them is answered.

        Yields:
            after each step what is new of each answer, or None where it has ended.

        Raises:
            ValueError: as `LitVLM.answer`.
        """
        spec = self.module.input_spec
        batch = self.batch(samples)
        texts = [IncrementalText(spec.tokenizer, batch.opening.text) for _ in samples]
        sampling = [replace(one, max_new_tokens=one.max_new_tokens + batch.opening.tokens) for one in sampling]
        ended: list[Ended | None] = [None] * len(samples)
        steps = stream(self.module.vlm, batch, spec.stop_ids | batch.stop_ids, sampling)
        with self.evaluating():
            while True:
                with self.module.autocast():  # not while whoever asked has the turn
                    ids = next(steps, None)
                if ids is None:
                    return
                pieces: list[Piece | None] = []
                for row, (token, text, own) in enumerate(zip(ids[: len(samples)], texts, sampling, strict=True)):
                    if ended[row]:
                        pieces.append(None)
                        continue
                    new = "" if token is None else text.push(token)
                    if token is None or text.num_tokens == own.max_new_tokens:
                        ended[row] = "stop" if token is None else "length"
                        new += text.rest()
                    pieces.append(Piece(new, ended[row], text.num_tokens))
                yield pieces

    def likelihoods(
        self, prefixes: Sequence[Sample], continuations: Sequence[Continuation], batch_size: int
    ) -> list[tuple[float, int]]:
        """Summed negative log-likelihood in nats, and number of scored tokens, of each continuation.

        Args:
            prefixes: samples that continuations go on from, one per row.
            continuations: each names the row of its prefix.
            batch_size: continuations at a time.
        """
        with self.evaluating(), self.module.autocast():
            nll = score_continuations(self.module.vlm, self.batch(prefixes), continuations, batch_size)
        counts = [sum(label != IGNORE for label in one.labels) for one in continuations]
        return list(zip(nll, counts, strict=True))

    def score_answers(self, records: Sequence[Record]) -> tuple[list[tuple[float, int]], list[str]]:
        """The likelihood of each expected answer, and the likeliest option of each record.

        Args:
            records: each ends with the expected answer.

        Returns:
            negative log-likelihood in nats and number of tokens of each record's expected answer, and the likeliest of
            its options ("" without options).

        Raises:
            RecordError: with the reason why a record cannot be used.
        """
        answers = [list(dict.fromkeys((record.messages[-1].text, *record.options))) for record in records]
        prefixes: list[Sample] = []
        continuations: list[Continuation] = []
        for row, record in enumerate(records):
            samples = self.encode([_with_answer(record, answer) for answer in answers[row]], "answer")
            start = min(first_of_last_answer(samples[0]), *(_common(samples[0].ids, s.ids) for s in samples))
            prefixes.append(replace(samples[0], ids=samples[0].ids[:start], labels=samples[0].labels[:start]))
            continuations += [Continuation(row, s.ids[start:], s.labels[start:]) for s in samples]
        scored = iter(self.likelihoods(prefixes, continuations, 2 * len(records)))
        found = [{answer: next(scored) for answer in options} for options in answers]
        expected = [scores[record.messages[-1].text] for scores, record in zip(found, records, strict=True)]
        likeliest = [
            min((scores[option][0], option) for option in record.options)[1] if record.options else ""
            for scores, record in zip(found, records, strict=True)
        ]
        return expected, likeliest

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """A context with the model in eval mode; afterwards its mode is as before."""
        was_training = self.module.vlm.training
        self.module.vlm.eval()
        try:
            yield
        finally:
            self.module.vlm.train(was_training)


def first_of_last_answer(sample: Sample) -> int:
    """Index of the first token of the last supervised run, which is the answer that is scored."""
    start = max(index for index, label in enumerate(sample.labels) if label != IGNORE)
    while start and sample.labels[start - 1] != IGNORE:
        start -= 1
    return start


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Number of equal tokens at the start of both."""
    return next((index for index, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _with_answer(record: Record, answer: str) -> Record:
    # As an option, a blank answer is allowed; encoding refuses one that is not among the options.
    return replace(record, messages=(*record.messages[:-1], Message("assistant", (Text(answer),))), options=(answer,))


def pick_device(name: str | None = None) -> str:
    """A device by its name, or a GPU if there is one.

    Raises:
        ValueError: where this machine has no such device.
    """
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # a torch that was built without the device raises AssertionError
        raise ValueError(f"there is no device '{name}' here: {str(error).splitlines()[0]}") from error
    return name


def run_config(source: str | Path) -> dict[str, Any]:
    """The config of the run that a checkpoint, or a folder with one, belongs to.

    Raises:
        ValueError: when there is none.
    """
    text = (run_folder(find_checkpoint(source)) / "config.yaml").read_text(encoding="utf-8")
    config: dict[str, Any] = yaml.safe_load(text)
    return config


def check_run(source: str | Path) -> dict[str, Any]:
    """The config of a run that can be asked.

    Raises:
        ValueError: when there is no complete checkpoint or no config.yaml, or the stage left out the decoder.
    """
    config = run_config(source)
    if left_out := (config["model"].get("stage") or {}).get("leave_out"):
        raise ValueError(
            f"{source} is of a stage that trains without its {', '.join(left_out)} (model.stage.leave_out), so it is "
            "no whole model: name the folder of a later stage"
        )
    return config


def load_run(
    source: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    quantise: Kind | None = None,
) -> Asker:
    """Build the model of a run in eval mode, with a checkpoint's weights, and the template and transform of its data.

    Warns of marks of the template that are no tokens of the tokenizer: the model was trained on them in pieces.

    Args:
        source: a checkpoint, or the folder of a run (its newest checkpoint is taken).
        device: device that the model is put on.
        dtype: type of the weights; `precision.choose(...).dtype` is the one that the device is fast in.
        quantise: type of 4 or 8 bits in which the linear layers of all blocks are stored, once adapters are merged.

    Raises:
        ValueError: as `check_run` and `quantise_parts`.
    """
    config = check_run(source)
    checkpoint = find_checkpoint(source)
    parser = ArgumentParser(parser_mode="omegaconf")
    parser.add_class_arguments(LitVLM, "model")
    parser.add_argument("--template", type=Template)
    parser.add_argument("--transform", type=ImageTransform)
    data = config["data"]
    wanted: dict[str, Any] = {"model": config["model"], "template": data["template"], "transform": data["transform"]}
    objects = parser.instantiate_classes(parser.parse_object(wanted))
    module = objects.model
    assert isinstance(module, LitVLM)
    module.model = build(module.slots, read_slots(checkpoint), origin=str(checkpoint))
    for slot, kind in module.slots.quantize.kinds().items():  # the weights that it was trained on
        round_to(module.model.slots()[slot][0], kind, slot)
    if quantise is not None:
        merge_adapters(module.model)
        quantise_parts({slot: parts[0] for slot, parts in module.model.slots().items()}, quantise, "--quantise")
    module.to(device=device, dtype=dtype).eval()
    written = SampleFormat(objects.template, objects.transform, data["max_length"], data.get("fast_jpeg", True))
    written.check_marks(module.input_spec, "warn")
    return Asker(module, written)
