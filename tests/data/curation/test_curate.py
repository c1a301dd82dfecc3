"""Whole curations: what is kept, dropped and written; the same bytes for any workers, and after a stop anywhere."""

from __future__ import annotations

import time
from multiprocessing import get_context
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image as PILImage

from lit_vlm.data.curation import Curation, Format, Sample, Score, Size, Step, Text, Verdict, curate
from lit_vlm.data.curation.measuring import measured
from lit_vlm.data.curation.pictures import PictureScore, PictureSize
from lit_vlm.data.curation.sampling import RecordHash
from lit_vlm.data.curation.selected import Selected
from lit_vlm.data.curation.sheet import said_of
from lit_vlm.data.records import Record, RecordError
from lit_vlm.data.sets.engine import Local, Place
from lit_vlm.data.sources import Captions, Converted, Pictures
from tests.data.curation.planted import CAPTION, Brightness, captions, encoded
from tests.data.made import Count


def tree(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def planted(folder: Path) -> Curation:
    """Two sources with a fault of each kind among good records, and steps that find them."""
    good = [(encoded(seed=seed), f"{CAPTION} {seed}") for seed in range(40)]
    faults = [(encoded((12, 30)), CAPTION), (b"no picture", CAPTION), (encoded(), "dog"), (encoded(level=255), CAPTION)]
    first = captions(folder / "first", [*good[:20], *faults, *good[20:30]], name="first")
    second = captions(folder / "second", [*faults[::-1], *good[30:]], name="second")
    steps = (Size(min_side=20), Text(min_words=3), Score(Brightness(), max_score=0.9), Sample(quotas={"first": 25}))
    return Curation("mix", (first, second), steps, seed=3)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Curation, Path, dict[str, Any]]:
    """A curation by one process: what was asked, the folder, the report."""
    folder = tmp_path_factory.mktemp("whole")
    curation = planted(folder)
    return curation, folder, curate(curation, folder / "out", folder / "m")


def test_each_planted_fault_is_found_and_the_rest_is_kept(whole: tuple[Curation, Path, dict[str, Any]]) -> None:
    curation, folder, report = whole
    made = Converted(str(folder / "out"))
    kept = [made.record(index) for index in range(len(made))]
    by_source = {name: [r.id.split("/")[1] for r in kept if r.id.startswith(name)] for name in ("first", "second")}
    assert by_source["second"] == [f"{number}.img" for number in range(4, 14)]
    assert len(by_source["first"]) == 25
    assert not set(by_source["first"]) & {f"{number}.img" for number in range(20, 24)}
    first, number = curation.sources[0], int(by_source["first"][7].split(".")[0])
    same = first.record(number)
    assert [m.text for m in kept[7].messages] == [m.text for m in same.messages]
    assert kept[7].images[0].data == (folder / "first" / f"{number}.img").read_bytes()
    counts = {row["step"]: (row["in"], row["dropped"], row["kept"]) for row in report["steps"]}
    assert counts == {
        "1 Size": (46, {"min_side": 2}, 44),
        "2 Text": (44, {"min_words": 2}, 42),
        "3 Score": (42, {"max_score": 2}, 40),
        "4 Sample": (40, {"not_drawn": 5}, 35),
    }
    assert report["read"] == {"in": 48, "dropped": {"corrupt_image": 2}, "kept": 46}
    assert report["steps"][3]["by_source"]["first"] == {"in": 30, "dropped": {"not_drawn": 5}, "kept": 25}
    assert report["steps"][0]["values"] == {"label": "shorter side (px)", "min": 12.0, "median": 30.0, "max": 30.0}
    assert {name: source["kept"] for name, source in report["sources"].items()} == {"first": 25, "second": 10}
    assert report["set"] == {"records": 35, "fingerprint": made.fingerprint()}


def test_everything_that_was_dropped_is_listed_with_its_reason(whole: tuple[Curation, Path, dict[str, Any]]) -> None:
    _, folder, _ = whole
    rows = pq.read_table(folder / "out" / "dropped.parquet").to_pylist()
    assert len(rows) == 48 - 35
    told = {(row["source"], row["id"]): (row["step"], row["reason"], row["value"]) for row in rows}
    assert told["first", "20.img"] == ("1 Size", "min_side", 12.0)
    assert told["first", "22.img"] == ("2 Text", "min_words", 1.0)
    assert told["second", "0.img"] == ("3 Score", "max_score", 1.0)
    unread = next(row for row in rows if (row["source"], row["id"]) == ("second", "2.img"))
    assert unread | {"detail": ""} == {
        "source": "second",
        "id": "2.img",
        "step": "read",
        "reason": "corrupt_image",
        "value": None,
        "detail": "",
    }
    assert "2.img: cannot identify its format" in unread["detail"]
    assert sum(step == "4 Sample" for step, _, _ in told.values()) == 5


