"""Sources by name: a flag or a file changes one of them, and what is wrong is said of that one. Template `auto`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from lit_vlm.commands.cli import lightning_cli, main
from lit_vlm.commands.diff import resolved
from lit_vlm.commands.recipe import find_recipe

NAMED = """
data:
  train:
    docs: {class_path: lit_vlm.data.Mmc4, init_args: {path: /docs, max_images: 6}}
    pairs:
      class_path: lit_vlm.data.Grouped
      init_args: {size: 3, source: {class_path: lit_vlm.data.WebDataset, init_args: {path: /pairs}}}
"""
LISTED = "data: {train: [{class_path: lit_vlm.worlds.Shapes, init_args: {count: 7}}]}"
BASE = [
    word for file in find_recipe("llava15").configs("1_align", "tiny", "single") for word in ("--config", str(file))
]


@pytest.fixture
def given(tmp_path: Path) -> Any:
    """The sources that files of this content, and flags, give."""

    def sources(*words: str) -> Any:
        arguments = list(BASE)
        for number, word in enumerate(words):
            if "\n" in word or word.startswith("data:"):
                (tmp_path / f"{number}.yaml").write_text(word)
                arguments += ["--config", str(tmp_path / f"{number}.yaml")]
            else:
                arguments.append(word)
        return resolved(arguments)["data"]["train"]

    return sources


def test_auto_is_the_decoders_own_template_but_where_a_stage_aligns_with_captions() -> None:
    def template(stage: str, *words: str) -> dict[str, Any]:
        files = find_recipe("llava15").configs(stage, "tiny", "single")
        configs = [word for file in files for word in ("--config", str(file))]
        return dict(resolved([*configs, *words])["data"]["template"])

    kept = template("1_align", "--data.template=auto")
    assert kept["class_path"].endswith("Plain")
    assert kept == template("1_align")
    dated = template("2_sft", "--data.template", "auto", *dated_flags("today"))
    assert dated["class_path"] == "lit_vlm.data.HFChat"
    assert dated["init_args"]["date"] == "today"
    assert dated == template("2_sft", "--data.template", "HFChat", *dated_flags("today"))
    assert dated == template("2_sft", "--data.template", "HFChat", *dated_flags("today"), "--data.template", "auto")


def dated_flags(day: str) -> list[str]:
    return ["--data.template.init_args.date", day]


def test_a_file_may_say_auto(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("data: {template: auto}")
    found = resolved([*BASE, "--data.template", "ChatML", "--config", str(tmp_path / "own.yaml")])["data"]["template"]
    assert found["class_path"] == "lit_vlm.data.HFChat"


def arguments_of(source: dict[str, Any]) -> dict[str, Any]:
    return source["init_args"]


def test_a_file_changes_one_source_and_keeps_the_others(given: Any) -> None:
    found = given(NAMED, "data: {train: {docs: {init_args: {loss: after_image}}, more: /more.json}}")
    assert list(found) == ["docs", "pairs", "more"]
    kept = {"path": "/docs", "max_images": 6, "loss": "after_image"}
    assert arguments_of(found["docs"]).items() >= kept.items()
    assert found["pairs"] == given(NAMED)["pairs"]
    assert found["more"] == "/more.json"
    inner = given(NAMED, "data: {train: {docs: null, pairs: {init_args: {source: {init_args: {path: /x}}}}}}")
    assert inner["docs"] is None
    assert arguments_of(inner["pairs"])["size"] == 3
    assert arguments_of(arguments_of(inner["pairs"])["source"])["path"] == "/x"


def test_a_list_takes_the_place_of_names_and_names_that_of_a_list(given: Any) -> None:
    assert given(NAMED, LISTED) == given(LISTED)
    assert given(LISTED, NAMED) == given(NAMED)


def test_a_flag_changes_adds_or_removes_one_source(given: Any) -> None:
    flags = ["--data.train.docs.max_images", "2", "--data.train.pairs.source.path", "/x", "--data.train.more", "Shapes"]
    found = given(NAMED, *flags, "--data.train.more.count", "4", "--data.train.own", "own.json")
    assert list(found) == ["docs", "pairs", "more", "own"]
    assert arguments_of(found["docs"])["max_images"] == 2
    assert arguments_of(arguments_of(found["pairs"])["source"])["path"] == "/x"
    assert arguments_of(found["more"])["count"] == 4
    assert found["own"] == "own.json"
    assert given(NAMED, "--data.train.docs", "null")["docs"] is None
    assert given(NAMED, "--data.train", "own.json") == "own.json"
    assert arguments_of(given(LISTED, "--data.train.count", "9")[0])["count"] == 9


def test_anchors_say_the_folder_of_many_files_once(given: Any) -> None:
    text = """
