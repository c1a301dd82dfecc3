"""Captions for the pictures of a source, block by block, as a new set.

A block is answered in batches that begin with it, so its captions do not depend on who else works. The source's own
texts are kept in `Record.earlier`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch.utils.data import DataLoader, Dataset

from lit_vlm.core.batch import BadSample
from lit_vlm.core.sampling import Sampling
from lit_vlm.data.records import Image, Message, Record, RecordError, Text
from lit_vlm.data.records.json_files import read_info
from lit_vlm.data.records.media import MARK, refuse_marks
from lit_vlm.data.sets.convert import check_limits, finish_set, refuse_inside
from lit_vlm.data.sets.engine import HERE, Engine, paths_of
from lit_vlm.data.sets.parallel import Block, blocks_of
from lit_vlm.data.sets.shards import claim
from lit_vlm.data.sets.shared import finish_once, run_models
from lit_vlm.data.sets.writer import BlockWriter, Encoded, verified
from lit_vlm.data.sources import Source
from lit_vlm.data.sources.base import describe
from lit_vlm.data.sources.converted import INFO, VERSION, SetInfo
from lit_vlm.evaluation.captioning.captioner import Captioner, Inputs
from lit_vlm.evaluation.captioning.checks import Checks
from lit_vlm.evaluation.captioning.models import CaptionModel

BLOCK = 1024
"""Most records of a block: what a process that is killed loses."""
BLOCKS_WANTED = 256
"""Number of blocks of a source that is neither small nor large: enough for many devices to share evenly."""
PROMPT = "Describe the image."


@dataclass(frozen=True)
class CaptionSettings:
    """How captions are asked for.

    Attributes:
        prompts: questions, of which each picture is asked one, drawn by the seed.
        max_tokens: length of a caption at most; one that goes on is bad.
        temperature: 0 takes the likeliest token; above, one is drawn.
        top_p: draw from the likeliest tokens of this share.
        seed: another one draws other prompts and tokens.
        batch_size: pictures at a time.
        min_side: an image with a shorter side in pixels cannot be used.

    Raises:
        ValueError: for a number out of range, or a prompt that is empty or has a mark of a picture.
    """

    prompts: tuple[str, ...] = (PROMPT,)
    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    batch_size: int = 16
    min_side: int = 4

    def __post_init__(self) -> None:
        for name in ("max_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.temperature <= 2 or not 0 < self.top_p <= 1:
            raise ValueError(
                "--temperature must be from 0 to 2 and --top-p above 0 and at most 1, not "
                f"{self.temperature:g} and {self.top_p:g}"
            )
        for prompt in self.prompts:
            if not prompt.strip() or MARK in prompt:
                raise ValueError(f"--prompt {prompt!r}: it needs words, and no {MARK}: the picture stands before it")


class _Question(NamedTuple):
    """A picture with what is asked of it: the user's turn, with the old text, the encoded picture, how it is asked."""

    record: Record
    image: Encoded
    sampling: Sampling


class _Asked(NamedTuple):
    """Records of one step: questions and what cannot be asked, in order, and the model's inputs, batch by batch."""

    questions: list[_Question | BadSample]
    batches: list[Any]


