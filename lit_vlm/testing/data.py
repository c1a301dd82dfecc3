"""Contract tests of sources, templates and transforms."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image as PILImage

from lit_vlm.core.batch import PixelSpec
from lit_vlm.data import ImageTransform, Source, Template
from lit_vlm.data.records import Image, Message, Record, RecordError, Text
from lit_vlm.data.sample.templates import Piece, Span
from lit_vlm.testing.rules import broken, pickled

EOS = "</s>"
MARK = "\0"
PIXELS = (PixelSpec(28, 7, (0.5, 0.5, 0.5)), PixelSpec(None, 7, (0.5, 0.5, 0.5)))
PICTURES = ((40, 30), (30, 40), (28, 28), (3, 100), (500, 20), (1, 1))


def check_source(factory: Callable[[], Source], most: int = 50) -> None:
    """Check the rules of a source.

    Args:
        factory: makes a source that holds at least a few records; it is called twice.
        most: number of records that are read, at most.

    Raises:
        AssertionError: naming the rule that the source breaks.
    """
    source = factory()
    if not len(source):
        broken(source, "has no record", "Give the contract test a source with a few")
    if not (isinstance(source.name, str) and source.name):
        broken(source, f"name is {source.name!r}", "Samples, counts and losses are reported under it")
    read = [_read(source, index) for index in range(min(most, len(source)))]
    if not any(isinstance(record, Record) for record in read):
        broken(source, f"none of its first {len(read)} records can be used: {read[0]}", "Some records are good")
    copy, again = pickled(source, "the source", source), factory()
    for index in reversed(range(len(read))):  # backwards, as a shuffled epoch reads in any order
        if any(_read(other, index) != read[index] for other in (source, copy, again)):
            broken(source, f"record {index} is not always the same", "A record depends on its index alone")
        outline = _read(source, index, outline=True)
        both = isinstance(outline, Record) and isinstance(read[index], Record)  # pictures alone may make it unusable
        if both and _texts(outline) != _texts(read[index]):
            broken(source, f"outline({index}) has another text than record({index})", "It leaves out pictures alone")
    if not isinstance(source.fingerprint(), str) or source.fingerprint() != again.fingerprint():
        broken(source, "two alike have different fingerprints", "It is a hash of the content")
    order, same = (source.shuffled(np.random.default_rng(1)).tolist() for _ in range(2))
    if order != same or sorted(order) != list(range(len(source))):
        broken(source, "shuffled() is no order of all indices that its generator decides", "Resumed runs go on in it")


def _read(source: Source, index: int, outline: bool = False) -> Record | str:
    try:
        record = source.outline(index) if outline else source.record(index)
    except RecordError as error:
        return str(error)
    if not isinstance(record, Record) or not record.messages:
        broken(source, f"record({index}) is {record!r:.80}", "Raise RecordError for one that cannot be used")
    return record


def _texts(record: Record | str) -> list[str]:
    return [message.text for message in record.messages] if isinstance(record, Record) else []


def check_template(factory: Callable[[], Template], turns: int = 2) -> None:
    """Check the rules of a template.

    Args:
        factory: makes the template.
        turns: number of questions in the longest conversation that it takes.

    Raises:
        AssertionError: naming the rule that the template breaks.
    """
    template = factory()
    pickled(template, "the template", template)
    talk = [Message("user", (Image("a.png"), Text("Why?"))), Message("assistant", (Text("So."),))]
    longer = [*talk, *[Message("user", (Text("And?"),)), Message("assistant", (Text("That is all."),))] * (turns - 1)]
    for messages in (talk, longer, [Message("user", (Text("Hm"),)), talk[1]]):
        pieces = template.render(messages, EOS)
        whole, prompt = _written(pieces), _written(template.prompt(messages, EOS))
        answers = [message.text for message in messages if message.role == "assistant"]
        taught = "".join(piece.text for piece in pieces if isinstance(piece, Span) and piece.supervised)
        if any(answer not in taught for answer in answers):
            broken(template, f"of {answers} only {taught!r} is supervised", "Answers carry a loss")
        if "Why?" in taught or "And?" in taught or "Hm" in taught:
            broken(template, f"a question is supervised: {taught!r}", "Questions carry no loss")
        if not whole.startswith(prompt) or answers[-1] not in whole.removeprefix(prompt):
            broken(template, f"prompt {prompt!r} is not what stands before the answer in {whole!r}",
                   "A model is asked with what it was taught after")  # fmt: skip
        if not taught.endswith(template.closing(EOS)):
            broken(
                template, f"closing() {template.closing(EOS)!r} does not end {taught!r}", "It is what ends an answer"
            )
        if whole.count(MARK) != sum(isinstance(part, Image) for message in messages for part in message.content):
            broken(template, "a picture is lost or doubled", "Each image stands once")
    silent = [Message("user", (Text("Why?"),)), Message("assistant", (Text("So.", loss=False),))]
    if any(isinstance(piece, Span) and piece.supervised for piece in template.render(silent, EOS)):
        broken(template, "an answer without loss is supervised in part", "Text.loss decides, its closing mark too")
    _refuses(template, lambda: template.render([talk[1], talk[0]], EOS), "an answer in front of its question")
    _refuses(template, lambda: template.prompt([], EOS), "a prompt of nothing")


def _refuses(template: Template, action: Callable[[], object], what: str) -> None:
    try:
        action()
    except RecordError:
        return
    broken(template, f"accepts {what}", "What it cannot write is a RecordError, which drops the sample")


def _written(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text if isinstance(piece, Span) else MARK for piece in pieces)


def check_transform(
    factory: Callable[[], ImageTransform],
    pixels: Sequence[PixelSpec] = PIXELS,
    pictures: Sequence[tuple[int, int]] = PICTURES,
) -> None:
    """Check the rules of an image transform.

    Args:
        factory: makes the transform.
        pixels: pixel formats of encoders. The transform may refuse some with a ValueError, but not all.
        pictures: (width, height) of pictures, in pixels.

    Raises:
        AssertionError: naming the rule that the transform breaks.
    """
    transform = factory()
    pickled(transform, "the transform", transform)
    taken = [spec for spec in pixels if _takes(transform, spec)]
    if not taken:
        broken(transform, f"refuses all of {list(pixels)}", "Give the contract test what it is made for")
    for spec in taken:
        made = {size: _resized(transform, size, spec) for size in pictures}
        if transform.fixed(spec) and len(set(made.values())) > 1:
            broken(transform, f"fixed() for {spec} and gives {sorted(set(made.values()))}", "fixed is one size for all")


def _takes(transform: ImageTransform, pixels: PixelSpec) -> bool:
    try:
        transform.size((40, 30), pixels)
    except ValueError:
        return False
    return True


def _resized(transform: ImageTransform, size: tuple[int, int], pixels: PixelSpec) -> tuple[int, int]:
    width, height = size
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    picture = PILImage.fromarray(noise)
    found, again = transform(picture, pixels), transform(picture, pixels)
    if found.dtype != torch.uint8 or found.ndim != 3 or found.shape[0] != 3:
        broken(
            transform, f"gives {found.dtype} {tuple(found.shape)}", "Pixels are uint8 `[3, h, w]`; encoders normalise"
        )
    if not torch.equal(found, again):
        broken(transform, "gives two results of one picture", "Prepared features and resumed runs need the same pixels")
    promised, own = transform.size(size, pixels), (found.shape[2], found.shape[1])
    if own != promised:
        broken(transform, f"makes {own} of {size} and size() says {promised}", "Lengths are planned with size()")
    if any(side % pixels.multiple for side in own):
        broken(transform, f"makes {own} for {pixels}", "Sides are multiples of what the encoder wants")
    if pixels.size and (own[0] != pixels.size or own[1] % pixels.size):
        broken(transform, f"makes {own} for {pixels}", "Encoders of one size take their square, or a column of tiles")
    tiling = transform.tiling(size)
    if tiling and own[0] * own[0] * (1 + tiling.rows * tiling.cols) != own[0] * own[1]:
        broken(transform, f"makes {own} of {size} and tiling() says {tiling}", "It counts the tiles behind the copy")
    if not transform.scale(size, pixels) > 0:
        broken(transform, f"scale({size}) is {transform.scale(size, pixels)}", "It is result over original")
    return own
