"""Videos that are too long for a sample: fewer frames, at even distances, instead of a cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

from lit_vlm.data.records import Content, Image, Record


def fit_frames(record: Record, length: Callable[[Record], int], most: int) -> Record:
    """The record with as many frames of its videos as fit.

    The largest number is taken with which the record fits when no video has more frames than that, found by halving. At
    least one frame of each video is left; then the record may still be too long.

    Args:
        record: the record.
        length: number of positions of a record.
        most: most positions.
    """
    low, high = 1, max((len(frames) for message in record.messages for frames in _videos(message.content)), default=0)
    if high < 2 or length(record) <= most:
        return record
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if length(keep_frames(record, middle)) <= most else (low, middle)
    return keep_frames(record, low)


def keep_frames(record: Record, most: int) -> Record:
    """The record with at most `most` frames of each video, at even distances, the first among them.

    Of a video with n frames, those at i (n − 1) / (`most` − 1), rounded down, are kept. A frame goes with the text
    between it and the frame in front of it.
    """
    messages = tuple(replace(message, content=tuple(_kept(message.content, most))) for message in record.messages)
    return replace(record, messages=messages)


def _kept(content: Sequence[Content], most: int) -> Iterator[Content]:
    dropped: set[int] = set()
    for frames in _videos(content):
        if len(frames) > most:
            wanted = {frames[i * (len(frames) - 1) // max(1, most - 1)] for i in range(most)}
            for before, place in pairwise(frames):
                if place not in wanted:
                    dropped.update(range(before + 1, place + 1))
    yield from (part for place, part in enumerate(content) if place not in dropped)


def _videos(content: Sequence[Content]) -> list[list[int]]:
    """Places of the frames of each video of a message."""
    found: list[list[int]] = []
    last: Image | None = None
    for place, part in enumerate(content):
        if not isinstance(part, Image):
            continue
        if part.moment is not None:
            same = last is not None and last.moment is not None and last.path == part.path and last.moment < part.moment
            found = [*found[:-1], [*found[-1], place]] if same else [*found, [place]]
        last = part
    return found
