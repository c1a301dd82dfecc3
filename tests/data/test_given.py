"""Sources as a config gives them: by name, as a list, as a path."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from lit_vlm.data import ChatML, Converted, Grouped, LlavaJson, Pictures, Resize, Texts, VLMData
from lit_vlm.data.given import DataPath, as_sources
from lit_vlm.data.sets.convert import convert
from lit_vlm.data.sets.engine import Local
from lit_vlm.worlds import Scenes, Shapes


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder of files in known forms, and one that is not."""
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    (tmp_path / "mine.json").write_text(json.dumps([{"id": "1", "conversations": turns}]))
    (tmp_path / "text.jsonl").write_text('{"text": "a text"}\n')
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "pictures" / "1.png")
    (tmp_path / "strange.xml").write_text("<a/>")
    (tmp_path / "strange.jsonl").write_text('{"prompt": "q"}\n')
    return tmp_path


def test_sources_of_a_mapping_go_by_their_names(files: Path) -> None:
    given = {
        "first": Shapes(4),
        "gone": None,
        "second": Shapes(4, seed=1),
        "grouped": Grouped(Scenes("captions", 8, name="inner")),
        "own": DataPath(str(files / "mine.json")),
    }
    data = VLMData(given, ChatML(), Resize(), val={"first": Shapes(2)})
    assert [source.name for source in data.train_sources] == ["first", "second", "grouped", "own"]
    assert [source.name for source in data.val_sources] == ["first"]
    assert data.train_sources[2].record(0).source == "grouped"
    assert {type(source) for source in data.train_sources} == {Shapes, Grouped, LlavaJson}


@pytest.mark.parametrize(("name", "reader"), [("mine.json", LlavaJson), ("text.jsonl", Texts), ("pictures", Pictures)])
def test_a_path_is_read_as_data_convert_would(name: str, reader: type, files: Path) -> None:
    (source,) = as_sources(DataPath(str(files / name)), "data.train")
    assert type(source) is reader
    assert source.name == Path(name).stem
    assert not source.named


def test_a_path_may_be_a_converted_set(files: Path) -> None:
    convert(LlavaJson(str(files / "mine.json")), files / "set", Local(1))
    (source,) = as_sources(DataPath(str(files / "set")), "data.val")
    assert type(source) is Converted
    assert len(source) == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.json", r"data.train.own: there is no .*none.json"),
        (
            "strange.xml",
            r"data.train.own: .*'.xml' is not known: name its reader, as in --data.train.own LlavaJson --d",
        ),
        ("strange.jsonl", r"data.train.own: .*\['prompt'\] is not known.*: name its reader, as in --data.train.own "),
    ],
)
def test_a_path_that_is_not_recognised_names_the_flag(name: str, message: str, files: Path) -> None:
    with pytest.raises(ValueError, match=message):
        as_sources({"own": DataPath(str(files / name))}, "data.train")


def test_a_single_path_that_is_not_recognised_names_the_key(files: Path) -> None:
    with pytest.raises(ValueError, match=r"data.val: .*as in --data.val.NAME LlavaJson --data.val.NAME.path"):
        as_sources(DataPath(str(files / "strange.xml")), "data.val")


@pytest.mark.parametrize("name", ["mix.1", "."])
def test_a_name_with_a_dot_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"data.train has the name '{re.escape(name)}'; names have no dot"):
        as_sources({name: Shapes(4)}, "data.train")


@pytest.mark.parametrize("text", ["[a]", ' {"a": 1}', ""])
def test_json_is_no_path(text: str) -> None:
    with pytest.raises(ValueError, match="is not the path of a file or folder"):
        DataPath(text)
