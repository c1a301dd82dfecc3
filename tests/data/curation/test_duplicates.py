"""Duplicates and pictures of benchmarks, through whole curations of tiny sources."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from lit_vlm.data import Converted
from lit_vlm.data.curation import Curation, EmbeddingDuplicates, ExactDuplicates, PerceptualDuplicates, Step, curate
from lit_vlm.data.records import Message, Record, Text
from lit_vlm.data.sets.convert import convert
from tests.data.curation.dual import save_clip
from tests.data.curation.pairs import Pairs, field

PLAIN, AGAIN, SMALLER = field(1, quality=90), field(1, quality=70), field(1, quality=90, size=(40, 30))
PNG = field(2)
FIRST = Pairs(
    "first",
    [
        ("a", [PLAIN], "one"),
        ("b", [field(2)], "two"),
        ("c", [PLAIN], "one"),
        ("d", [PLAIN], "another text"),
        ("e", [], "no picture"),
        ("f", [], "no picture"),
    ],
)
SECOND = Pairs(
    "second",
    [
        ("a", [PLAIN], "one"),
        ("g", [AGAIN], "one"),
        ("h", [SMALLER], "one"),
        ("i", [PLAIN, field(2)], "both"),
        ("j", [PLAIN, field(3)], "one is new"),
        ("k", [field(3)], "that one"),
        ("l", [field(4)], "asked for"),
        ("m", [field(5, quality=60), field(6)], "asked for, too"),
    ],
)
BENCH = Pairs("bench", [("q1", [field(4)], "?"), ("q2", [field(5)], "?"), ("q3", [field(4)], "?"), ("q4", [], "?")])


def curated(
    tmp_path: Path, *steps: Step, sources: Sequence[Pairs] = (FIRST, SECOND)
) -> tuple[list[str], dict[str, Any]]:
    """SOURCE:ID of what is kept, and id in `dropped.parquet` → (reason, detail)."""
    out = tmp_path / "out"
    curate(Curation("made", tuple(sources), steps), out, tmp_path / "measures")
    rows = pq.read_table(out / "dropped.parquet").to_pylist()
    dropped = {f"{row['source']}:{row['id']}": (row["reason"], row["detail"]) for row in rows}
    made = Converted(str(out))
    every = [f"{source.name}:{row[0]}" for source in sources for row in source._rows]
    kept = [name for name in every if name not in dropped]
    assert len(made) == len(kept)
    return kept, dropped


def test_equal_bytes_are_dropped_within_and_across_sources(tmp_path: Path) -> None:
    kept, dropped = curated(tmp_path, ExactDuplicates())
    assert {name: detail for name, (_, detail) in dropped.items()} == {
        "first:c": "repeats first:a",
        "first:d": "repeats first:a",
        "second:a": "repeats first:a",
        "second:i": "repeats first:a",
        "second:k": "repeats second:j",
    }
    assert {reason for reason, _ in dropped.values()} == {"duplicate"}
    assert {"second:g", "second:h", "second:j", "first:e", "first:f"} < set(kept)


def test_the_first_source_is_the_one_that_stays(tmp_path: Path) -> None:
    _, dropped = curated(tmp_path, ExactDuplicates(), sources=(SECOND, FIRST))
    assert {name for name in dropped if name.startswith("first")} == {"first:a", "first:b", "first:c", "first:d"}
    assert "second:i" not in dropped


def test_with_the_text_another_question_about_a_picture_stays(tmp_path: Path) -> None:
    _, dropped = curated(tmp_path, ExactDuplicates(same_text=True))
    assert set(dropped) == {"first:c", "second:a"}


def test_equal_pixels_are_found_in_another_encoding(tmp_path: Path) -> None:
    source = Pairs("s", [("png", [PNG], "x"), ("again", [_more_compressed(PNG)], "x"), ("other", [PLAIN], "x")])
    assert curated(tmp_path / "content", ExactDuplicates(), sources=[source])[1] == {}
    assert set(curated(tmp_path / "pixels", ExactDuplicates(by="pixels"), sources=[source])[1]) == {"s:again"}


def _more_compressed(content: bytes) -> bytes:
    import io

    from PIL import Image as PILImage

    buffer = io.BytesIO()
    PILImage.open(io.BytesIO(content)).save(buffer, "PNG", compress_level=0)
    assert buffer.getvalue() != content
    return buffer.getvalue()


def test_pictures_that_were_encoded_or_scaled_anew_are_found(tmp_path: Path) -> None:
    _, dropped = curated(tmp_path, PerceptualDuplicates(radius=6, bits=64))
    assert set(dropped) == {*(f"first:{name}" for name in "cd"), *(f"second:{name}" for name in "aghik")}


def test_pictures_with_close_vectors_are_found(tmp_path: Path) -> None:
    encoder = save_clip(tmp_path / "model")  # to random weights, many pictures are close
    _, dropped = curated(tmp_path, EmbeddingDuplicates(encoder, threshold=0.99999))
    exact = {"first:c", "first:d", "second:a", "second:i", "second:k"}
    assert exact <= set(dropped) <= exact | {"second:g", "second:h"}
    _, all_of_them = curated(tmp_path / "cells", EmbeddingDuplicates(encoder, 0.99999, cells=2, probes=2))
    assert all_of_them == dropped


@pytest.mark.parametrize(
    ("step", "found"),
    [
        (lambda bench, name: ExactDuplicates(against=[bench]), {"l": ["q1", "q3"]}),
        (lambda bench, name: PerceptualDuplicates(8, 64, against=[bench]), {"l": ["q1", "q3"], "m": ["q2"]}),
        (lambda bench, name: EmbeddingDuplicates(name, 0.99999, against=[bench]), {"l": ["q1", "q3"], "m": ["q2"]}),
    ],
)
def test_pictures_of_benchmarks_are_listed_by_question(
    step: Callable[[Pairs, str], Step], found: dict[str, list[str]], tmp_path: Path
) -> None:
    made = step(BENCH, save_clip(tmp_path / "model"))
    _, dropped = curated(tmp_path, made)
    seen = {name: detail for name, (reason, detail) in dropped.items() if reason == "in_benchmark"}
    assert seen == {
        f"second:{name}": f"pictures of {', '.join(f'bench:{question}' for question in questions)}"
        for name, questions in found.items()
    }
    (listed,) = (tmp_path / "out" / "lists").iterdir()
    assert listed.name == f"1-{type(made).__name__}-questions.jsonl"
    pairs = [(row["question"], row["record"]) for row in map(json.loads, listed.read_text().splitlines())]
    wanted = [(f"bench:{question}", f"second:{name}") for name, questions in found.items() for question in questions]
    assert pairs == sorted(wanted)


def test_benchmarks_are_paths_of_files_or_of_converted_sets(tmp_path: Path) -> None:
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "1.png").write_bytes(field(4))
    row = {
        "id": "q",
        "image": "1.png",
        "conversations": [{"from": "human", "value": "<image>\n?"}, {"from": "gpt", "value": "x"}],
    }
    (tmp_path / "bench" / "asked.json").write_text(json.dumps([row]))
    convert(BENCH, tmp_path / "set")
    step = ExactDuplicates(against=[str(tmp_path / "bench" / "asked.json"), str(tmp_path / "set")])
    _, dropped = curated(tmp_path, step)
    assert dropped["second:l"] == ("in_benchmark", "pictures of asked:q, set:q1, set:q3")


def test_a_benchmark_without_pictures_drops_nothing(tmp_path: Path) -> None:
    turn = Message("user", (Text("?"),))

    class Words(Pairs):
        def record(self, index: int) -> Record:
            return Record("w", self.name, (turn, Message("assistant", (Text("!"),))))

    kept, _ = curated(tmp_path, ExactDuplicates(against=[Words("words", [("w", [], "")])]))
    assert "second:l" in kept


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ExactDuplicates(by="looks"), "by is 'looks'"),  # type: ignore[arg-type]
        (lambda: ExactDuplicates(against=["nowhere.json"]), "there is no nowhere.json"),
        (lambda: ExactDuplicates(against=[BENCH, BENCH]), "two benchmarks have the name 'bench'"),
        (lambda: PerceptualDuplicates(bits=100), "bits is 100"),
        (lambda: PerceptualDuplicates(radius=128), "radius is 128"),
    ],
)
def test_settings_that_mean_nothing_are_refused(make: Callable[[], Step], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_thresholds_and_cells_out_of_range_are_refused(tmp_path: Path) -> None:
    name = save_clip(tmp_path / "model")
    with pytest.raises(ValueError, match="threshold is 0"):
        EmbeddingDuplicates(name, threshold=0)
    with pytest.raises(ValueError, match="probes 0"):
        EmbeddingDuplicates(name, threshold=0.9, probes=0)
    with pytest.raises(ValueError, match="cells is 500, and there are 15 pictures"):
        curated(tmp_path, EmbeddingDuplicates(name, threshold=0.9, cells=500))
