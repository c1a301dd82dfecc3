"""Conversations about videos, which are read as some of their frames: pictures like any other."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from lit_vlm.data.records import Image, Record, RecordError
from lit_vlm.data.records.media import IMAGE_KEYS, MARK, image_of, is_nothing
from lit_vlm.data.records.pictures import image_file
from lit_vlm.data.records.videos import film_module
from lit_vlm.data.sources.conversations import ImagePosition, LlavaJson, llava_record, with_system

if TYPE_CHECKING:
    from lit_vlm.data.records.film import Header

VIDEO_MARK = "<video>"
VIDEO_MARKS = re.compile(r"(?:<image>|<video>)\n|\n?(?:<image>|<video>)")
"""Marks of a video in a question, with the line break beside it."""
FIELDS = {"seconds": 61.5, "clock": "1:01"}
"""What `frame_text` may name, with values to try it with."""


class LlavaVideo(LlavaJson):
    """LLaVA's form with videos: `{id, video, conversations}`, as LLaVA-Video-178K and VILA-1.5's sets have it.

    A video is read as some of its frames, in front of the first question, wherever its mark stands there: one `<image>`
    or `<video>`, or none. Rows of Video-ChatGPT, `{video_id, q, a}`, are read too, with `VIDEO_ID.mp4`. Rows without a
    video are read as `LlavaJson` reads them. Needs the extra `video`.

    Which frames: of N, frame ⌊i (N − 2) / (`frames` − 1)⌋ for i = 0, 1, ..., at even distances over the whole video
    (VILA v1.5, `llava/mm_utils.py`); all N where there are no more. With `fps`, those at 0, 1 / `fps`, 2 / `fps` ...
    seconds, as long as they are at most `frames`. N is what the header counts; distances are distances in time.

    Args:
        path: the .json or .jsonl file, or a folder of .jsonl files.
        image_folder: what paths of videos and images are relative to; default: the folder of the file.
        image_position: of rows with images; see `LlavaJson`.
        system: system text of conversations that have none; "" for none at all; default: the template's.
        name: name of the source; default: that of the file.
        allow_links: whether files may be links that leave the image folder.
        ignore_keys: keys that are removed from the rows, and from the turns and parts in them, before they are read:
            for keys that look like a picture, a film or a sound and are none.
        frames: most frames of a video.
        fps: frames per second; default: `frames` of every video, however long it is.
        frame_text: how a frame is written: `<image>` once, and around it any text, in which `{seconds}` is the time of
            the frame in seconds (`{seconds:.1f}` with one decimal) and `{clock}` the same as minutes:seconds.

    Raises:
        ValueError: for a path that does not exist or holds no such file, fewer frames than 1, an `fps` that is not
            above 0, a `frame_text` without `<image>` or with other fields, and when PyAV is not installed.
    """

    def __init__(
        self,
        path: str,
        image_folder: str | None = None,
        image_position: ImagePosition = "front",
        system: str | None = None,
        name: str | None = None,
        allow_links: bool = False,
        ignore_keys: list[str] | None = None,
        frames: int = 8,
        fps: float | None = None,
        frame_text: str = "<image>\n",
    ) -> None:
        super().__init__(path, image_folder, image_position, system, name, allow_links, ignore_keys)
        if frames < 1 or (fps is not None and not (fps > 0 and math.isfinite(fps))):
            raise ValueError(f"LlavaVideo: frames is at least 1 and fps above 0, not {frames} and {fps}")
        self.frames, self.fps, self.frame_text = frames, fps, frame_text
        check_frame_text(frame_text)
        film_module()  # a package that is not installed is said before any sample is

    def record(self, index: int) -> Record:
        """The record of one entry; of its video the header is read.

        Raises:
            RecordError: as `LlavaJson.record`; for a row with several videos, or a video and images; `image_count` for
                marks that are no place for one video; and as `film.read_header`.
        """
        raw = self.json(index)
        row = as_conversation(raw) if isinstance(raw, dict) else None
        if row is None:
            return super().record(index)
        video = video_of(row, index, self.allow_links)
        images = self._frames_of(video)
        texts = [frame_words(self.frame_text, image.moment or 0.0) for image in images]
        turns = with_frames(row, index, "".join(texts))
        kept = {key: value for key, value in row.items() if key not in ("video", *IMAGE_KEYS)}
        record = llava_record(kept | {"conversations": turns}, self.name, index, images, "in_place")
        return with_system(record, self.system)

    def fingerprint(self) -> str:
        """A hash of the annotations and of which frames are taken, 16 hex digits."""
        made = (self.frames, self.fps, self.frame_text)
        return hashlib.sha256(f"{super().fingerprint()} {made}".encode()).hexdigest()[:16]

    def _texts(self) -> Iterator[str]:
        for text in super()._texts():
            yield text
            yield f"{text}.mp4"  # Video-ChatGPT names videos without their ending

    def _frames_of(self, video: Image) -> list[Image]:
        header = film_module().read_header(image_file(video, self.image_folder))
        return [replace(video, moment=moment) for moment in moments(header, self.frames, self.fps)]


def check_frame_text(text: str) -> None:
    """Check how frames are written.

    Raises:
        ValueError: naming what it lacks, or the field that it may not have.
    """
    try:
        written = text.format(**FIELDS)
    except (ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        raise ValueError(
            f"frame_text is {text!r}: {type(error).__name__} {error}; it may hold {{seconds}}, {{seconds:.1f}} and "
            "{clock}"
        ) from error
    if written.count(MARK) != 1 or VIDEO_MARK in written:
        raise ValueError(f"frame_text is {text!r}; it holds {MARK} once, as in '[{{clock}}] {MARK}\\n'")


def frame_words(text: str, moment: float) -> str:
    """How the frame at a moment, in seconds, is written."""
    return text.format(seconds=moment, clock=f"{int(moment) // 60}:{int(moment) % 60:02}")


def moments(header: Header, frames: int, fps: float | None) -> list[float]:
    """The moments of a video's frames, in seconds from its first one, ascending.

    Args:
        header: what the header of the video says.
        frames: most frames.
        fps: frames per second; None: `frames` at even distances.
    """
    if fps is not None:
        step = 1 / Fraction(fps)
        count = max(1, math.ceil(header.seconds / step))
        if count <= min(frames, header.frames):
            return [float(step * i) for i in range(count)]
    if header.frames <= frames:
        places: Sequence[int] = range(header.frames)
    else:
        places = [i * (header.frames - 2) // max(1, frames - 1) for i in range(frames)]
    return [float(place / header.rate) for place in places]


def as_conversation(row: dict[str, Any]) -> dict[str, Any] | None:
    """A row with `video` and `conversations`, also of Video-ChatGPT's form; None for a row without a video."""
    if not is_nothing(row.get("video")):
        return row
    if not all(isinstance(row.get(key), str) for key in ("video_id", "q", "a")) or "conversations" in row:
        return None
    turns = [{"from": "human", "value": row["q"]}, {"from": "gpt", "value": row["a"]}]
    return row | {"video": f"{row['video_id']}.mp4", "conversations": turns}