def test_sheets_show_dropped_and_kept(whole: tuple[Curation, Path, dict[str, Any]]) -> None:
    _, folder, _ = whole
    sheets = sorted((folder / "out" / "sheets").iterdir())
    assert [file.name for file in sheets] == ["1-Size.png", "2-Text.png", "3-Score.png", "4-Sample.png"]
    with PILImage.open(sheets[2]) as sheet:
        picture = sheet.convert("L")
    width, height = picture.size
    # What the third step dropped is white, and so its half has far fewer dark pixels than that of the kept noise.
    halves = [picture.crop((x, 0, x + width // 2, height)).histogram() for x in (0, width // 2)]
    dark = [sum(histogram[:200]) for histogram in halves]
    assert dark[0] < 0.1 * dark[1]


def test_a_sheet_says_reason_and_value_and_no_label_of_a_missing_value() -> None:
    verdict = Verdict(np.array([0, 0, 1, 1], np.int8), ("duplicate",), np.array([0.5, np.nan, 0.25, np.nan]), "cosine")
    told = [said_of(verdict, entry) for entry in range(4)]
    assert told == ["cosine: 0.5", "", "duplicate: 0.25", "duplicate"]


def test_workers_write_the_same_bytes(whole: tuple[Curation, Path, dict[str, Any]], tmp_path: Path) -> None:
    curation, folder, _ = whole
    curate(curation, tmp_path / "out", tmp_path / "m", Local(2))
    assert tree(tmp_path / "out") == tree(folder / "out")
    assert tree(tmp_path / "m") == tree(folder / "m")


def test_the_same_command_again_reads_nothing_and_other_steps_measure_what_is_new(
    whole: tuple[Curation, Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    curation, folder, report = whole
    read: list[int] = []
    plain = Captions.record
    monkeypatch.setattr(Captions, "record", lambda self, index: read.append(index) or plain(self, index))
    assert curate(curation, folder / "out", folder / "m") == report
    assert read == []
    other = Curation("mix", curation.sources, (Size(min_side=25), Text(min_words=4)), seed=3)
    curate(other, tmp_path / "other", folder / "m")
    assert len(read) < 48 + 45  # those that are written and those on sheets, but no pass over all before
    table = measured(curation.sources, [PictureSize(), PictureScore(Brightness(2.0))], folder / "m")
    assert len(table.column(PictureScore(Brightness(2.0)), "score")) == 46


def test_measures_of_unreadable_records_are_zeros_and_pictures_keep_their_records(tmp_path: Path) -> None:
    curation = planted(tmp_path)
    table = measured(curation.sources, [PictureSize(), RecordHash()], tmp_path / "m")
    assert len(table) == 48
    assert sorted(set(range(48)) - set(table.readable.tolist())) == [21, 36]
    hashes = table.column(RecordHash(), "hash")
    assert [index for index in range(48) if hashes[index] == 0] == [21, 36]
    widths = table.column(PictureSize(), "width")
    assert widths[table.offsets[20] : table.offsets[21]].tolist() == [12]
    assert table.offsets[21] == table.offsets[22]
    assert [(start, len(piece)) for start, piece in table.pieces(PictureSize(), "width")] == [(0, 31), (31, 15)]


class Noted(Count):
    """Takes its time for a record, and writes down that it was read; every tenth is malformed."""

    def __init__(self, log: Path, pause: float) -> None:
        super().__init__("n", 300)
        self._log, self._pause = log, pause

    def record(self, index: int) -> Record:
        time.sleep(self._pause)
        with self._log.open("a") as file:
            file.write(f"{index}\n")
        if index % 10 == 0:
            raise RecordError("malformed", f"the {index}th")
        return super().record(index)


STEPS: tuple[Step, ...] = (Text(blocked=["7"]), Sample(total=40))


def _curate(folder: Path, pause: float, number: int, total: int) -> None:
    curation = Curation("n", (Noted(folder / "log", pause),), STEPS)
    curate(curation, folder / "out", folder / "m", Local(0, Place(number, total)))


def begun(folder: Path, pause: float = 0.0, number: int = 0, total: int = 1) -> ForkProcess:
    folder.mkdir(exist_ok=True)
    process = get_context("fork").Process(target=_curate, args=(folder, pause, number, total))
    process.start()
    return process


@pytest.mark.parametrize("records", [100, pytest.param(310, marks=pytest.mark.slow)])
def test_one_that_is_killed_goes_on_and_writes_the_same(records: int, tmp_path: Path) -> None:
    process = begun(tmp_path / "whole")
    process.join(60)
    killed = begun(tmp_path / "killed", pause=0.005)
    log = tmp_path / "killed" / "log"
    while not log.exists() or log.read_text().count("\n") < records:  # in the first pass, or in the third
        assert killed.is_alive()
        time.sleep(0.01)
    killed.kill()
    killed.join()
    assert not (tmp_path / "killed" / "out" / "curation.json").exists()
    before = log.read_text().count("\n")
    again = begun(tmp_path / "killed")
    again.join(60)
    assert tree(tmp_path / "killed" / "out") == tree(tmp_path / "whole" / "out")
    assert tree(tmp_path / "killed" / "m") == tree(tmp_path / "whole" / "m")
    whole = (tmp_path / "whole" / "log").read_text().count("\n")
    assert log.read_text().count("\n") - before < whole - 32  # blocks that were whole are not read again


@pytest.mark.slow
def test_tasks_share_the_work(tmp_path: Path) -> None:
    for process in [begun(tmp_path / "two", 0.002, number, 2) for number in range(2)]:
        process.join(60)
        assert process.exitcode == 0
    alone = begun(tmp_path / "one")
    alone.join(60)
    assert tree(tmp_path / "two" / "out") == tree(tmp_path / "one" / "out")


def test_a_step_that_drops_everything_is_told_and_nothing_is_written(tmp_path: Path) -> None:
    curation = planted(tmp_path)
    steps = (Text(min_words=2), Size(min_side=4000))
    told = (
        r"step 2 Size drops all 44 records that came to it \(min_side 44\); shorter side \(px\): 12 to 30, median 30: "
        "change its settings; nothing was written"
    )
    with pytest.raises(ValueError, match=told):
        curate(Curation("mix", curation.sources, steps), tmp_path / "out", tmp_path / "m")
    assert not (tmp_path / "out").exists()
    assert not [file for file in (tmp_path / "m").iterdir() if "decided" in file.name]


def test_sources_of_which_nothing_can_be_read_are_told(tmp_path: Path) -> None:
    source = captions(tmp_path, [(b"", CAPTION), (b"x", CAPTION)], name="broken")
    with pytest.raises(ValueError, match=r"none of the 2 records of broken can be read: .'corrupt_image': 2"):
        curate(Curation("x", (source,), (Size(min_side=2),)), tmp_path / "out", tmp_path / "m")


def test_folders_that_hold_something_else_are_refused(
    whole: tuple[Curation, Path, dict[str, Any]], tmp_path: Path
) -> None:
    curation, folder, _ = whole
    other = Curation("mix", curation.sources, (Format(min_bytes=1),))
    with pytest.raises(ValueError, match="holds the result of another curation"):
        curate(other, folder / "out", folder / "m")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="is not empty"):
        curate(other, tmp_path / "full", folder / "m")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(encoded())
    inside = Curation("mix", (Pictures(str(tmp_path / "pictures")),), other.steps)
    with pytest.raises(ValueError, match="lies inside the source"):
        curate(inside, tmp_path / "pictures" / "out", folder / "m")
    with pytest.raises(ValueError, match="pictures/m lies inside the source"):
        curate(inside, tmp_path / "out", tmp_path / "pictures" / "m")
    for measures in ("out", "out/m"):
        with pytest.raises(ValueError, match="which is to hold the new set alone"):
            curate(inside, tmp_path / "out", tmp_path / measures)
    assert not (tmp_path / "out").exists()


def test_pictures_that_vanish_in_between_are_told(tmp_path: Path) -> None:
    curation = planted(tmp_path)
    measured(curation.sources, [m for step in curation.steps for m in step.measures()], tmp_path / "m")
    (tmp_path / "second" / "9.img").unlink()
    with pytest.raises(ValueError, match="records that were measured cannot be read any more, see .*bad_samples.jsonl"):
        curate(curation, tmp_path / "out", tmp_path / "m")


def test_what_wrote_the_captions_of_several_sources_is_kept_by_source() -> None:
    one, two = Count("one", 3), Count("two", 3)
    two.captions = {"model": {"name": "llava"}}
    kept = np.arange(3)
    assert Selected([two], kept, "all").captions == two.captions
    assert Selected([one, two], kept, "all").captions == {"two": two.captions}
    assert Selected([one], kept, "all").captions is None