data:
  train:
    a:
      class_path: &reader lit_vlm.data.LlavaJson
      init_args: &sets {path: "${.image_folder}/a.json", image_folder: "${oc.env:NOT_SET,/root}", system: ""}
    b: {class_path: *reader, init_args: {<<: *sets, path: "${.image_folder}/b.json"}}
"""
    found = given(text)
    assert [arguments_of(found[name])["path"] for name in "ab"] == ["/root/a.json", "/root/b.json"]
    assert arguments_of(found["b"])["system"] == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--data.train.pics.path", "/x"],
            "data.train has no source 'pics' whose settings could change; sources: docs, ",
        ),
        (["data: {train: {pics: {init_args: {path: /x}}}}"], "data.train has no source 'pics' whose settings could "),
        (["--data.train.docs.pth", "/x"], "data.train.docs: Mmc4 has no argument 'pth' (did you mean 'path'?)"),
        (
            ["--data.train.docs", '{"class_path": "Shapes", "init_args": {"cont": 3}}'],
            "data.train.docs: Shapes has no argument 'cont' (did you mean 'count'?)",
        ),
        (
            ["--data.train", '[{"class_path": "Shpes"}]'],
            "data.train.0: there is no class 'Shpes' (did you mean 'Sh",
        ),
        (["data: {train: [{class_path: Shpes}]}"], "data.train.0: there is no class 'Shpes' (did you mean 'Sh"),
        (
            ["--data.train+", "Shapes"],
            "adds to a list of sources, and these have names (docs, pairs): add one by a name",
        ),
        ([LISTED, "--data.train.pics.path", "/x"], "data.train is a list of sources without names here"),
    ],
)
def test_what_is_wrong_is_said_of_one_source(given: Any, words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as said:
        given(NAMED, *words)
    assert "Union" not in str(said.value)


@pytest.mark.filterwarnings("ignore:LightningCLI.s args parameter")
def test_a_run_on_own_data_needs_no_yaml_and_its_config_gives_the_same(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "a grey picture"}]
    rows = [{"id": str(number), "image": "grey.png", "conversations": turns} for number in range(4)]
    (tmp_path / "mine.json").write_text(json.dumps(rows))
    Image.new("RGB", (30, 40), "grey").save(tmp_path / "grey.png")
    own = ["--data.train", '{"shapes": {"class_path": "Shapes"}}', "--data.train.mine", str(tmp_path / "mine.json")]
    quick = ["--trainer.max_steps", "1", "--trainer.limit_val_batches", "0", "--trainer.logger", "false"]
    main(["fit", *BASE, *own, "--data.train.shapes", "null", *quick, "--trainer.accelerator", "cpu",
          "--trainer.default_root_dir", str(tmp_path / "run")])  # fmt: skip
    saved = tmp_path / "run" / "config.yaml"
    assert yaml.safe_load(saved.read_text())["data"]["train"] == {"shapes": None, "mine": str(tmp_path / "mine.json")}
    cli = lightning_cli(["fit", "--config", str(saved), "--trainer.default_root_dir", str(tmp_path / "again")])
    assert [(source.name, len(source)) for source in cli.datamodule.train_sources] == [("mine", 4)]


@pytest.mark.filterwarnings("ignore:LightningCLI.s args parameter")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("mine.xml", r"data.train: mine.xml: the ending '.xml' is not known: name its reader, as in --data.train.NAME"),
        ("none.json", r"data.train: there is no none.json"),
        ('{"a": {"class_path": "Shpes"}}', r"data.train.a: there is no class 'Shpes' \(did you mean 'Shapes'"),
    ],
)
def test_a_dry_run_says_what_cannot_be_read(
    given: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.xml").write_text("<a/>")
    with pytest.raises(SystemExit, match="1"):
        main(["run", "llava15", "--scale", "tiny", "--stages", "1_align", "--dry-run", "--data.train", given])
    assert re.search(message, " ".join(capsys.readouterr().out.split()))
