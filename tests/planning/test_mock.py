"""Made-up records: they are like the statistics of every published stage, cheap to measure, and train a tiny model."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image as PILImage

from lit_vlm.commands.recipe import SHIPPED, find_recipe
from lit_vlm.core.batch import Grid, PixelSpec
from lit_vlm.core.tokenizers import byte_tokenizer, stand_in
from lit_vlm.data import Plain, Resize, Source, Template, VicunaV1
from lit_vlm.data.records import Record
from lit_vlm.data.sample.encode import SampleEncoder
from lit_vlm.data.sample.spec import InputSpec
from lit_vlm.data.sets.scan import modality_length, scan
from lit_vlm.planning import mock
from lit_vlm.planning.expected import expected
from lit_vlm.planning.filler import Writer, jpeg
from lit_vlm.planning.mock import DISTINCT, Mock, mock_longest, mock_train
from lit_vlm.planning.published import shipped
from lit_vlm.planning.statistics import find_statistics, read_statistics
from tests.data.made_tokenizers import made
from tests.planning.test_published import published_stages
from tests.runs import tiny_fit

LLAVA = SHIPPED / "llava15" / "statistics.yaml"
MIX = "llava_v1_5_mix665k"
HUB = "lmsys/vicuna-7b-v1.5"
SIDE, GRID = 28, 2
STAGES = sorted({(recipe, stage, find_recipe(recipe).scale) for recipe, _, stage in published_stages()})


def encoder(template: Template, tokenizer: Any = None, max_length: int = 100_000) -> SampleEncoder:
    """Encodes records for a model whose pictures are four tokens each."""
    pixels = PixelSpec(SIDE, SIDE // GRID, (0.5, 0.5, 0.5))
    spec = InputSpec(tokenizer or stand_in(), pixels, lambda height, width: Grid(GRID, GRID), lambda grid: grid)
    return SampleEncoder(spec, template, Resize(), max_length)


def made_from(config: dict[str, Any]) -> Any:
    module, _, name = config["class_path"].rpartition(".")
    return getattr(import_module(module), name)(**config.get("init_args", {}))


def template_of(recipe: str, stage: str, scale: str | None) -> dict[str, Any]:
    files = [yaml.safe_load(path.read_text()) for path in find_recipe(recipe).configs(stage, scale, "single")]
    found: dict[str, Any] = [file["data"]["template"] for file in files if "template" in (file.get("data") or {})][-1]
    return found


def mix(**changes: Any) -> Mock:
    return Mock(str(LLAVA), "2_sft", MIX, **changes)


def without_id(record: Record) -> Record:
    return replace(record, id="")


@pytest.mark.parametrize(("recipe", "stage", "scale"), STAGES)
def test_records_of_every_published_stage_are_like_its_statistics(recipe: str, stage: str, scale: str | None) -> None:
    file, name = find_statistics(find_recipe(recipe).statistics(stage), recipe)
    template = template_of(recipe, stage, scale)
    encode = encoder(made_from(template))
    statistics = read_statistics(file, name, scale)
    configs = mock_train(file, name, 300, HUB, template, scale)
    assert list(configs) == list(statistics)
    with shipped():
        for source, config in configs.items():
            config["init_args"]["template"] = made_from(template)
            config["init_args"]["records"] = 60
            made_up: Source = made_from(config)
            means = expected({source: statistics[source]}, lambda _: GRID**2)
            sizes = np.array([encode.measure(made_up.outline(index), made_up) for index in range(len(made_up))])
            positions, pictures = sizes.mean(0)
            text = positions - pictures * GRID**2
            assert pictures == pytest.approx(means.pictures, abs=0.06)
            # A bare document always has the marks of its end; some published lengths are below them.
            assert text == pytest.approx(means.text, rel=0.05, abs=1.5)
            assert positions == pytest.approx(means.positions, rel=0.06)


@pytest.mark.parametrize(("template", "share"), [(VicunaV1(), 0.4154), (Plain(), 1.0)])
def test_the_supervised_share_is_that_of_the_statistics(template: Template, share: float) -> None:
    made_up, encode = mix(records=200, template=template), encoder(template)
    samples = [encode(made_up.record(index), Path()) for index in range(200)]
    text = sum(len(sample) - GRID**2 * len(sample.grids) for sample in samples)
    means = expected(read_statistics(LLAVA, "2_sft"), lambda _: 0)
    assert means.supervised / means.text == pytest.approx(0.4154, abs=0.001)
    assert sum(sample.num_supervised for sample in samples) / text == pytest.approx(share, rel=0.05)


@pytest.mark.parametrize(
    "name", ["byte-level", "roberta", "llama2", "llama3", "metaspace always", "unigram first", "word level"]
)
def test_lengths_hold_under_any_tokenizer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = made(name)
    monkeypatch.setattr(mock, "load_tokenizer", lambda source: tokenizer)
    made_up, encode = mix(records=120, template=VicunaV1()), encoder(VicunaV1(), tokenizer)
    positions, pictures = np.mean([encode.measure(made_up.outline(i), made_up) for i in range(120)], axis=0)
    text = positions - pictures * GRID**2
    assert text == pytest.approx(expected(read_statistics(LLAVA, "2_sft"), lambda _: 0).text, rel=0.06)


def test_with_bytes_every_token_is_where_it_should_be() -> None:
    writer = Writer(byte_tokenizer(), None)
    assert [len(writer.text(count)) for count in (0, 1, 3, 4, 5, 1000)] == [0, 1, 3, 4, 5, 1000]


def test_measuring_many_records_reads_few_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_VLM_CACHE", str(tmp_path))
    made_up, encode = mix(records=100_000, template=VicunaV1()), encoder(VicunaV1())
    read: list[int] = []
    outline = made_up.outline
    made_up.outline = lambda index: read.append(index) or outline(index)  # type: ignore[method-assign, func-returns-value]
    sizes = scan(made_up, encode.measure, 2, "sizes")
    assert len(read) == len(set(read)) == DISTINCT
    assert sizes.shape == (100_000, 2)
    for index in (0, 1023, 1024, 54_321, 99_999):
        assert tuple(sizes[index]) == encode.measure(outline(index), made_up)
    words = scan(made_up, modality_length, 1, "words")[:, 0]
    assert (words < 0).mean() == pytest.approx(0.0612, abs=0.002)


def test_records_come_again_in_other_orders() -> None:
    made_up = mix(records=3 * DISTINCT + 5, seed=3)
    first = made_up.repeats()
    assert set(first[DISTINCT : 2 * DISTINCT]) == set(range(DISTINCT))
    assert list(first[DISTINCT : 2 * DISTINCT]) != list(first[2 * DISTINCT : 3 * DISTINCT])
    for index in (DISTINCT + 7, 3 * DISTINCT + 4):
        assert without_id(made_up.record(index)) == without_id(made_up.record(int(first[index])))
        assert made_up.record(index).id != made_up.record(int(first[index])).id
    assert without_id(mix(records=50, seed=4).outline(0)) != without_id(mix(records=50).outline(0))


@pytest.mark.parametrize("size", [(640, 480), (333, 500), (30, 20)])
def test_pictures_are_jpeg_files_of_their_size(size: tuple[int, int]) -> None:
    content = jpeg(*size, 0)
    opened = PILImage.open(io.BytesIO(content))
    assert (opened.format, opened.mode, opened.size) == ("JPEG", "RGB", size)
    assert content != jpeg(*size, 1)
    if min(size) > 100:
        assert len(content) / (size[0] * size[1]) == pytest.approx(0.5, rel=0.1)


def test_a_record_of_several_sequences_is_cut_into_them() -> None:
    made_up = Mock(str(SHIPPED / "vila" / "statistics.yaml"), "1_pretrain", "coyo", records=8)
    samples = encoder(VicunaV1()).sequences(made_up.record(0), Path())
    assert [len(sample.grids) for sample in samples] == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("tokens_of", "group", "text"), [(lambda _: 100, 11, 2048), (lambda _: 1500, 0, None)], ids=["texts", "pictures"]
)
def test_the_longest_records_of_a_stage(tokens_of: Callable[[Any], int], group: int, text: int | None) -> None:
    template = {"class_path": "lit_vlm.data.VicunaV1"}
    ((name, config),) = mock_longest(LLAVA, "2_sft", 5, "bytes", template, tokens_of, 2048).items()
    assert (name, config["init_args"]["longest"]) == (MIX, group)
    config["init_args"]["template"] = VicunaV1()
    made_up, encode = made_from(config), encoder(VicunaV1(), byte_tokenizer())
    lengths = {encode.measure(made_up.outline(i), made_up)[0] for i in range(5)}
    assert len(lengths) == 1
    if text:
        assert lengths == {text}


def test_records_that_pictures_fill_are_not_the_longest() -> None:
    vila = SHIPPED / "vila" / "statistics.yaml"  # of a film, eight pictures are more than 4,096 tokens
    ((name, _),) = mock_longest(vila, "2_sft", 5, "bytes", None, lambda _: 576, 4096).items()
    assert name == "sharegpt4v_sft"
    with pytest.raises(ValueError, match="the pictures of all records fill data.max_length 100 alone: set it larger"):
        mock_longest(LLAVA, "1_align", 5, "bytes", None, lambda _: 576, 100)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"records": 0}, "Mock: records is at least 1, not 0"),
        ({"longest": 12}, "'llava_v1_5_mix665k' has groups 0 to 11, not longest: 12"),
        ({"source": "mix"}, "stage '2_sft' has no source 'mix', only llava_v1_5_mix665k"),
    ],
)
def test_wrong_arguments_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mock(**({"statistics": str(LLAVA), "stage": "2_sft", "source": MIX} | changes))


def test_made_up_records_train_a_tiny_model(tmp_path: Path) -> None:
    template = {"class_path": "lit_vlm.data.VicunaV1"}
    train = mock_train(LLAVA.resolve(), "2_sft", 40, "bytes", template)
    flags = ["--data.train", json.dumps(list(train.values())), "--data.batch_size", "2", "--data.max_length", "1024"]
    weights = tiny_fit(tmp_path, "mock", "2_sft", *flags, "--trainer.logger", "false", "--data.val", "null")
    assert all(torch.isfinite(value).all() for value in weights.values())
