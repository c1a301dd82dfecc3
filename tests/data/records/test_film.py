"""Videos frame by frame: to the frame in every container, and broken ones refused by name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image as PILImage

from lit_vlm.data.records import Image, RecordError, Videos, decode_image, image_bytes, image_size, open_image
from lit_vlm.data.records.film import Film, Header, read_header, upright_size
from tests.data.made_videos import IPHONE, make_sound, make_video, number_of

UNEVEN = [0.0, 0.05, 0.1, 0.2, 0.9, 1.0, 1.01, 1.5, 2.5, 2.6, 2.65, 3.9, 4.0, 4.3, 6.0, 6.1]
KINDS: dict[str, Callable[[Path], Path]] = {
    "mp4": lambda folder: make_video(folder / "a.mp4"),
    "mp4, 29.97 per second": lambda folder: make_video(folder / "a.mp4", rate=Fraction(30000, 1001)),
    "mp4, one key frame": lambda folder: make_video(folder / "a.mp4", key_every=1000),
    "mp4, uneven": lambda folder: make_video(folder / "a.mp4", times=UNEVEN),
    "mov, key frames alone": lambda folder: make_video(folder / "a.mov", codec="mpeg4", key_every=1),
    "mkv": lambda folder: make_video(folder / "a.mkv"),
    "mkv, uneven": lambda folder: make_video(folder / "a.mkv", times=UNEVEN),
    "mkv, hevc": lambda folder: make_video(folder / "a.mkv", codec="libx265"),
    "webm": lambda folder: make_video(folder / "a.webm", codec="libvpx-vp9"),
    "avi": lambda folder: make_video(folder / "a.avi", codec="mpeg4"),
}


def all_frames(file: Path) -> tuple[list[float], list[int]]:
    """Seconds and numbers of all frames, read from beginning to end by PyAV alone."""
    with av.open(str(file)) as container:
        stream = container.streams.video[0]
        start = stream.start_time or 0
        found = [(float((f.pts - start) * stream.time_base), number_of(f.to_image())) for f in container.decode(stream)]
    return [time for time, _ in found], [number for _, number in found]


@pytest.mark.parametrize("kind", KINDS)
def test_frames_are_exact_in_any_order(kind: str, tmp_path: Path) -> None:
    file = KINDS[kind](tmp_path)
    times, numbers = all_frames(file)
    assert len(times) in (len(UNEVEN), 40)
    assert len(set(numbers)) > 10, "frames can be told apart"
    places = list(range(len(times)))
    for order in (places, places[::7], places[::-5], np.random.default_rng(0).permutation(places).tolist()):
        with Videos() as videos:
            assert [number_of(videos.frame(file, times[k])) for k in order] == [numbers[k] for k in order]
    between = [(a + b) / 2 for a, b in pairwise(times) if b - a > 0.02]
    shown = [numbers[max(k for k, time in enumerate(times) if time <= moment)] for moment in between]
    assert [number_of(open_image(Image(file.name, moment=moment), tmp_path)) for moment in between[::4]] == shown[::4]


def test_the_header_says_how_many_frames(tmp_path: Path) -> None:
    assert read_header(make_video(tmp_path / "a.mp4")) == Header(40, Fraction(10), Fraction(4), True)
    assert read_header(make_video(tmp_path / "a.mkv")) == Header(40, Fraction(10), Fraction(4), True)  # rate × length
    uneven = read_header(make_video(tmp_path / "b.mp4", times=UNEVEN))
    assert (uneven.frames, uneven.own) == (16, True)


def test_sound_that_lasts_longer_does_not_count(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.mp4"), "w") as container, av.open(str(make_video(tmp_path / "v.mp4"))) as video:
        picture = container.add_stream_from_template(video.streams.video[0])
        sound = container.add_stream("aac", rate=16000)
        for packet in video.demux(video=0):
            if packet.dts is not None:
                packet.stream = picture
                container.mux(packet)
        for number in range(200):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, 1024 * number
            container.mux(sound.encode(frame))
    header = read_header(tmp_path / "a.mp4")
    assert (header.frames, float(header.seconds)) == (40, 4.0)


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_frames_are_turned_upright(degrees: int, tmp_path: Path) -> None:
    cos, sin = {0: (1, 0), 90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
    matrix = [65536 * cos, 65536 * sin, 0, -65536 * sin, 65536 * cos, 0, 0, 0, 1 << 30]  # clockwise
    assert degrees != 90 or matrix == IPHONE
    image = Image(make_video(tmp_path / "a.mp4", 3, matrix=matrix).name, moment=0.0)
    stored = open_image(Image(make_video(tmp_path / "b.mp4", 3).name, moment=0.0), tmp_path)
    shown = open_image(image, tmp_path)
    assert np.array_equal(np.asarray(shown), np.rot90(np.asarray(stored), -degrees // 90))
    assert image_size(image, tmp_path) == shown.size == ((48, 64) if degrees % 180 else (64, 48))


def test_a_video_is_opened_once_for_its_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, other = make_video(tmp_path / "a.mp4"), make_video(tmp_path / "b.mp4")
    opened, steps = [], []
    monkeypatch.setattr(Film, "__init__", _counted(Film.__init__, opened))
    monkeypatch.setattr(Film, "_step", _counted(Film._step, steps))
    with Videos() as videos:
        for name in (file.name, other.name):
            for moment in (0.0, 0.4, 0.5, 1.9, 3.9):
                decode_image(Image(name, moment=moment), tmp_path, videos=videos)
    assert len(opened) == 2
    assert len(steps) < 2 * 40, "no frame is decoded twice, and jumps leave some out"
    assert videos._film is None


def _counted(method: Callable[..., None], calls: list[object]) -> Callable[..., None]:
    def counted(*arguments: object) -> None:
        calls.append(arguments)
        method(*arguments)

    return counted


def test_the_content_of_a_frame_is_a_jpeg_of_it(tmp_path: Path) -> None:
    image = Image(make_video(tmp_path / "a.mp4").name, moment=1.2)
    content = image_bytes(image, tmp_path)
    assert content == image_bytes(image, tmp_path)
    assert content.startswith(b"\xff\xd8")
    stored, frame = open_image(Image(data=content), tmp_path), open_image(image, tmp_path)
    assert number_of(stored) == number_of(frame) == 12
    assert np.abs(np.asarray(stored, float) - np.asarray(frame, float)).mean() < 2


def cut(file: Path, share: float = 0.5) -> Path:
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    return file


def noisy(file: Path) -> Path:
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 300] = np.random.default_rng(0).bytes(300)
    file.write_bytes(content)
    return file


def written(file: Path, content: str) -> Path:
    file.write_text(content)
    return file


def picture(file: Path) -> Path:
    PILImage.new("RGB", (64, 48)).save(file, "PNG")
    return file


PLAYLIST = "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nother.mp4\n#EXT-X-ENDLIST\n"
BROKEN: dict[str, tuple[Callable[[Path], Path], str]] = {
    "cut, header behind": (lambda f: cut(make_video(f / "a.mp4")), "a.mp4 is damaged, or none of MP4"),
    "cut, header in front": (
        lambda f: cut(make_video(f / "a.mp4", movflags="faststart"), 0.7),
        r"a.mp4 (cannot be decoded up to [0-9.]+ s|ends at [0-9.]+ s, its header says 4.00 s)",
    ),
    "cut Matroska": (lambda f: cut(make_video(f / "a.mkv")), "a.mkv ends at [0-9.]+ s, its header says 4.00 s"),
    "noise in the middle": (
        lambda f: noisy(make_video(f / "a.mp4", movflags="faststart")),
        "a.mp4 cannot be decoded up to|the frame at .* is damaged",
    ),
    "no bytes": (lambda f: written(f / "a.mp4", ""), "a.mp4 is damaged, or none"),
    "an error page": (lambda f: written(f / "a.mp4", "<html>404</html>" * 99), "a.mp4 is damaged, or none"),
    "a picture": (lambda f: picture(f / "a.mp4"), "a.mp4 is damaged, or none"),
    "a playlist": (lambda f: written(f / "a.mp4", PLAYLIST), "a.mp4 is damaged, or none"),
    "a list of files": (lambda f: written(f / "a.mp4", "ffconcat version 1.0\nfile b.mp4\n"), "damaged, or none"),
    "sound alone": (lambda f: make_sound(f / "a.mp4"), "a.mp4 has no video stream; it has audio"),
    "no frame": (lambda f: make_sound(f / "a.mkv", picture=True), "a.mkv.*no frame"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_video_has_its_reason(kind: str, tmp_path: Path) -> None:
    make, expected = BROKEN[kind]
    make_video(tmp_path / "b.mp4", 5)
    make_video(tmp_path / "other.mp4", 5)
    file = make(tmp_path)
    with pytest.raises(RecordError, match=f"corrupt_video: .*({expected})"):  # noqa: PT012 - any of the frames
        header = read_header(file)
        with Videos() as videos:
            for k in range(header.frames):
                videos.frame(file, float(k / header.rate))


def test_the_name_of_a_file_does_not_matter(tmp_path: Path) -> None:
    file = shutil.copy(make_video(tmp_path / "a.mkv"), tmp_path / "b.avi")
    assert number_of(open_image(Image("b.avi", moment=0.7), tmp_path)) == 7
    assert upright_size(Path(file)) == (64, 48)


def test_paths_of_videos_obey_the_rules_of_pictures(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    make_video(tmp_path / "a.mp4", 3)
    for path, reason in (("none.mp4", "missing_image"), ("../a.mp4", "outside_folder")):
        with pytest.raises(RecordError, match=reason):
            open_image(Image(path, moment=0.0), tmp_path / "in")


def test_a_frame_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_vlm.data.records.film.MAX_PIXELS", 3000)
    with pytest.raises(RecordError, match="too_large: a.mp4: 64×48, over 3000 pixels"):
        read_header(make_video(tmp_path / "a.mp4", 3))
