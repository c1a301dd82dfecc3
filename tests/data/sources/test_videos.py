"""LLaVA's form with videos: which frames, how they are written, and what is refused by name."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lit_vlm.data import LlavaJson, LlavaVideo
from lit_vlm.data.feed.loader import SourceDataset
from lit_vlm.data.feed.plan import Place
from lit_vlm.data.records import Image, RecordError, open_image
from lit_vlm.data.records.film import Header
from lit_vlm.data.sets.convert import convert
from lit_vlm.data.sets.forms import open_source, recognise
from lit_vlm.data.sources import Converted
from lit_vlm.data.sources.videos import moments
from tests.data.made_videos import encoder, make_sound, make_video, number_of, rows_of, turns
from tests.data.records.test_media import seen


def header(frames: int, rate: float, seconds: float) -> Header:
    return Header(frames, Fraction(rate), Fraction(seconds), True)


@pytest.mark.parametrize("count", [9, 10, 11, 40, 101, 750, 9000])
@pytest.mark.parametrize("frames", [2, 4, 8])
def test_frames_by_count_are_those_of_vila(count: int, frames: int) -> None:
    found = moments(header(count, 25, count / 25), frames, None)
    expected = np.linspace(0, count - 2, frames)
    assert len(found) == frames
    # The reference rounds floats down, and so may be one frame below where the exact number is whole.
    assert all(abs(25 * moment - np.floor(place + 1e-9)) < 1e-6 for moment, place in zip(found, expected, strict=True))


def test_a_short_video_gives_all_its_frames_and_no_black_ones() -> None:
    assert moments(header(3, 10, 0.3), 8, None) == [0.0, 0.1, 0.2]
    assert moments(header(8, 10, 0.8), 8, None) == [k / 10 for k in range(8)]
    assert moments(header(1, 10, 0.1), 8, None) == [0.0]
    assert moments(header(40, 10, 4), 1, None) == [0.0]


def test_frames_by_rate_up_to_a_number() -> None:
    assert moments(header(100, 25, 4), 8, 1) == [0.0, 1.0, 2.0, 3.0]
    assert moments(header(105, 25, 4.2), 8, 1) == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert moments(header(100, 25, 4), 8, 2) == [k / 2 for k in range(8)]
    assert moments(header(100, 25, 4), 8, 0.1) == [0.0]
    # Longer than that: spread over the whole video, as without a rate.
    assert moments(header(1000, 25, 40), 8, 1) == moments(header(1000, 25, 40), 8, None)
    # A rate above that of the video takes no frame twice.
    assert moments(header(4, 1, 4), 8, 2) == [0.0, 1.0, 2.0, 3.0]


READ: dict[str, tuple[dict[str, Any], str]] = {
    "LLaVA-Video": ({"video": "a.mp4", "conversations": turns("<image>\nWhat?")}, "What?"),
    "mark of its own": ({"video": "a.mp4", "conversations": turns("<video>\nWhat?")}, "What?"),
    "mark behind": ({"video": "a.mp4", "conversations": turns("What?\n<video>")}, "What?"),
    "mark within": ({"video": "a.mp4", "conversations": turns("What <video>is it?")}, "What is it?"),
    "no mark": ({"video": "a.mp4", "conversations": turns("What?")}, "What?"),
    "list of one": ({"video": ["a.mp4"], "conversations": turns("What?"), "image": None}, "What?"),
    "Video-ChatGPT": ({"video_id": "a", "q": "What?", "a": "A grey field."}, "What?"),
}


@pytest.mark.parametrize("form", READ)
def test_a_video_is_frames_in_front_of_the_first_question(form: str, tmp_path: Path) -> None:
    make_video(tmp_path / "a.mp4")
    row, question = READ[form]
    source = open_source(rows_of(tmp_path, [row]), settings=["frames=4"])
    assert isinstance(source, LlavaVideo)
    record = source.record(0)
    assert seen(record) == ["image", "\n", "image", "\n", "image", "\n", "image", f"\n{question}", "A grey field."]
    assert [image.moment for image in record.images] == [0.0, 1.2, 2.5, 3.8]
    assert [number_of(open_image(image, tmp_path)) for image in record.images] == [0, 12, 25 % 20, 38 % 20]
    assert source.outline(0) == record


def test_later_turns_and_the_system_text_stay(tmp_path: Path) -> None:
    make_video(tmp_path / "a.mp4")
    talk = [{"from": "system", "value": "Be brief."}, *turns(), {"from": "human", "value": "And?"},
            {"from": "gpt", "value": "No."}]  # fmt: skip
    source = LlavaVideo(rows_of(tmp_path, [{"video": "a.mp4", "conversations": talk}]), frames=1, system="Not this.")
    assert seen(source.record(0)) == ["Be brief.", "image", "\nWhat is seen?", "A grey field.", "And?", "No."]
    del talk[0]
    source = LlavaVideo(rows_of(tmp_path, [{"video": "a.mp4", "conversations": talk}]), frames=1, system="This.")
    assert seen(source.record(0))[0] == "This."


def test_frames_are_written_with_their_times(tmp_path: Path) -> None:
    make_video(tmp_path / "a.mp4", 400, key_every=100)
    path = rows_of(tmp_path, [{"video": "a.mp4", "conversations": turns("{clock}?")}])
    source = LlavaVideo(path, frames=3, frame_text="[{clock}] <image>\n")
    expected = ["[0:00] ", "image", "\n[0:19] ", "image", "\n[0:39] ", "image", "\n{clock}?", "A grey field."]
    assert seen(source.record(0)) == expected
    source = LlavaVideo(path, frames=2, frame_text="{seconds:.1f} s: <image>")
    assert seen(source.record(0))[:4] == ["0.0 s: ", "image", "39.8 s: ", "image"]


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ({"frames": 0}, "frames is at least 1"),
        ({"fps": 0.0}, "fps above 0, not 8 and 0.0"),
        ({"fps": float("nan")}, "fps above 0"),
        ({"frame_text": "at {second} s"}, "frame_text is 'at {second} s': KeyError 'second'; it may hold {seconds}"),
        ({"frame_text": "{seconds:d}<image>"}, "frame_text is .*; it may hold {seconds}"),
        ({"frame_text": "{clock}"}, "it holds <image> once"),
        ({"frame_text": "<image><image>"}, "it holds <image> once"),
    ],
)
def test_a_setting_that_cannot_work_is_refused(setting: dict[str, Any], expected: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=expected):
        LlavaVideo(rows_of(tmp_path, []), **setting)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "two videos": ({"video": ["a.mp4", "b.mp4"], "conversations": turns()}, "unread_media: .*2 films.*one is read"),
    "picture beside": (
        {"video": "a.mp4", "image": "a.png", "conversations": turns()},
        "unread_media: .*'image' beside",
    ),
    "two marks": ({"video": "a.mp4", "conversations": turns("<video><image>")}, "image_count: entry 0: 2 marks"),
    "mark in the answer": ({"video": "a.mp4", "conversations": turns("Q", "<video>")}, "image_count: entry 0: 1 marks"),
    "no turns": ({"video": "a.mp4", "conversations": []}, "malformed: entry 0 has no list 'conversations'"),
    "no text": ({"video": "a.mp4", "conversations": [{"from": "human"}]}, "malformed: entry 0 has no list"),
    "address": ({"video": "https://a.b/c.mp4", "conversations": turns()}, "remote_image: 'video' is 'https"),
    "bytes": ({"video": {"bytes": "AAAA"}, "conversations": turns()}, "malformed: .*'video'.*expected the path"),
    "data URI": ({"video": "data:video/mp4;base64,AAAA", "conversations": turns()}, "malformed: .*expected the path"),
    "not there": ({"video": "none.mp4", "conversations": turns()}, "missing_image: .*none.mp4 does not exist"),
    "outside": ({"video": "../a.mp4", "conversations": turns()}, "outside_folder"),
    "other role": ({"video": "a.mp4", "conversations": [{"from": "x", "value": "y"}]}, "unknown_role"),
    "further film": ({"video": "a.mp4", "video_2": "b.mp4", "conversations": turns()}, "unread_media: .*'video_2'"),
    "sound": ({"video": "sound.mp4", "conversations": turns()}, "corrupt_video: sound.mp4 has no video stream"),
}


@pytest.mark.parametrize("form", REFUSED)
def test_a_row_that_cannot_be_read_is_refused_by_name(form: str, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    make_video(folder / "a.mp4", 5)
    make_video(tmp_path / "a.mp4", 5)
    make_sound(folder / "sound.mp4")
    row, expected = REFUSED[form]
    with pytest.raises(RecordError, match=expected):
        LlavaVideo(rows_of(folder, [row])).record(0)


def test_rows_without_a_video_are_read_as_ever(tmp_path: Path, png: Callable[..., bytes]) -> None:
    (tmp_path / "a.png").write_bytes(png())
    rows = [{"image": "a.png", "conversations": turns("<image>\nWhat?")}, {"conversations": turns("What?")}]
    path = rows_of(tmp_path, rows)
    assert [LlavaVideo(path).record(k) for k in (0, 1)] == [LlavaJson(path).record(k) for k in (0, 1)]
    with pytest.raises(RecordError, match="unread_media: .*videos are read by LlavaVideo"):
        LlavaJson(rows_of(tmp_path, [{"video": "a.mp4", "conversations": turns("What?")}])).record(0)


def test_the_form_is_recognised(tmp_path: Path) -> None:
    for row in ({"video": "a.mp4", "conversations": turns()}, {"video_id": "a", "q": "What?", "a": "So."}):
        assert recognise(Path(rows_of(tmp_path, [row]))) == "LlavaVideo"
        (tmp_path / "rows.jsonl").write_text(json.dumps(row))
        assert recognise(tmp_path / "rows.jsonl") == "LlavaVideo"


def test_the_fingerprint_tells_which_frames(tmp_path: Path) -> None:
    path = rows_of(tmp_path, [{"video": "a.mp4", "conversations": turns()}])
    kinds: list[dict[str, Any]] = [{}, {"frames": 4}, {"fps": 1.0}, {"frame_text": "{clock}<image>"}]
    assert len({LlavaVideo(path, **kind).fingerprint() for kind in kinds}) == 4
    assert LlavaVideo(path).fingerprint() == LlavaVideo(path, name="other").fingerprint()


def test_without_the_package_the_way_out_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_video(tmp_path / "a.mp4", 3)
    monkeypatch.delitem(sys.modules, "lit_vlm.data.records.film", raising=False)
    monkeypatch.setattr("lit_vlm.data.records.film", None, raising=False)
    monkeypatch.delattr("lit_vlm.data.records.film")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match=r"PyAV, which is not installed: pip install 'lit-vlm\[video\]'"):
        LlavaVideo(rows_of(tmp_path, []))
    with pytest.raises(ValueError, match=r"pip install 'lit-vlm\[video\]'"):
        open_image(Image("a.mp4", moment=0.0), tmp_path)


def test_a_video_that_breaks_off_is_a_bad_sample(tmp_path: Path) -> None:
    make_video(tmp_path / "a.mp4")
    content = make_video(tmp_path / "b.mkv").read_bytes()
    (tmp_path / "b.mkv").write_bytes(content[: len(content) // 2])
    source = LlavaVideo(rows_of(tmp_path, [{"video": v, "conversations": turns()} for v in ("a.mp4", "b.mkv")]))
    encode = encoder()
    good, bad = (SourceDataset([source], encode)[Place(0, k)].items for k in (0, 1))
    assert isinstance(good, list)
    assert (len(good[0].images), len(good[0].grids)) == (8, 8)
    assert encode.measure(source.outline(0), source) == (len(good[0]), 8)
    assert not isinstance(bad, list)
    assert (bad.reason, bad.dropped, bad.id) == ("corrupt_video", True, "1")
    assert "b.mkv ends at" in bad.detail


def test_videos_are_converted_to_pictures_that_know_their_moments(tmp_path: Path) -> None:
    make_video(tmp_path / "a.mp4")
    make_sound(tmp_path / "b.mp4")
    source = LlavaVideo(rows_of(tmp_path, [{"video": v, "conversations": turns()} for v in ("a.mp4", "b.mp4")]))
    info = convert(source, tmp_path / "set", max_bad_share=0.5)
    assert (info.records, info.images, info.bad) == (1, 8, {"corrupt_video": 1})
    made, given = Converted(str(tmp_path / "set")), source.record(0)
    record = made.record(0)
    assert seen(record) == seen(given)
    assert [image.moment for image in record.images] == [image.moment for image in given.images]
    for stored, frame in zip(record.images, given.images, strict=True):
        assert stored.size == (64, 48)
        pixels = [np.asarray(open_image(one, tmp_path), float) for one in (stored, frame)]
        assert np.abs(pixels[0] - pixels[1]).mean() < 2
    # Frames of a set that are too many for a sample are left out like those of a video.
    for length in (2000, 400):
        encode = encoder(length)
        samples = [encode(one, folder) for one, folder in ((given, tmp_path), (record, made.image_folder))]
        assert samples[0].ids == samples[1].ids
        assert encode.measure(made.outline(0), made) == encode.measure(given, source) == (
            len(samples[0]), len(samples[0].grids))  # fmt: skip
