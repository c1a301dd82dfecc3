"""Statistics of published data: every published stage has them, they add up, and wrong files are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from lit_vlm.commands.recipe import SHIPPED, find_recipe
from lit_vlm.planning.expected import expected, longest_group
from lit_vlm.planning.statistics import Group, Stage, TextTokens, find_statistics, read_statistics
from tests.planning.test_published import published_stages

GROUP: dict[str, Any] = {
    "what": "captions",
    "pictures": 1,
    "text_tokens": {"quantiles": [10, 20, 30, 40, 60]},
    "supervised": 0.5,
    "sizes": {"640x480": 1.0},
}


def statistics_of(recipe: str, stage: str, scale: str | None) -> Stage:
    file, name = find_statistics(find_recipe(recipe).statistics(stage), recipe)
    return read_statistics(file, name, scale)


def trained_sources(recipe: str, stage: str, scale: str) -> set[str]:
    """Names of the sources in data.train, as the config files of a stage set them one after the other."""
    names: dict[str, Any] = {}
    for file in find_recipe(recipe).configs(stage, scale, "single"):
        # Only the keys matter; merge keys of YAML are for the loader of the CLI.
        names |= (yaml.safe_load(file.read_text(encoding="utf-8")).get("data") or {}).get("train") or {}
    return {name for name, source in names.items() if source is not None}


@pytest.mark.parametrize(("recipe", "scale", "stage"), published_stages())
def test_every_published_stage_has_statistics_of_its_sources(recipe: str, scale: str, stage: str) -> None:
    found = statistics_of(recipe, stage, scale)
    assert set(found) == trained_sources(recipe, stage, scale)
    assert all(source.source for source in found.values())
    means = expected(found, lambda size: 100)
    assert means.records > 100_000
    assert means.text >= means.supervised > 0
    assert means.visual == pytest.approx(100 * means.pictures)


def test_published_numbers() -> None:
    assert expected(statistics_of("llava15", "1_align", "7b"), lambda _: 576).records == 558_128
    tuning = expected(statistics_of("llava15", "2_sft", "7b"), lambda _: 576)
    assert tuning.records == 665_298
    assert tuning.pictures == pytest.approx(1 - 40_688 / 665_298, abs=1e-3)
    pretraining = statistics_of("vila", "1_pretrain", "7b")
    documents = expected({"mmc4": pretraining["mmc4"]}, lambda _: 576)
    assert documents.records * documents.pictures == pytest.approx(25e6)
    assert documents.text / documents.pictures == pytest.approx(122.5, rel=0.01)
    pairs = expected({"coyo": pretraining["coyo"]}, lambda _: 576)
    assert pairs.records * pairs.pictures == pytest.approx(25e6)
    assert pairs.text / pairs.pictures == pytest.approx(22.7 + 2, rel=0.01)


def test_a_scale_may_have_statistics_of_its_own() -> None:
    plain, chat = (expected(statistics_of("llava15", "1_align", scale), lambda _: 0).text for scale in ("7b", "8b"))
    assert plain < 20 < 60 < chat
    other = expected(statistics_of("ola_vlm", "1_pretrain", "8b"), lambda _: 0).text
    assert other == chat


def test_means_keep_to_the_longest_sequence() -> None:
    found = statistics_of("vila", "1_pretrain", "7b")
    free, capped = (expected(found, lambda _: 576, most).positions for most in (None, 1024))
    assert free > 2000 > 1024 >= capped / 1.75  # a quarter of COYO's record each, of which none is cut
    assert longest_group(found, lambda _: 576, 4096) == ("mmc4", 0)
    assert longest_group(statistics_of("llava15", "2_sft", "7b"), lambda _: 576, 2048) == ("llava_v1_5_mix665k", 11)


def test_lengths_follow_the_quantiles_and_the_mean() -> None:
    tokens = TextTokens(quantiles=(10, 20, 30, 40, 60), mean=36)
    lengths = tokens.at((np.arange(10_000) + 0.5) / 10_000)
    assert np.quantile(lengths, (0.05, 0.25, 0.5, 0.75, 0.95)) == pytest.approx([10, 20, 30, 40, 60], abs=1)
    assert lengths.mean() == pytest.approx(36, rel=0.01)
    assert TextTokens(quantiles=(10, 20, 30, 40, 60), most=100).values[-1] == 100


def test_a_group_counts_pictures_evenly() -> None:
    group = Group.model_validate(GROUP | {"pictures": [1, 3]})
    assert group.counts == (1, 3)


def _stage(source: dict[str, Any]) -> dict[str, Any]:
    return {"stages": {"sft": {"mix": {"records": 10, "source": "the paper"} | source}}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "needs a mapping 'stages', found list"),
        (_stage({"groups": [GROUP | {"pictues": 1}]}), r"stages.sft.mix.groups.0.pictues: Extra inputs"),
        (_stage({"groups": [GROUP | {"share": 0.7}]}), "stages.sft.mix: the shares of groups add up to 0.7 instead"),
        (_stage({"groups": [GROUP | {"sizes": {"640x480": 0.4}}]}), "groups.0: the shares of sizes add up to 0.4"),
        (_stage({"groups": [GROUP | {"sizes": {"640×480": 1.0}}]}), "written WIDTHxHEIGHT, as 640x480, not '640×480'"),
        (_stage({"groups": [GROUP | {"pictures": 0}]}), "sizes are given where there are pictures, and only there"),
        (_stage({"groups": [GROUP | {"pictures": []}]}), "pictures is a number or a list of numbers from 0 on"),
        (_stage({"groups": [GROUP], "sequences": 4}), "several sequences of a record are documents: set form: docum"),
        (
            _stage({"groups": [GROUP | {"text_tokens": {"quantiles": [10, 20, 15, 40, 60]}}]}),
            "text_tokens: quantiles rise and are at least 1",
        ),
        (
            _stage({"groups": [GROUP | {"text_tokens": {"quantiles": [10, 20, 30, 40, 60], "mean": 20}}]}),
            "mean 20, at least 31.4375 by the quantiles: the longest text would be shorter than the last quantile",
        ),
        (
            _stage({"groups": [GROUP | {"text_tokens": {"quantiles": [10, 20, 30, 40, 60], "mean": 36, "most": 99}}]}),
            "mean and most exclude each other",
        ),
        (
            {"stages": {"sft": {"mix": {"like": "llava15/2_sft/nothing"}}}},
            "like: llava15/2_sft/nothing is no source that .*llava15/statistics.yaml describes itself: write RECIPE",
        ),
    ],
)
def test_wrong_files_are_refused(content: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "llava15").symlink_to(SHIPPED / "llava15")
    (tmp_path / "mine").mkdir()
    file = tmp_path / "mine" / "statistics.yaml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    with pytest.raises(ValueError, match=f"mine/statistics.yaml.*{message}") as caught:
        read_statistics(file, "sft")
    assert len(str(caught.value).splitlines()) == 1


def test_a_stage_without_statistics_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="statistics.yaml has no stage '2_stf' \\(did you mean '2_sft'\\?\\); stages: 1_"
    ):
        read_statistics(SHIPPED / "llava15" / "statistics.yaml", "2_stf")
    with pytest.raises(ValueError, match="of stage 'tune' of the recipe 'mine' are here: .* under 'stages' in .*mine"):
        find_statistics([(tmp_path / "mine" / "statistics.yaml", "tune")], "mine")
    with pytest.raises(ValueError, match="cannot be read: .*No such file"):
        read_statistics(tmp_path / "statistics.yaml", "tune")


def test_records_may_differ_from_those_that_a_source_is_like(tmp_path: Path) -> None:
    (tmp_path / "llava15").symlink_to(SHIPPED / "llava15")
    (tmp_path / "mine").mkdir()
    file = tmp_path / "mine" / "statistics.yaml"
    there = {"like": "llava15/2_sft/llava_v1_5_mix665k", "records": 1000}
    file.write_text(yaml.safe_dump({"stages": {"sft": {"mix": there}}}), encoding="utf-8")
    found = read_statistics(file, "sft")["mix"]
    assert found.records == 1000
    assert (
        found.groups == read_statistics(SHIPPED / "llava15" / "statistics.yaml", "2_sft")["llava_v1_5_mix665k"].groups
    )
