"""The mixtures of recipes/data, and `data list`, over data sets on loopback of the same form."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from lit_vlm.commands.cli import main
from lit_vlm.data.given import DataPath, as_sources
from lit_vlm.data.sets.listed import look
from lit_vlm.data.sources import LlavaJson
from tests.data.remote.servers import DataHub, ask_this_hub, running
from tests.data.remote.test_hub import CARD, table
from tests.tiny import ROOT

MIXTURES = ROOT / "recipes" / "data"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DataHub]:
    monkeypatch.setenv("LIT_VLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("lit_vlm.data.remote.store.FIRST_WAIT", 0.01)
    with running(DataHub()) as server:
        ask_this_hub(server, monkeypatch)
        yield server


def rows_of(png: Callable[..., bytes], what: str, ratings: bool) -> bytes:
    """A table as the_cauldron has them, or with the ratings of FineVision."""
    pictures = [] if what.startswith("text_") else [{"bytes": png(), "path": None}]
    talk = {"user": "What is this?", "assistant": f"a {what}"}
    row: dict[str, Any] = {"images": pictures, "texts": [talk if ratings else {**talk, "source": what}]}
    if ratings:
        kinds = ("relevance", "visual_dependency", "image_correspondence", "formatting")
        row |= {"source": what}
        row |= {f"{kind}_ratings": [5] for kind in kinds} | {f"{kind}_min": 5 for kind in kinds}
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    out = io.BytesIO()
    columns = {key: pa.array([row[key]], pa.list_(kind) if key == "images" else None) for key in row}
    pq.write_table(pa.table(columns), out)
    return out.getvalue()


@pytest.mark.parametrize(("mixture", "name"), [("the_cauldron", "the_cauldron"), ("finevision", "FineVision")])
def test_mixtures_of_many_tables(
    mixture: str, name: str, hub: DataHub, png: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = yaml.safe_load((MIXTURES / f"{mixture}.yaml").read_text())["data"]["train"]
    card = {"configs": [{"config_name": one, "data_files": [{"split": "train", "path": f"{one}/train-*"}]}
                        for one in [*given, "one_more"]]}  # fmt: skip
    ratings = mixture == "finevision"
    files = {f"{one}/train-00000-of-00001.parquet": rows_of(png, one, ratings) for one in [*given, "one_more"]}
    hub.commit(f"HuggingFaceM4/{name}", {"README.md": f"---\n{yaml.safe_dump(card)}---\n".encode(), **files})
    some = dict(list(given.items())[:3] + list(given.items())[-3:])
    sources = as_sources({key: DataPath(value) for key, value in some.items()}, "data.train")
    assert [source.name for source in sources] == list(some)
    for source in sources:
        record = source.record(0)
        assert record.messages[-1].text == f"a {source.name}"
        assert len(record.images) == (0 if source.name.startswith("text_") else 1)
    shown = look(f"hf://datasets/HuggingFaceM4/{name}")
    assert [one.config for one in shown.held] == [*given, "one_more"]
    assert {one.form for one in shown.held} == {"Parquet"}
    assert {one.address for one in shown.held} > set(given.values())


def test_the_665k_mix(hub: DataHub, png: Callable[..., bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = [{"from": "human", "value": "<image>\n?"}, {"from": "gpt", "value": "yes"}]
    text = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "no"}]
    rows = [{"id": "1", "image": "coco/train2017/1.jpg", "conversations": talk}, {"id": "2", "conversations": text}]
    files = {"llava_v1_5_mix665k.json": json.dumps(rows).encode(), "other.json": b"[]"}
    hub.commit("liuhaotian/LLaVA-Instruct-150K", files)
    (tmp_path / "pictures" / "coco" / "train2017").mkdir(parents=True)
    (tmp_path / "pictures" / "coco" / "train2017" / "1.jpg").write_bytes(png())
    named = yaml.safe_load((MIXTURES / "llava_665k.yaml").read_text())["data"]["train"]["llava_v1_5_mix665k"]
    assert named["class_path"] == "lit_vlm.data.LlavaJson"
    source = LlavaJson(named["init_args"]["path"], str(tmp_path / "pictures"))
    assert [record.messages[-1].text for record in (source.record(0), source.record(1))] == ["yes", "no"]
    assert (source.image_folder / (source.record(0).images[0].path or "")).is_file()
    # The pictures may lie on the hub, too.
    hub.commit("lab/pictures", {"coco/train2017/1.jpg": png(), "coco/train2017/2.jpg": png()})
    again = LlavaJson(named["init_args"]["path"], "hf://datasets/lab/pictures")
    assert (again.image_folder / "coco" / "train2017" / "1.jpg").is_file()
    assert not (again.image_folder / "coco" / "train2017" / "2.jpg").exists()


def test_data_list(
    hub: DataHub, png: Callable[..., bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    make_tar: Callable[[dict[str, bytes]], bytes],
) -> None:  # fmt: skip
    info = "dataset_info:\n- config_name: talks\n  splits:\n  - name: train\n    num_examples: 77\n"
    told = CARD.replace("configs:", f"{info}configs:")
    hub.commit(
        "lab/drawings",
        {
            "README.md": told.encode(),
            "shapes/train-00000-of-00002.parquet": table(png, "one", "two"),
            "shapes/train-00001-of-00002.parquet": table(png, "three", noise=1 << 20),
            "shapes/test-00000-of-00001.parquet": table(png, "four"),
            "talks/train-00000-of-00001.parquet": table(png, "five"),
            "tars/0.tar": make_tar({"a.png": png()}),
            "mine.jsonl": b'{"messages": []}\n' * 3,
            "odd.parquet": io.BytesIO(b"").getvalue(),
        },
    )
    shown = look("hf://datasets/lab/drawings")
    assert (shown.revision, shown.licence) == (hub.sha("lab/drawings", 0), "cc-by-4.0")
    assert [(one.config, one.split, one.files, one.rows) for one in shown.held] == [
        ("shapes", "train", 2, 3), ("shapes", "test", 1, 1), ("talks", "train", 1, 77)]  # fmt: skip
    assert shown.held[0].columns == ("image", "caption", "id")
    large = [span for path, span in hub.bodies() if path.endswith("00001-of-00002.parquet")]
    assert large
    assert all(large)  # of a table its end is read, not all of it
    assert [one.split for one in look("hf://datasets/lab/drawings#shapes/test").held] == ["test"]
    assert look("hf://datasets/lab/drawings/tars").held[0].form == "WebDataset"
    found = look("hf://datasets/lab/drawings/mine.jsonl").held[0]
    assert (found.form, found.columns, found.size) == ("ChatJsonl", ("messages",), 51)
    main(["data", "list", "hf://datasets/lab/drawings"])
    said = capsys.readouterr().out
    assert "licence: cc-by-4.0" in said
    assert "lit-vlm data convert hf://datasets/lab/drawings#shapes/train OUT" in said
    main(["data", "list", "hf://datasets/lab/drawings#talks", "--json"])
    assert json.loads(capsys.readouterr().out)["held"][0]["rows"] == 77
    for address, error in {
        "hf://datasets/lab/drawings#shapes/dev": "has no split 'dev', only train, test",
        "hf://datasets/lab/drawings#none": "has no configuration 'none', only shapes, talks",
        "hf://datasets/lab/drawings/odd.parquet": "odd.parquet is no parquet file",
        str(tmp_path / "none"): "there is no",
    }.items():
        with pytest.raises(ValueError, match=error):
            look(address)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.parquet").write_bytes(table(png, "one", "two"))
    local = look(str(tmp_path / "mine")).held[0]
    assert (local.form, local.rows) == ("Parquet", 2)
