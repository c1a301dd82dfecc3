"""Fewer frames instead of a cut: videos that are too long for a sample."""

from __future__ import annotations

from pathlib import Path

import pytest

from lit_vlm.data import Native, VicunaV1
from lit_vlm.data.records import Content, Image, Message, Record, RecordError, Text
from lit_vlm.data.sample.encode import SampleEncoder
from lit_vlm.data.sample.frames import fit_frames, keep_frames
from lit_vlm.data.sample.spec import InputSpec
from lit_vlm.data.sources.videos import LlavaVideo
from tests.data.made_videos import IPHONE, encoder, make_video, rows_of, turns


def video(count: int, path: str = "a.mp4") -> list[Content]:
    parts: list[Content] = []
    for k in range(count):
        parts += [Text(f"{k} s: "), Image(path, moment=float(k)), Text("\n")]
    return parts


def record(*parts: Content) -> Record:
    return Record("0", "s", (Message("user", (*parts, Text("Why?"))), Message("assistant", (Text("So."),))))


def shown(one: Record) -> str:
    """The first message as text, with the seconds of each frame in brackets."""
    parts = one.messages[0].content
    return "".join(part.text if isinstance(part, Text) else f"<{part.moment:.0f}>" for part in parts)


def test_a_frame_goes_with_its_text() -> None:
    kept = keep_frames(record(*video(8)), 3)
    assert shown(kept) == "0 s: <0>\n3 s: <3>\n7 s: <7>\nWhy?"
    assert shown(keep_frames(record(*video(8)), 1)) == "0 s: <0>\nWhy?"
    assert keep_frames(record(*video(3)), 3) == record(*video(3))


def test_each_video_is_thinned_and_pictures_stay() -> None:
    pictures = [Image("p.png"), Text(" between "), Image("p.png")]
    parts = [*video(4), *pictures, *video(4, "b.mp4"), *video(2, "b.mp4")]
    kept = keep_frames(record(*parts), 2)
    assert [(image.path, image.moment) for image in kept.images] == [
        ("a.mp4", 0), ("a.mp4", 3), ("p.png", None), ("p.png", None), ("b.mp4", 0), ("b.mp4", 3), ("b.mp4", 0),
        ("b.mp4", 1)]  # fmt: skip
    assert " between " in kept.messages[0].text


@pytest.mark.parametrize("most", range(1, 14))
def test_as_many_frames_as_fit(most: int) -> None:
    asked = []

    def length(one: Record) -> int:
        asked.append(one)
        return len(one.images)

    found = fit_frames(record(*video(12)), length, most)
    assert len(found.images) == min(12, most)
    assert len(asked) <= 5
    plain = record(*[Image("p.png")] * 4)
    assert fit_frames(plain, length, 1) is plain


def test_the_answer_of_a_long_video_stays(tmp_path: Path) -> None:
    make_video(tmp_path / "a.mp4")
    path = rows_of(tmp_path, [{"video": "a.mp4", "conversations": turns()}])
    source = LlavaVideo(path, frames=32, frame_text="[{clock}] <image>\n")
    whole = encoder(5000)(source.record(0), tmp_path)
    assert (len(whole.grids), whole.note) == (32, None)
    for share in (0.9, 0.5, 0.3):
        limit = int(len(whole) * share)
        encode = encoder(limit)
        sample = encode(source.record(0), tmp_path)
        one_more = encoder(5000)(keep_frames(source.record(0), len(sample.grids) + 1), tmp_path)
        assert len(sample) <= limit < len(one_more)
        assert sample.num_supervised == whole.num_supervised
        assert sample.note is not None
        assert (sample.note.reason, sample.note.dropped) == ("fewer_frames", False)
        assert sample.note.detail == f"{len(sample.grids)} of 32 frames fit, max_length is {limit}"
        assert encode.measure(source.record(0), source) == (len(sample), len(sample.grids))
        asked = encoder(limit, prompt=True)(source.record(0), tmp_path)
        assert len(sample.grids) <= len(asked.grids) < 32


def test_what_is_too_long_with_one_frame_is_cut_or_dropped(tmp_path: Path) -> None:
    make_video(tmp_path / "a.mp4")
    source = LlavaVideo(rows_of(tmp_path, [{"video": "a.mp4", "conversations": turns(answer="So " * 200)}]))
    sample = encoder(400)(source.record(0), tmp_path)
    assert len(sample.grids) == 1
    assert sample.note is not None
    assert sample.note.reason == "truncated"
    drop = encoder(400, too_long="drop")
    with pytest.raises(RecordError, match="too_long"):
        drop(source.record(0), tmp_path)
    with pytest.raises(RecordError, match="too_long"):
        drop.measure(source.record(0), source)


def test_positions_are_known_for_encoders_of_any_size(tmp_path: Path, bytes_spec: InputSpec) -> None:
    make_video(tmp_path / "a.mp4", matrix=IPHONE)
    source = LlavaVideo(rows_of(tmp_path, [{"video": "a.mp4", "conversations": turns()}]), frames=3)
    encode = SampleEncoder(bytes_spec, VicunaV1(), Native(32), 2000)
    sample = encode(source.record(0), tmp_path)
    assert [(grid.rows, grid.cols) for grid in sample.grids] == [(8, 6)] * 3
    assert encode.measure(source.record(0), source) == (len(sample), 3)


def test_nothing_is_decoded_to_measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_video(tmp_path / "a.mp4")
    source = LlavaVideo(rows_of(tmp_path, [{"video": "a.mp4", "conversations": turns()}]))
    encode = encoder(2000)

    def refused(*_: object) -> None:
        raise AssertionError("a frame is decoded")

    monkeypatch.setattr("lit_vlm.data.records.film.Film.frame", refused)
    assert encode.measure(source.outline(0), source)[1] == 8
    with pytest.raises(AssertionError, match="a frame is decoded"):
        encode(source.record(0), tmp_path)
