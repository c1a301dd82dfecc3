"""Seconds of a core for a sample of eight frames of a video: in one go, one by one, and as pictures of a set."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
from PIL import Image as PILImage
from rich.console import Console
from rich.table import Table

from lit_vlm.data import Converted, LlavaVideo
from lit_vlm.data.records import Record, Videos, decode_image
from lit_vlm.data.sets.convert import convert
from tests.data.made_videos import rows_of, turns

SIZE, RATE, SECONDS, KEY_EVERY, ROUNDS = (1280, 720), 25, 30, 250, 3


def write_video(file: Path) -> None:
    """A moving, grainy field with a key frame every ten seconds, as x264 puts them."""
    noise = np.random.default_rng(0)
    small = PILImage.fromarray(noise.integers(0, 255, (18, 32, 3), dtype=np.uint8)).resize(SIZE, PILImage.BICUBIC)
    field = np.asarray(small, np.int16) + noise.integers(-6, 6, (SIZE[1], SIZE[0], 1))
    pixels = field.clip(0, 255).astype(np.uint8)
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=RATE)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = *SIZE, "yuv420p", KEY_EVERY
        stream.options = {"preset": "veryfast"}
        for number in range(RATE * SECONDS):
            frame = av.VideoFrame.from_ndarray(np.roll(pixels, (number, 2 * number), (0, 1)), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def together(record: Record, folder: Path) -> None:
    """Decode the images of a record as a sample does."""
    with Videos() as videos:
        for image in record.images:
            decode_image(image, folder, videos=videos)


def apart(record: Record, folder: Path) -> None:
    """Decode the images of a record one by one."""
    for image in record.images:
        decode_image(image, folder)


def core_seconds(action: Callable[[], object]) -> float:
    """Seconds of the process's own time, which other programs of the machine change little."""
    start = time.process_time()
    action()
    return time.process_time() - start


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_video(folder / "a.mp4")
        source = LlavaVideo(rows_of(folder, [{"video": "a.mp4", "conversations": turns()}]))
        convert(source, folder / "set")
        made = Converted(str(folder / "set"))
        ways: dict[str, Callable[[], object]] = {
            "header, for the record": lambda: source.record(0),
            "8 frames of the video, in one go": lambda: together(source.record(0), folder),
            "8 frames, each by itself": lambda: apart(source.record(0), folder),
            "8 pictures of the converted set": lambda: together(made.record(0), folder),
        }
        found = [{way: core_seconds(action) for way, action in ways.items()} for _ in range(ROUNDS)]
        megabytes = [(folder / "a.mp4").stat().st_size / 1e6, made.info.image_bytes / 1e6]
    title = f"{SECONDS} s of {SIZE[0]}×{SIZE[1]} at {RATE} frames per second, a key frame every {KEY_EVERY}"
    table = Table(title=f"{title}; {megabytes[0]:.1f} MB, as 8 pictures {megabytes[1]:.1f} MB")
    for column in ("", "ms of a core", "of one go"):
        table.add_column(column)
    for way in ways:
        time_ = statistics.median(one[way] for one in found)
        share = statistics.median(one[way] / one["8 frames of the video, in one go"] for one in found)
        table.add_row(way, f"{1000 * time_:.1f}", f"{share:.3f}")
    Console().print(table)
