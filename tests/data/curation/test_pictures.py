"""Steps that look at pictures: exact limits, several pictures in a record, none, and bad classifiers."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PILImage

from lit_vlm.data.curation import Format, Score, Size
from lit_vlm.data.curation.measuring import measured
from lit_vlm.data.curation.pictures import PictureSize
from lit_vlm.data.sources import ChatJsonl
from tests.data.curation.planted import CAPTION, Brightness, Unfinished, captions, encoded, verdict_of


def test_limits_of_sizes_are_met_exactly(tmp_path: Path) -> None:
    sizes = [(32, 32), (31, 64), (64, 31), (32, 97), (96, 32), (200, 32)]
    source = captions(tmp_path, [(encoded(size), CAPTION) for size in sizes])
    dropped, verdict = verdict_of(Size(min_side=32, min_area=1025, max_aspect=3), source, tmp_path / "m")
    assert dropped == {
        "0.img": "min_area",
        "1.img": "min_side",
        "2.img": "min_side",
        "3.img": "max_aspect",
        "5.img": "max_aspect",
    }
    np.testing.assert_allclose(verdict.values, [1024, 31, 31, 97 / 32, 32, 200 / 32])


def test_a_record_has_the_size_of_its_worst_picture_and_texts_stay(tmp_path: Path) -> None:
    lines = []
    for index, sizes in enumerate([[(40, 40), (40, 10)], [(40, 40), (50, 50)], [], [(9, 40)]]):
        names = [f"{index}-{number}.png" for number in range(len(sizes))]
        for name, size in zip(names, sizes, strict=True):
            (tmp_path / name).write_bytes(encoded(size))
        content = [*({"type": "image", "image": name} for name in names), {"type": "text", "text": "?"}]
        turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "yes"}]
        lines.append(json.dumps({"id": f"r{index}", "messages": turns}))
    (tmp_path / "chat.jsonl").write_text("\n".join(lines))
    dropped, verdict = verdict_of(Size(min_side=20), ChatJsonl(str(tmp_path / "chat.jsonl")), tmp_path / "m")
    assert dropped == {"r0": "min_side", "r3": "min_side"}
    np.testing.assert_equal(verdict.values, [10, 40, np.nan, 9])


def test_the_size_is_that_of_the_upright_picture(tmp_path: Path) -> None:
    turned = io.BytesIO()
    exif = PILImage.Exif()
    exif[274] = 6
    PILImage.new("RGB", (60, 20)).save(turned, "JPEG", exif=exif)
    source = captions(tmp_path, [(turned.getvalue(), CAPTION)])
    table = measured([source], [PictureSize()], tmp_path / "m")
    assert [table.column(PictureSize(), name).tolist() for name in ("width", "height")] == [[20], [60]]


def test_encodings_small_files_and_animations_are_dropped(tmp_path: Path) -> None:
    moving = io.BytesIO()
    frames = [PILImage.new("RGB", (40, 30), (level, 0, 0)) for level in (0, 90, 180)]
    frames[0].save(moving, "GIF", save_all=True, append_images=frames[1:])
    entries = [encoded(form="PNG"), encoded(form="JPEG"), encoded(form="BMP"), encoded(form="PNG", level=7)]
    source = captions(tmp_path, [(content, CAPTION) for content in [*entries, moving.getvalue()]])
    step = Format(formats=["PNG", "JPEG", "GIF"], min_bytes=200, animated=False)
    dropped, verdict = verdict_of(step, source, tmp_path / "m")
    assert dropped == {"2.img": "formats", "3.img": "min_bytes", "4.img": "animated"}
    assert verdict.values.tolist() == [len(content) for content in [*entries, moving.getvalue()]]
    assert verdict_of(Format(animated=False), source, tmp_path / "m")[0] == {"4.img": "animated"}


def test_scores_of_a_class_from_outside_decide(tmp_path: Path) -> None:
    source = captions(tmp_path, [(encoded(level=level), CAPTION) for level in (0, 51, 102, 255)])
    step = Score(Brightness(), min_score=0.1, max_score=0.5)
    dropped, verdict = verdict_of(step, source, tmp_path / "m")
    assert dropped == {"0.img": "min_score", "3.img": "max_score"}
    np.testing.assert_allclose(verdict.values, [0, 0.2, 0.4, 1], atol=1e-6)
    squared, _ = verdict_of(Score(Brightness(2.0), max_score=0.1), source, tmp_path / "m")
    assert squared == {"2.img": "max_score", "3.img": "max_score"}  # other settings are another measure
    with pytest.raises(ValueError, match=r"Unfinished gives scores \[3\] for 4 pictures"):
        verdict_of(Score(Unfinished(), max_score=1), source, tmp_path / "m")


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Size(), "it drops nothing: set min_side or min_area or max_aspect"),
        (lambda: Size(max_aspect=0.5), "at least 1"),
        (lambda: Format(), "set formats or min_bytes"),
        (lambda: Format(formats=["jpg"]), r"formats names \['jpg'\], which Pillow does not read"),
        (lambda: Score(Brightness()), "set min_score or max_score"),
    ],
)
def test_steps_that_make_no_sense_are_refused(make: object, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        make()  # type: ignore[operator]
