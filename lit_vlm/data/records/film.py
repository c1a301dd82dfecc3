"""One video: what its header says, and its frames by their moments, by PyAV, which brings FFmpeg along."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import av
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from PIL import Image as PILImage

from lit_vlm.data.records.record import MAX_PIXELS, MAX_SIDE, RecordError

OPTIONS = {"format_whitelist": "mov,matroska,avi", "protocol_whitelist": "file"}
"""Containers that hold their own frames. Others, such as playlists, may name further files and network addresses."""
SLACK = Fraction(1, 1000)
"""Seconds by which a frame may begin after the moment that it is asked for, as containers round times."""
FAR = 10
"""Seconds without a known key frame over which a jump is tried instead of decoding all that lies between."""
TURNS = {
    90: PILImage.Transpose.ROTATE_90,
    180: PILImage.Transpose.ROTATE_180,
    -180: PILImage.Transpose.ROTATE_180,
    -90: PILImage.Transpose.ROTATE_270,
}
"""Degrees of the display matrix, counter-clockwise → the transposition that turns a frame upright."""


@dataclass(frozen=True)
class Header:
    """What the header of a video says.

    Attributes:
        frames: number of frames; estimated by the length where the container does not count them.
        rate: frames per second, on average.
        seconds: length of the pictures; of everything, where only that is written.
        own: whether `seconds` is the length of the pictures.
    """

    frames: int
    rate: Fraction
    seconds: Fraction
    own: bool


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """A context in which errors of FFmpeg become a `RecordError` that begins with `what`."""
    try:
        yield
    except RecordError:
        raise
    except (av.FFmpegError, OSError, ValueError, OverflowError, MemoryError) as error:
        said = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise RecordError("corrupt_video", f"{what}: {said}") from error


def read_header(file: Path) -> Header:
    """Read the header of a video; no frame is decoded.

    Raises:
        RecordError: `corrupt_video` for a file that is no video, or has no video stream or frame; `too_large`.
    """
    film = Film(file)
    film.close()
    return film.header


def upright_size(file: Path) -> tuple[int, int]:
    """(width, height) in pixels of a video's frames when they are turned upright; the first frame is decoded.

    Raises:
        RecordError: as `Film`.
    """
    state = file.stat()
    return _upright_size(file, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=64)
def _upright_size(file: Path, changed: int, size: int) -> tuple[int, int]:
    """`upright_size` of a file as it was at that time: all frames of a record ask for it."""
    film = Film(file)
    try:
        return film.frame(0.0).size
    finally:
        film.close()


class Film:
    """An open video.

    Frames are asked for by their moments. Ascending moments decode no frame twice: the film is wound on, by a jump to a
    later key frame where there is one in front of the moment.

    Args:
        file: the video, of any name.

    Raises:
        RecordError: `corrupt_video` for a file that is no video, or has no video stream or frame; `too_large`.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        with _reading(f"{file.name} is damaged, or none of MP4, QuickTime, Matroska, WebM and AVI"):
            self._container: InputContainer = av.open(f"file:{file}", options=OPTIONS)
        try:
            with _reading(f"the header of {file.name} is damaged"):
                self._stream = self._pictures()
                self.header = self._header()
                self._start = self._stream.start_time or 0
                self._frames = self._decoded()
        except BaseException:
            self.close()
            raise
        self._shown: VideoFrame | None = None
        self._next: VideoFrame | None = None
        self._fresh = True

    def close(self) -> None:
        """Close the file."""
        self._container.close()

    def frame(self, moment: float) -> PILImage.Image:
        """The frame that is shown at a moment: upright, RGB.

        Args:
            moment: seconds from the first frame.

        Raises:
            RecordError: `corrupt_video` where it cannot be decoded, or the film ends before.
        """
        with _reading(f"{self.file.name} cannot be decoded up to {moment:.2f} s"):
            found = self._at(self._ticks(Fraction(moment) + SLACK))
            if found.is_corrupt:
                raise RecordError("corrupt_video", f"{self.file.name}: the frame at {moment:.2f} s is damaged")
            picture = found.to_image()
            turn = TURNS.get(found.rotation)
            return picture if turn is None else picture.transpose(turn)

    def _pictures(self) -> VideoStream:
        """The video stream; cover pictures of songs are none."""
        streams = [s for s in self._container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
        if not streams:
            kinds = ", ".join(sorted({stream.type for stream in self._container.streams}))
            raise RecordError("corrupt_video", f"{self.file.name} has no video stream; it has {kinds or 'no stream'}")
        stream = streams[0]
        width, height = stream.codec_context.width, stream.codec_context.height
        if not width or not height:
            raise RecordError("corrupt_video", f"{self.file.name}: its header says no width and height")
        if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
            raise RecordError(
                "too_large",
                f"{self.file.name}: {width}×{height}, over {MAX_PIXELS} pixels, or a side over {MAX_SIDE}",
            )
        # Loader workers are the parallelism; a decoder with threads of its own does not survive a fork.
        stream.thread_type, stream.thread_count = "NONE", 1
        return stream

    def _header(self) -> Header:
        stream, base = self._stream, self._stream.time_base
        seconds = Fraction(stream.duration) * base if stream.duration and base else _written_length(stream)
        own = seconds is not None
        if seconds is None:
            seconds = Fraction(self._container.duration or 0, av.time_base)
        rate = stream.average_rate or stream.guessed_rate
        if not rate and seconds and stream.frames:
            rate = Fraction(stream.frames) / seconds
        frames = stream.frames or round(seconds * (rate or 0))
        if not frames or not rate or not seconds:
            raise RecordError("corrupt_video", f"{self.file.name}: its header says no frame")
        return Header(frames, rate, seconds, own)

    def _ticks(self, seconds: Fraction) -> int:
        """Time in the stream's units of a moment, rounded down."""
        return self._start + math.floor(seconds / (self._stream.time_base or Fraction(1, av.time_base)))

    def _decoded(self) -> Iterator[VideoFrame]:
        return (frame for frame in self._container.decode(self._stream) if frame.pts is not None)

    def _at(self, target: int) -> VideoFrame:
        """The frame that is shown at a time in the stream's units."""
        if self._must_jump(target):
            self._jump(target)
        elif self._fresh:
            self._next = next(self._frames, None)
            self._step()
        self._fresh = False
        while self._next is not None and self._next.pts is not None and self._next.pts <= target:
            self._step()
        if self._shown is None:
            raise RecordError("corrupt_video", f"{self.file.name}: no frame of it can be decoded")
        if self._next is None:
            self._check_end(self._shown, target)
        return self._shown

    def _step(self) -> None:
        self._shown, self._next = self._next, next(self._frames, None)

    def _must_jump(self, target: int) -> bool:
        """Whether the frame at a time is not found by decoding on, or much sooner by a jump."""
        if self._fresh:
            return target > self._ticks(Fraction(1))
        if self._shown is None or (self._shown.pts or 0) > target:
            return True
        if self._next is None or (self._next.pts or 0) >= target:
            return False
        reached, index = self._next.pts or 0, self._stream.index_entries
        if len(index) and index[len(index) - 1].timestamp >= target:
            place = index.search_timestamp(target)
            return place >= 0 and index[place].timestamp > reached
        return target - reached > self._ticks(Fraction(FAR)) - self._start

    def _jump(self, target: int) -> None:
        """Go to a key frame at or in front of a time."""
        back, second = 0, self._ticks(Fraction(1)) - self._start
        while True:
            place = max(self._start, target - back)
            self._container.seek(place, stream=self._stream)
            self._frames = self._decoded()
            self._shown, self._next = None, next(self._frames, None)
            # An index has times of decoding: its key frame may be shown only after the target.
            found = self._next is not None and (self._next.pts or 0) <= target
            if found or place == self._start:
                break
            back = max(second, 2 * back)
        self._step()

    def _check_end(self, last: VideoFrame, target: int) -> None:
        """Refuse a film that is shorter than its header says."""
        long = max(2 * (last.duration or 0), self._ticks(2 / self.header.rate) - self._start)
        if self.header.own and target - (last.pts or 0) > long:
            unit = float(self._stream.time_base or 0)
            raise RecordError(
                "corrupt_video",
                f"{self.file.name} ends at {((last.pts or 0) - self._start) * unit:.2f} s, its header says "
                f"{float(self.header.seconds):.2f} s",
            )


def _written_length(stream: VideoStream) -> Fraction | None:
    """Seconds that a tag of the stream says, as in Matroska and WebM; None where there is none."""
    parts = stream.metadata.get("DURATION", "").rstrip("\0").split(":")
    try:
        hours, minutes, seconds = (Fraction(part) for part in parts)
    except ValueError:
        return None
    return hours * 3600 + minutes * 60 + seconds or None
