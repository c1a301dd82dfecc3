"""Held-out records that can be asked, and the control in which each has the pictures of another record."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch.distributed as dist

from lit_vlm.data.records import Content, Image, Message, Record, RecordError
from lit_vlm.data.sample.encode import SampleEncoder
from lit_vlm.data.sources import Source
from lit_vlm.evaluation.asker import Asker, first_of_last_answer

log = logging.getLogger(__name__)

NONE_HELD_OUT = "there is no usable one: --data.held_out 0.1 keeps a tenth of data.train, or name --data.val FILE"
"""What is wrong, and the way out, where questions of `data.val` are wanted."""


def held_out_records(asker: Asker, sources: Sequence[Source], limit: int | None = None) -> list[Record]:
    """The usable records of held-out sources that end with an answer: all, or `limit` spread evenly over them.

    Each source has a share by its size, and at least one record where the limit allows. Records that cannot be used
    are left out, and a warning counts them by reason.
    """
    # A record that is too long is left out: it would lose its last answer, which is the one that is scored.
    encode = _whole(asker)
    total = sum(len(source) for source in sources)
    # An odd stride meets all kinds of questions where two kinds take turns.
    stride = max(1, total // limit) | 1 if limit else 1
    places = _places(sources, stride) if limit else [(s, index) for s in sources for index in range(len(s))]
    left_out: Counter[str] = Counter()

    def readable() -> Iterator[Record]:
        for source, index in places:
            try:
                record = source.record(index)
            except RecordError as error:
                left_out[error.reason] += 1
                continue
            if record.messages[-1].role == "assistant":
                # Paths are made absolute, as records of several sources are scored together.
                absolute = absolute_paths(record, source.image_folder)
                if reason := _why_not(encode, absolute):
                    left_out[reason] += 1
                else:
                    yield absolute

    found = list(islice(readable(), limit))
    _tell(left_out)
    return found


def _places(sources: Sequence[Source], stride: int) -> list[tuple[Source, int]]:
    """All records, in an order of which any beginning holds the same share of each source, and its first record."""
    ranked = []
    for source in sources:
        order = [index for first in range(stride) for index in range(first, len(source), stride)]
        ranked += [(rank / len(order), source, index) for rank, index in enumerate(order)]
    return [(source, index) for _, source, index in sorted(ranked, key=lambda place: place[0])]


def _whole(asker: Asker) -> SampleEncoder:
    """The encoder of training, which writes a question with its answer within `max_length`."""
    return asker.format.sample_encoder(asker.spec)


def _why_not(encode: SampleEncoder, record: Record) -> str:
    """Why a record cannot be asked; "" if it can."""
    try:
        return "" if first_of_last_answer(encode(record, Path("/"))) > 0 else "nothing_asked"
    except RecordError as error:
        return error.reason


def _tell(left_out: Counter[str]) -> None:
    """Warn on the first rank of records that were left out, by reason."""
    if left_out and not (dist.is_initialized() and dist.get_rank()):
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.most_common())
        log.warning("%d of the held-out records looked at are left out: %s", left_out.total(), reasons)


def absolute_paths(record: Record, folder: Path) -> Record:
    """A record whose pictures, which are found from a folder, are named by absolute paths."""

    def absolute(part: Content) -> Content:
        if isinstance(part, Image) and part.path:
            return replace(part, path=str((folder / part.path).resolve()))
        return part

    messages = tuple(
        replace(message, content=tuple(absolute(part) for part in message.content)) for message in record.messages
    )
    return replace(record, messages=messages)


def shuffle_images(asker: Asker, records: Sequence[Record]) -> list[Record]:
    """The records with the pictures of other records: a score on them shows what can be answered without seeing.

    Each record gets the pictures of the record half a list away, so that neighbours with the same picture do not get it
    back. A question that is too long with a larger picture is left out, with a warning.
    """
    encode = _whole(asker)
    pool = [record.images for record in records]
    shift = len(records) // 2
    shuffled = []
    left_out: Counter[str] = Counter()
    for index, record in enumerate(records):
        others = [
            images for images in pool[index + shift :] + pool[: index + shift] if len(images) == len(record.images)
        ]
        images = iter(others[0])
        messages = tuple(
            Message(m.role, tuple(next(images) if isinstance(part, Image) else part for part in m.content))
            for m in record.messages
        )
        other = replace(record, messages=messages)
        # Only pictures that may differ in size can make a record too long.
        if not asker.format.transform.fixed(asker.spec.pixels) and (reason := _why_not(encode, other)):
            left_out[reason] += 1
        else:
            shuffled.append(other)
    _tell(left_out)
    return shuffled