def video_of(row: dict[str, Any], index: int, links: bool) -> Image:
    """The video of a row, as an image without a moment.

    Args:
        row: a row with `video`.
        index: number of the row, for errors.
        links: whether its file may be a link that leaves the image folder.

    Raises:
        RecordError: `unread_media` for more than one video, or images beside it; `malformed` for anything but a path,
            and `remote_image` for an address in the network.
    """
    if beside := next((key for key in IMAGE_KEYS if not is_nothing(row.get(key))), None):
        raise RecordError(
            "unread_media", f"entry {index} holds pictures under '{beside}' beside 'video'; a row has one of the two"
        )
    value = row["video"]
    if isinstance(value, list):
        if len(value) > 1:
            raise RecordError("unread_media", f"entry {index} holds {len(value)} films under 'video'; one is read")
        value = value[0]
    if not isinstance(value, str):
        raise RecordError("malformed", f"entry {index}: 'video' is {str(value)[:80]!r}; expected the path of a file")
    found = image_of(value, "'video'", links)
    if found.data is not None:
        raise RecordError("malformed", f"entry {index}: 'video' is a data: URI; expected the path of a file")
    return found


def with_frames(row: dict[str, Any], index: int, frames: str) -> list[dict[str, Any]]:
    """The turns of a row with its frames in front of the first question, in place of the mark of its video.

    Args:
        row: a row with `conversations`.
        index: number of the row, for errors.
        frames: the frames as text, with `<image>` for each.

    Raises:
        RecordError: `image_count` for more than one mark, or one outside the first question; `malformed` for turns that
            are none.
    """
    turns = row.get("conversations")
    if (
        not isinstance(turns, list)
        or not turns
        or not all(isinstance(turn, dict) and isinstance(turn.get("value"), str) for turn in turns)
    ):
        raise RecordError("malformed", f"entry {index} has no list 'conversations' of turns with a text 'value'")
    first = 1 if turns[0].get("from") == "system" and len(turns) > 1 else 0
    marks = [len(VIDEO_MARKS.findall(turn["value"])) for turn in turns]
    if sum(marks) > 1 or sum(marks) > marks[first]:
        raise RecordError(
            "image_count",
            f"entry {index}: {sum(marks)} marks {MARK} or {VIDEO_MARK} in the text for one video; expected one, in the "
            "first question, or none",
        )
    question = frames + VIDEO_MARKS.sub("", turns[first]["value"]).strip()
    return [*turns[:first], turns[first] | {"value": question}, *turns[first + 1 :]]
