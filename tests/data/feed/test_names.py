"""Names of sources: one for each, from their paths, the same on every machine and every time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from mlflow.utils.validation import _validate_metric_name

from lit_vlm.core.metric_names import safe_name
from lit_vlm.data import VLMData
from lit_vlm.data.feed.mixture import Weighted
from lit_vlm.data.feed.names import name_key, tell_apart
from lit_vlm.data.sample.templates import ChatML
from lit_vlm.data.sample.transforms import Native
from lit_vlm.data.sources import ChatJsonl, Converted, Grouped, LlavaJson, Source, Texts
from lit_vlm.worlds import Scenes, Shapes

ROW = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}


def llava(file: Path, name: str | None = None) -> LlavaJson:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps([ROW]))
    return LlavaJson(str(file), name=name)


def names(sources: list[Source]) -> list[str]:
    tell_apart(sources)
    for source in sources:
        _validate_metric_name(f"data/samples/{safe_name(source.name)}")
    keys = [name_key(source.name) for source in sources]
    assert len(set(keys)) == len(keys)
    return [source.name for source in sources]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["docvqa/val.json", "chartqa/val.json"], ["docvqa-val", "chartqa-val"]),
        (["docvqa/val.json", "chartqa/test.json"], ["val", "test"]),
        (["a/x/val.json", "b/x/val.json", "b/y/val.json"], ["a-x-val", "b-x-val", "b-y-val"]),
        (["mix.json", "mix.jsonl"], ["mix.json", "mix.jsonl"]),
        (["v1.5.json", "v1.6.json"], ["v1.5", "v1.6"]),
        (["mix (1).json", "mix.json"], ["mix (1)", "mix"]),
        (["mix (1).json", "mix [1].json"], ["mix (1)", "mix [1]-2"]),
        (["训练集.json", "验证集.json"], ["训练集", "验证集"]),
        (["a/Val.json", "b/val.json"], ["a-Val", "b-val"]),
        (["d/val.json", "c/val.json", "d-val.json"], ["{}-d-val", "{}-c-val", "d-val"]),
        (["x/d/val.json", "y/d/val.json", "x/d/val.json"], ["val", "val-2", "val-3"]),
    ],
)
def test_names_come_from_paths(files: list[str], expected: list[str], tmp_path: Path) -> None:
    found = names([llava(tmp_path / file) for file in files])
    assert found == [name.format(tmp_path.name) for name in expected]


def test_a_given_name_wins_and_equal_ones_are_an_error(tmp_path: Path) -> None:
    given, other = llava(tmp_path / "a/val.json", "val"), llava(tmp_path / "b/val.json")
    assert names([other, given]) == ["val.json", "val"]
    again = llava(tmp_path / "c/val.json", "VAL")
    with pytest.raises(ValueError, match=r"named 'val' \(LlavaJson of .*a/val\.json\) and 'VAL' \(.*c/val\.json\)"):
        tell_apart([given, again])
    with pytest.raises(ValueError, match="would be one metric"):
        tell_apart([llava(tmp_path / "d.json", "a(1)"), llava(tmp_path / "e.json", "a[1]")])
    assert names([llava(tmp_path / "d.json", "a:1"), llava(tmp_path / "e.json", "a_1")]) == ["a:1", "a_1"]


@pytest.mark.parametrize("name", ["", " ", ".", "..", "a/../b", "/a", "a/", "a//b", "x" * 200])
def test_a_name_that_no_metric_can_have_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot be part of a metric's name: set init_args\.name"):
        tell_apart([llava(tmp_path / "a.json", name)])


@pytest.mark.parametrize("path", [".", "./", "../d", "./."])
def test_a_folder_by_its_place_has_the_name_of_the_folder(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "train.jsonl").write_text('{"text": "a"}')
    monkeypatch.chdir(tmp_path / "d")
    assert Texts(path).name == "d"


def test_a_long_file_name_is_cut(tmp_path: Path) -> None:
    found = names([llava(tmp_path / f"{'x' * 200}{n}.json") for n in range(2)])
    assert [name[:150] for name in found] == ["x" * 150] * 2


def test_what_no_path_tells_apart_is_numbered(tmp_path: Path) -> None:
    assert names([Shapes(), Shapes(seed=1), Scenes("captions", 3)]) == ["shapes", "shapes-2", "scenes_captions"]
    (tmp_path / "a.jsonl").write_text('{"text": "a"}')
    (tmp_path / "b").mkdir()
    (tmp_path / "b/a.jsonl").write_text('{"text": "a"}')
    grouped: list[Source] = [Grouped(Texts(str(tmp_path / name)), 1) for name in ("a.jsonl", "b/a.jsonl")]
    assert names(grouped) == [f"{tmp_path.name}-a", "b-a"]


def test_ids_do_not_depend_on_the_other_sources(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "t.jsonl").write_text('{"text": "a"}')
    sources = [Texts(str(tmp_path / folder / "t.jsonl")) for folder in ("a", "b")]
    before = [source.record(0).id for source in (*sources, Grouped(sources[0], 1))]
    tell_apart(sources)
    assert [source.record(0).source for source in sources] == ["a-t", "b-t"]
    assert [source.record(0).id for source in (*sources, Grouped(sources[0], 1))][:2] == before[:2]


def data(train: list[Source], val: list[Source], **options: Any) -> VLMData:
    return VLMData(train, ChatML(), Native(), val=val, **options)


def test_held_out_sources_have_names_of_their_own(tmp_path: Path) -> None:
    def sources() -> tuple[list[Source], list[Source]]:
        train: list[Source] = [llava(tmp_path / "train/docvqa.json"), llava(tmp_path / "mix/docvqa.json")]
        val: list[Source] = [llava(tmp_path / f"{name}/val.json") for name in ("docvqa", "chartqa")]
        return train, [*val, llava(tmp_path / "train-docvqa.json")]

    found = data(*sources())
    assert [source.name for source in found.train_sources] == ["train-docvqa", "mix-docvqa"]
    assert [source.name for source in found.val_sources] == ["docvqa-val", "chartqa-val", "train-docvqa.json"]
    # A source that reads the same, drawn or from a file, is reported in both places under one name, ...
    same = data([llava(tmp_path / "a.json"), Shapes()], [llava(tmp_path / "a.json"), Shapes(seed=1)])
    assert [source.name for source in same.val_sources] == ["a", "shapes"]
    # ... but not beside the share of the training source that is held out.
    apart = data([Shapes(64)], [Shapes(8, seed=1)], held_out=0.5)
    assert [source.name for source in apart.val_sources] == ["shapes-2", "shapes"]
    with pytest.raises(ValueError, match="two sources are named 'a'"):
        data([llava(tmp_path / "a.json", "a")], [llava(tmp_path / "b.json", "a")], held_out=0.5)


def test_weights_go_by_the_name_that_is_seen(tmp_path: Path) -> None:
    found = data([llava(tmp_path / "mix (1).json"), llava(tmp_path / "mix.json")], [])
    assert Weighted({"mix (1)": 3.0, "mix": 1.0}, samples=4).counts(found.train_sources) == [3, 1]


def test_a_converted_set_is_named_after_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lit_vlm.data.sets.convert import convert

    (tmp_path / "a.jsonl").write_text('{"messages": [{"role": "user", "content": "q"}]}')
    convert(ChatJsonl(str(tmp_path / "a.jsonl")), tmp_path / "set.v1")
    monkeypatch.chdir(tmp_path / "set.v1")
    assert Converted(".").name == Converted(str(tmp_path / "set.v1")).name == "set.v1"
