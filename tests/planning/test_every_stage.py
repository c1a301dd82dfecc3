"""Every stage of every recipe, at its published size and sharded as published, takes its steps on simulated GPUs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from lit_vlm.commands.recipe import find_recipe, shipped_recipes
from lit_vlm.planning.job import Measured
from lit_vlm.planning.simulation import Simulator
from tests.planning.simulated import GIB, job, measured, needs_simulation, simulated

__all__ = ["simulated"]

pytestmark = needs_simulation

OWN_DATA = ("quickstart",)
"""Recipes that run on data and weights of their own, on one device; other tests run them for real."""


def _stages() -> Iterator[Any]:
    """All stages; the last one of each recipe is in `make test-slow`, and all are in `make test-published`."""
    for name in shipped_recipes():
        stages = list(find_recipe(name).stages)
        for stage in () if name in OWN_DATA else stages:
            yield pytest.param(name, stage, marks=() if stage == stages[-1] else pytest.mark.published)


def check(result: Measured) -> None:
    """What holds for every step."""
    assert not result.mixed, "operations that take tensors of device and host"
    assert not result.unsharded
    for name, size in vars(result.expected_states).items():
        assert getattr(result.states, name) == pytest.approx(size, rel=0.02), name
    assert result.states.total < result.peak <= result.reserved


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "stage"), list(_stages()))
def test_sharded_over_64(recipe: str, stage: str, simulated: Simulator) -> None:
    result = measured(simulated.run(replace(job(recipe, stage, 64, "fsdp"), waits=True)))
    check(result)
    assert not result.waits, "the host waits for the device inside a step"
    assert result.blocks > 1
    assert result.precision == "bf16-mixed"


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["single", "ddp", "hsdp"])
@pytest.mark.parametrize(
    ("recipe", "stage"),
    [
        ("llava15", "1_align"),
        pytest.param("eve", "2_pretrain", marks=pytest.mark.published),
        pytest.param("hovle", "1_distill", marks=pytest.mark.published),
        pytest.param("ola_vlm", "1_pretrain", marks=pytest.mark.published),
    ],
)
def test_other_strategies(recipe: str, stage: str, strategy: str, simulated: Simulator) -> None:
    result = measured(simulated.run(job(recipe, stage, 1 if strategy == "single" else 16, strategy)))
    check(result)
    assert bool(result.blocks) == (strategy == "hsdp")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "stage"), [("llava15", "2_sft"), ("vila", "0_align"), ("eve_v2", "3_sft"), ("hovle", "2_align")]
)
def test_packed(recipe: str, stage: str, simulated: Simulator) -> None:
    result = measured(simulated.run(job(recipe, stage, 8, "fsdp", ["--data.batching", "Packed"])))
    check(result)
    assert result.typical.samples > result.batch_size, "several samples share a row"


@pytest.mark.slow
def test_images_that_see_all_of_themselves(simulated: Simulator) -> None:
    flags = ["--data.batching", "Packed", "--model.decoder.init_args.image_attention", "bidirectional"]
    result = measured(simulated.run(replace(job("llava15", "2_sft", 8, "fsdp", flags), waits=True)))
    check(result)
    assert not result.waits, "the host waits for the device inside a step"
    assert result.typical.images


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Conversations without pictures."""
    said = [{"from": "human", "value": "What is left? " * 20}, {"from": "gpt", "value": "Words alone. " * 20}]
    file = tmp_path_factory.mktemp("texts") / "texts.json"
    file.write_text(json.dumps([{"id": str(index), "conversations": said} for index in range(512)]))
    return str(file)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "stage"), [("llava15", "2_sft"), ("eve", "3_sft"), ("hovle", "2_align"), ("ola_vlm", "1_pretrain")]
)
def test_a_rank_without_pictures(recipe: str, stage: str, texts: str, simulated: Simulator) -> None:
    source = {"class_path": "lit_vlm.data.LlavaJson", "init_args": {"path": texts, "image_folder": "."}}
    flags = ["--data.train", json.dumps([source]), "--data.template", "VicunaV1", "--data.mixture", "Shuffled"]
    result = measured(simulated.run(job(recipe, stage, 8, "fsdp", flags)))
    check(result)
    assert result.typical.images == 0
    assert result.records is None


@pytest.mark.slow
def test_llava_by_hand(simulated: Simulator) -> None:
    """Memory and matrix products of LLaVA-1.5's tuning on 8 GPUs, by arithmetic that uses none of the kit's code."""
    result = measured(simulated.run(replace(job("llava15", "2_sft", 8, "fsdp"), record=True)))
    width, inner, layers, words = 4096, 11008, 32, 32000
    decoder = layers * (4 * width**2 + 3 * width * inner + 2 * width) + 2 * words * width + width
    projector = (1024 * width + width) + (width * width + width)
    assert dict((slot, trained) for slot, _, trained, _ in result.slots)["decoder"] == decoder
    trained = decoder + projector
    assert result.states.gradients == pytest.approx(4 * trained / 8, rel=0.001)
    assert result.states.optimizer == pytest.approx(8 * trained / 8, rel=0.001)

    positions, batch = result.typical.positions, result.batch_size
    length = positions // batch
    vit_tokens, vit = 577, 23 * (4 * 1024**2 + 2 * 1024 * 4096)  # layer −2, so 23 of 24 blocks
    pictures = result.typical.images
    blocks = layers * (4 * width**2 + 3 * width * inner)
    # Forward, forward again but for the last product of a block, whose result nothing needs, and two products backward.
    # A picture's patches meet the frozen ViT once.
    products = 2 * (4 * blocks - layers * width * inner) * positions + 2 * 3 * width * words * result.typical.supervised
    products += 2 * pictures * (vit_tokens * vit + 576 * 3 * 14 * 14 * 1024)
    # The projector's first layer needs no gradient of its input.
    products += 2 * pictures * 576 * (2 * 1024 * width + 3 * width * width)
    counted = sum(o.flops * o.calls for o in result.operations if "attention" not in o.name)
    assert counted == pytest.approx(products, rel=0.01)
    attention = sum(o.flops * o.calls for o in result.operations if "attention" in o.name)
    pairs = layers * batch * length**2 * width
    vit_pairs = 23 * pictures * vit_tokens**2 * 1024
    assert attention == pytest.approx(4 * (2 * pairs + vit_pairs) + 10 * pairs, rel=0.01)
    assert result.peak / GIB < 60


@pytest.mark.slow
def test_the_average_of_weights_is_counted(simulated: Simulator) -> None:
    """The projector of LLaVA-1.5's alignment, and LoRA's adapters in tuning, averaged in fp32 on each device."""
    lora = ["--model.lora.decoder", '{"rank": 128, "alpha": 256}']
    for stage, flags in (("1_align", []), ("2_sft", lora)):
        plain, averaged = (
            measured(simulated.run(job("llava15", stage, 8, "fsdp", [*flags, *ema])))
            for ema in ((), ("--model.stage.ema", "0.999"))
        )
        check(averaged)
        trained = sum(count for _, _, count, _ in plain.slots)
        assert averaged.states.optimizer - plain.states.optimizer == pytest.approx(4 * trained / 8, rel=0.01)
        assert averaged.states.weights == plain.states.weights
        assert averaged.peak - plain.peak == pytest.approx(4 * trained / 8, rel=0.05)
        assert averaged.checkpoint - plain.checkpoint == pytest.approx(4 * trained, rel=0.001)