class _Questions(Dataset[_Asked]):
    """The questions of one block, `batch_size` records at a time, made in loader processes."""

    def __init__(self, source: Source, block: Block, inputs: Inputs, settings: CaptionSettings) -> None:
        self.source, self.block, self.inputs, self.settings = source, block, inputs, settings

    def __len__(self) -> int:
        return -(-(self.block.end - self.block.start) // self.settings.batch_size)

    def __getitem__(self, step: int) -> _Asked:
        size = self.settings.batch_size
        first = self.block.start + step * size
        questions: list[_Question | BadSample] = []
        made: list[Any] = []
        for index in range(first, min(first + size, self.block.end)):
            for question, one in self._of(index):
                questions.append(question)
                if not isinstance(question, BadSample):
                    made.append(one)
        # A record with several pictures may make more of them than one batch takes.
        return _Asked(questions, [self.inputs.join(made[at : at + size]) for at in range(0, len(made), size)])

    def _of(self, index: int) -> Iterator[tuple[_Question | BadSample, Any]]:
        """Yield the pictures of a record, each with the model's input, or with None where it cannot be asked."""
        identity = str(index)
        try:
            record = self.source.record(index)
            identity = record.id
            if not record.images:
                raise RecordError("no_image", "there is nothing to caption")
        except RecordError as error:
            yield BadSample(identity, self.source.name, error.reason, error.detail), None
            return
        for number, image in enumerate(record.images):
            own = record.id if len(record.images) == 1 else f"{record.id}/{number}"
            try:
                question = self._question(record, own, image, random.Random(f"{self.settings.seed}-{index}-{number}"))
                yield question, self.inputs.one(question.record)
            except RecordError as error:
                yield BadSample(own, self.source.name, error.reason, error.detail), None

    def _question(self, record: Record, own: str, image: Image, chance: random.Random) -> _Question:
        if image.moment is not None:
            raise RecordError("video_frame", "it is a frame of a video; captions are of pictures")
        content, picture = verified(image, self.source.image_folder, self.settings.min_side)
        prompt = Text(f"\n{chance.choice(self.settings.prompts)}")
        turn = Message("user", (Image(data=content, size=picture.size), prompt))
        old = (replace(one, content=tuple(p for p in one.content if isinstance(p, Text))) for one in record.messages)
        earlier = (*record.earlier, *(one for one in old if one.content))
        settings = self.settings
        sampling = Sampling(settings.max_tokens, settings.temperature, settings.top_p, chance.getrandbits(62))
        asked = Record(own, self.source.name, (turn,), urls=record.urls, earlier=earlier)
        return _Question(asked, (content, picture.size), sampling)


@dataclass
class CaptionBlock:
    """Writes captions for one block of records into a folder of its own; the model is loaded for the first one.

    Attributes:
        source: source of the pictures.
        model: writes the captions.
        settings: how they are asked for.
        checks: what makes a caption unusable.
        device: device of the model.
        workers: loader processes.
    """

    source: Source
    model: CaptionModel
    settings: CaptionSettings
    checks: Checks
    device: str = "cpu"
    workers: int = 0
    _loaded: Captioner | None = field(default=None, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_loaded": None}

    def on(self, device: str) -> CaptionBlock:
        """The same work with its model on a device (`shared.OpenWork`)."""
        return replace(self, device=device)

    def __call__(self, block: Block, folder: Path) -> dict[str, Any]:
        """Caption a block.

        Returns:
            counts, hash and bad records of the block.

        Raises:
            ValueError: as `CaptionModel.load`, and where a batch does not fit into the device's memory.
        """
        if self._loaded is None:
            self._loaded = self.model.load(self.device)
        writer = BlockWriter(folder, self.source)
        bad: list[BadSample] = []
        questions = _Questions(self.source, block, self._loaded.inputs, self.settings)
        for asked in DataLoader(questions, batch_size=None, num_workers=min(self.workers, len(questions))):
            texts = self._write(self._loaded, asked)
            for question in asked.questions:
                if isinstance(question, BadSample):
                    bad.append(question)
                    continue
                try:
                    record = self._captioned(question.record, *next(texts))
                    writer.add(record, [question.image])
                except RecordError as error:
                    bad.append(BadSample(question.record.id, self.source.name, error.reason, error.detail))
        return writer.finish(bad)

    def _write(self, captioner: Captioner, asked: _Asked) -> Iterator[tuple[str, bool]]:
        """Yield each caption, and whether it was cut."""
        sampling = [one.sampling for one in asked.questions if isinstance(one, _Question)]
        size = self.settings.batch_size
        for at, batch in enumerate(asked.batches):
            try:
                yield from captioner.write(batch, sampling[at * size : (at + 1) * size])
            except torch.OutOfMemoryError as error:
                raise ValueError(
                    f"{size} pictures at a time with up to {self.settings.max_tokens} tokens do not fit into the "
                    f"memory of {self.device}: take a smaller --batch-size, in another folder"
                ) from error

    def _captioned(self, question: Record, text: str, cut: bool) -> Record:
        """The record with a caption as its answer; raises `RecordError` for one that is unusable."""
        self.checks.check(text, cut)
        return refuse_marks(replace(question, messages=(*question.messages, Message("assistant", (Text(text),)))))


def caption(
    work: CaptionBlock,
    out: Path,
    max_bad_share: float = 0.05,
    engine: Engine = HERE,
) -> SetInfo:
    """Write a set with new captions, alone or together with other tasks; one that was stopped goes on where it was.

    The set is the same, byte for byte, whoever did which block, on devices of one kind.

    Args:
        work: does one block.
        out: folder of the new set.
        max_bad_share: largest share of pictures and records without a usable caption, 0 to 1.
        engine: starts the workers: one for each device, with a model of its own.

    Returns:
        what `lit_vlm.json` of the set says.

    Raises:
        TooManyBad: when more than `max_bad_share` have no usable caption; finished blocks stay, so a larger share goes
            on there.
        ValueError: for a source without pictures, when `out` holds something else or lies inside the source, and as
            `CaptionBlock`.
    """
    source, settings = work.source, work.settings
    check_limits(max_bad_share, settings.min_side)
    _check(source, out)
    said = _provenance(work)
    decisive = said | {"model": work.model.identity()}
    plan = {
        "version": VERSION,
        "source": source.fingerprint(),
        "records": len(source),
        "reader": describe(source),
        "captions": {key: decisive[key] for key in ("model", "prompts", "decoding", "checks", "min_side")},
    }
    wanted = min(BLOCK, -(-len(source) // BLOCKS_WANTED))
    size = claim(out, plan, -(-wanted // settings.batch_size) * settings.batch_size)
    blocks = blocks_of(len(source), size)
    if not (out / INFO).is_file():
        run_models(blocks, work.on, out, f"captioning {source.name}", engine, paths_of(source))
    captions = {**said, "model": {"name": work.model.name, **decisive["model"]}}
    finish_once(out, INFO, lambda: finish_set(source, out, blocks, max_bad_share, captions=captions))
    return read_info(out / INFO, SetInfo, VERSION)


def _check(source: Source, out: Path) -> None:
    refuse_inside(out, source)
    if not any(_has_image(source, index) for index in range(len(source))):
        raise ValueError(f"{source.name} has {len(source)} records and no picture in them: there is nothing to caption")


def _has_image(source: Source, index: int) -> bool:
    with suppress(RecordError):
        return bool(source.outline(index).images)
    return False


def _provenance(work: CaptionBlock) -> dict[str, Any]:
    """What wrote the captions, for `SetInfo.captions`; all but the model."""
    settings = work.settings
    kept = dict(work.source.captions or {})
    return {
        "prompts": list(settings.prompts),
        "decoding": {
            key: getattr(settings, key) for key in ("max_tokens", "temperature", "top_p", "seed", "batch_size")
        },
        "checks": asdict(work.checks) | {"refuse": list(work.checks.refuse)},
        "min_side": settings.min_side,
        "libraries": {"torch": torch.__version__, "transformers": transformers.__version__},
    } | ({"earlier": kept} if kept else {})
