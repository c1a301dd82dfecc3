"""Small videos for tests: each frame has a grey level of its own in its lower half, and white above it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
from PIL import Image as PILImage

from lit_vlm.core.batch import PixelSpec
from lit_vlm.core.tokenizers import byte_tokenizer
from lit_vlm.data import Resize, VicunaV1
from lit_vlm.data.sample.encode import SampleEncoder
from lit_vlm.data.sample.spec import InputSpec
from lit_vlm.encoders import PatchGrid
from lit_vlm.projectors.base import same_grid

IPHONE = [0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30]
"""The display matrix of a telephone held upright: its frames are shown turned by 90 degrees, clockwise."""


def make_video(
    file: Path,
    frames: int = 40,
    rate: int | Fraction = 10,
    size: tuple[int, int] = (64, 48),
    codec: str = "libx264",
    key_every: int = 15,
    times: Sequence[float] | None = None,
    matrix: Sequence[int] | None = None,
    **options: str,
) -> Path:
    """Write a video; `times` are the seconds of its frames where their rate varies."""
    with av.open(str(file), "w", options=options) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = *size, "yuv420p", key_every
        stream.codec_context.thread_count = 1
        stream.set_display_matrix(matrix)
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number in range(frames if times is None else len(times)):
            pixels = np.full((size[1], size[0], 3), level(number), np.uint8)
            pixels[: size[1] // 2] = 255
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = round(times[number] * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file


def make_sound(file: Path, picture: bool = False) -> Path:
    """Write a second of silence; with `picture`, beside a stream of pictures without one."""
    with av.open(str(file), "w") as container:
        if picture:
            stream = container.add_stream("libx264", rate=10)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        sound = container.add_stream("aac", rate=16000)
        for number in range(16):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, 1024 * number
            container.mux(sound.encode(frame))
        container.mux(sound.encode(None))
    return file


def level(number: int) -> int:
    """Grey level of a frame's lower half: 12 apart, so that no codec makes one frame of two."""
    return 12 * (number % 20)


def number_of(picture: PILImage.Image) -> int:
    """Number modulo 20 of the frame that a picture shows, by its last rows."""
    return round(float(np.asarray(picture)[-8:].mean()) / 12)


def rows_of(folder: Path, rows: Sequence[Any], name: str = "rows.json") -> str:
    """Write rows as a JSON list; its path."""
    (folder / name).write_text(json.dumps(list(rows)))
    return str(folder / name)


def turns(question: str = "<video>\nWhat is seen?", answer: str = "A grey field.") -> list[dict[str, str]]:
    """LLaVA's `conversations` of one question."""
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def encoder(
    max_length: int = 2000, prompt: bool = False, too_long: Literal["truncate", "drop"] = "truncate"
) -> SampleEncoder:
    """An encoder of samples with one token per byte and 16 positions per picture."""
    spec = InputSpec(byte_tokenizer(), PixelSpec(16, 4, (0.5, 0.5, 0.5)), PatchGrid(4), same_grid)
    return SampleEncoder(spec, VicunaV1(), Resize(), max_length, "drop" if prompt else too_long, prompt)
