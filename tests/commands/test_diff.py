"""`inspect --diff`: what differs and nothing else, however it is written; those in the docs are what it prints."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from lit_vlm.commands.cli import main
from lit_vlm.commands.diff import pair_stages, resolved
from lit_vlm.commands.differences import differences
from lit_vlm.commands.recipe import SHIPPED, find_recipe
from tests.tiny import ROOT

RUN = ROOT / "tests" / "fixtures" / "run_93c4961"
DOCUMENTED = re.findall(
    r"^    lit-vlm inspect --diff (\S+) (\S+)\n\n```\n(.*?)\n```$",
    (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8"),
    re.MULTILINE | re.DOTALL,
)
PATHS = {
    name for file in SHIPPED.rglob("*.yaml") for name in re.findall(r"oc\.env:(\w+)", file.read_text(encoding="utf-8"))
}
pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI.s args parameter")


@pytest.fixture(autouse=True)
def default_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PATHS:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def tiny() -> Any:
    """The settings of a stage at its tiny scale, with flags."""
    files = find_recipe("llava15").configs("1_align", "tiny", "single")
    base = [word for file in files for word in ("--config", str(file))]
    return lambda *flags: resolved([*base, *flags])


def rows(first: dict[str, Any], second: dict[str, Any]) -> list[tuple[str, str, str]]:
    return [(row.key, row.first, row.second) for row in differences(first, second)]


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    main(["inspect", "--diff", *words])
    return [line.rstrip() for line in capsys.readouterr().out.rstrip().splitlines()]


@pytest.mark.parametrize(("first", "second", "block"), DOCUMENTED, ids=[f"{a} {b}" for a, b, _ in DOCUMENTED])
def test_documented_differences_are_what_is_printed(
    first: str, second: str, block: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert printed(capsys, first, second) == block.splitlines()


def test_two_are_documented() -> None:
    assert [names for *names, _ in DOCUMENTED] == [["vila", "vila_paper"], ["ola_vlm", "multi_encoder_token"]]


def test_one_number_is_one_row(tiny: Any) -> None:
    assert rows(tiny(), tiny("--model.projector.depth", "3")) == [("model.projector.depth", "2", "3")]
    assert rows(tiny(), tiny("--trainer.default_root_dir", "elsewhere")) == []
    both = ["--data.batch_size", "4", "--seed_everything", "3"]
    assert rows(tiny(), tiny(*both)) == [("data.batch_size", "8", "4"), ("seed_everything", "0", "3")]


def test_another_class_is_its_name_and_what_is_not_its_default(tiny: Any) -> None:
    assert rows(tiny(), tiny("--model.projector", "Linear")) == [("model.projector", "MLP", "Linear")]
    resampler = tiny("--model.projector", "Resampler", "--model.projector.num_queries", "7")
    assert rows(tiny(), resampler)[0] == ("model.projector", "MLP", "Resampler")
    assert ("model.projector.num_queries", "–", "7") in rows(tiny(), resampler)
    callback = tiny("--trainer.callbacks+=callbacks.HeldOut")
    assert rows(tiny(), callback) == [("trainer.callbacks.HeldOut", "–", "HeldOut")]


def test_how_sources_are_given_is_no_difference(tiny: Any) -> None:
    listed = tiny("--data.train", '[{"class_path": "LlavaJson", "init_args": {"path": "/a/mix.json"}}]')
    named = tiny("--data.train", '{"mix": {"class_path": "lit_vlm.data.LlavaJson", "init_args": {"path": "/a/mix.json"}}, "x": null}')  # fmt: skip # noqa: E501
    called = tiny("--data.train", '[{"class_path": "LlavaJson", "init_args": {"path": "/a/mix.json", "name": "mix"}}]')
    assert rows(listed, named) == rows(named, called) == []
    assert rows(named, tiny("--data.train", "/a/mix.json")) == [
        ("data.train.mix", "LlavaJson", "/a/mix.json"),
        ("data.train.mix.path", "/a/mix.json", "–"),
    ]


def test_sources_without_names_are_told_apart_by_what_they_are(tiny: Any) -> None:
    shapes = [{"class_path": "lit_vlm.worlds.Shapes", "init_args": {"count": count}} for count in (5, 6)]
    scenes = {"class_path": "lit_vlm.worlds.Scenes", "init_args": {"kind": "captions", "count": 9}}
    listed = tiny("--data.train", json.dumps([*shapes, scenes]))
    named = tiny("--data.train", json.dumps({"few": shapes[0], "more": shapes[1], "drawn": scenes}))
    assert rows(listed, named) == rows(named, listed) == []
    other = tiny("--data.train", json.dumps([shapes[1], scenes | {"init_args": {"kind": "captions", "count": 8}}]))
    assert rows(named, other) == [
        ("data.train.few", "Shapes", "–"),
        ("data.train.few.count", "5", "–"),
        ("data.train.drawn.count", "9", "8"),
    ]
    assert rows(listed, tiny("--data.train", json.dumps([*shapes, shapes[0], scenes])))[0][0] == "data.train.shapes-3"


def test_an_earlier_class_path_is_the_same_class(tiny: Any) -> None:
    earlier = tiny("--data.val", '[{"class_path": "lit_vlm.data.Shapes", "init_args": {"count": 8, "seed": 1}}]')
    assert rows(tiny(), earlier) == []


def test_stages_go_together_by_name_and_then_in_order() -> None:
    assert pair_stages(["a", "b", "c"], ["a", "x", "c"]) == [("a", "a"), ("b", "x"), ("c", "c")]
    assert pair_stages(["a", "b"], ["b"]) == [("b", "b")]


def test_a_recipe_and_a_run_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    found = printed(capsys, "llava15:tiny", str(RUN))
    assert [line.split()[0] for line in found if line.startswith("  model.")] == [
        f"model.{slot}.config.{key}"
        for slot in ("encoder", "decoder")
        for key in ("hidden_size", "intermediate_size", "num_hidden_layers")
    ]
    assert not [line for line in found if "start_from" in line or "default_root_dir" in line or "Shapes" in line]
    assert printed(capsys, str(RUN / "2_sft"), str(RUN / "2_sft"))[1:] == ["no setting differs"]
    stages = printed(capsys, str(RUN), "llava15:tiny:2_sft")
    assert stages[-1] == "1_align: only run_93c4961 has this stage"


def test_a_scale_and_stages_are_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    found = printed(capsys, "hovle", "hovle_hd", "--scale", "tiny", "--stages", "2_align,3_sft")
    assert found[0].split() == ["hovle:tiny", "hovle_hd:tiny"]
    assert [line for line in found[1:] if not line.startswith(" ")] == ["every stage", "2_align", "3_sft"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["vila", "vilaa"], r"there is no recipe 'vilaa' \(did you mean 'vila' or .*; recipes: "),
        (["vila", "vila:tny"], r"recipe 'vila' has no scale 'tny' \(did you mean 'tiny'\?\); scales: 13b, "),
        (["vila:tiny:2_sf", "vila"], r"has no stage '2_sf' \(did you mean '2_sft'\?\); stages: 0_align, "),
        (["vila", "vila", "--stages", "x"], r"recipe 'vila' has no stage 'x'; stages: "),
        ([str(RUN), "llava15:tiny", "--stages", "x"], r"run_93c4961 has no config.yaml of the stages x yet"),
    ],
)
def test_what_is_not_there_is_named(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["inspect", "--diff", *words])
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--diff", "vila"], "expected 2 arguments"),
        (["--diff", "vila", "vila", "--data.seed", "1"], "--diff takes --scale and --stages, not --data.seed 1"),
        (["--scale", "tiny"], "--scale and --stages belong to --diff"),
    ],
)
def test_flags_of_one_kind_do_not_go_with_the_other(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["inspect", *words])
    assert message in capsys.readouterr().err


def test_nothing_to_compare_is_no_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "recipe.yaml").write_text("base: llava15")
    assert printed(capsys, "llava15:tiny", str(tmp_path / "mine"), "--scale", "tiny")[1:] == ["no setting differs"]
