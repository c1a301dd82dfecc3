"""Learning rates that fall from block to block: which parameter has which, in every optimizer and kind of run."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lit_vlm.core.lora import Adapters, Lora, is_adapter
from lit_vlm.core.part import Part
from lit_vlm.encoders import S2, ConvPatches, Ensemble, HFEncoder
from lit_vlm.model.build import build, build_on_meta
from lit_vlm.model.vlm import VLM
from lit_vlm.training.layer_decay import layer_scales
from lit_vlm.training.optim import learning_rates
from lit_vlm.training.run_record import freeze_table
from lit_vlm.training.stage import Stage
from tests.members import CASES
from tests.runs import tiny_fit
from tests.tiny import CLIP, tiny_decoder, tiny_slots, tiny_vlm
from tests.training.test_resharded import content

DECAY, RATE = 0.5, 1e-3
ENCODER = partial(HFEncoder, config=CLIP, layer=-1)
"""Three blocks; its published last norm is not built."""


def rates(model: VLM, stage: Stage) -> dict[str, tuple[float, float]]:
    """Rate and weight decay of each parameter by name."""
    stage.freeze(model)
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        names[id(p)]: (group["lr"], group["weight_decay"])
        for group in stage.make_optimizer(model).param_groups
        for p in group["params"]
    }


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_rates_fall_from_the_last_block_to_the_embeddings(optimizer: Any) -> None:
    model = tiny_vlm(encoder=ENCODER, decoder=tiny_decoder())
    train: dict[str, float | None] = {"encoder": RATE, "projector": 2e-3, "decoder": 3e-3}
    decays: dict[str, float | None] = {"encoder": DECAY, "decoder": 0.8, "projector": None}
    found = rates(model, Stage(train=train, layer_decay=decays, weight_decay=0.1, optimizer=optimizer))
    expected = {"encoder.backbone.embeddings": RATE / 16, "encoder.backbone.pre_layrnorm": RATE / 16}
    expected |= {f"encoder.backbone.encoder.layers.{block}": RATE / 2 ** (3 - block) for block in range(3)}
    expected |= {"projector": 2e-3, "decoder.lm.model.embed_tokens": 3e-3 * 0.8**4}
    expected |= {f"decoder.lm.model.layers.{block}": 3e-3 * 0.8 ** (3 - block) for block in range(3)}
    expected |= {"decoder.lm.model.norm": 3e-3, "decoder.lm.lm_head": 3e-3}
    shapes = {name: p.ndim for name, p in model.named_parameters()}
    assert found.keys() == shapes.keys()
    used: set[str] = set()
    for name, (rate, weight_decay) in found.items():
        (prefix,) = [prefix for prefix in expected if name.startswith(f"{prefix}.")]
        used.add(prefix)
        assert rate == pytest.approx(expected[prefix]), name
        assert weight_decay == (0.1 if shapes[name] > 1 else 0.0)
    assert used == expected.keys()


def test_a_factor_of_one_is_no_factor() -> None:
    plain, even = (
        Stage(train={"encoder": RATE}, layer_decay=given).make_optimizer(model).param_groups
        for given, model in (({}, _trained()), ({"encoder": 1.0}, _trained()))
    )
    assert [(group.keys(), group["lr"], len(group["params"])) for group in plain] == [
        (group.keys(), group["lr"], len(group["params"])) for group in even
    ]
    assert "scale" not in plain[0], "as it was in checkpoints of earlier versions"


def _trained() -> VLM:
    model = tiny_vlm(encoder=ENCODER)
    Stage(train={"encoder": RATE}).freeze(model)
    return model


def test_adapters_have_the_rates_of_their_blocks() -> None:
    model = build(tiny_slots(encoder=ENCODER, lora=Adapters(encoder=Lora(rank=2, alpha=4))))
    found = rates(model, Stage(train={"encoder": RATE}, layer_decay={"encoder": DECAY}))
    assert found
    for name, (rate, _) in found.items():
        assert is_adapter(name)
        block = int(name.split("layers.")[1].split(".")[0])
        assert rate == pytest.approx(RATE / 2 ** (3 - block)), name


def test_each_member_of_an_ensemble_has_its_own_distances() -> None:
    part = Ensemble([ENCODER, partial(S2, partial(HFEncoder, config=CLIP)), partial(ConvPatches, 32, 28, 7)])
    scales = layer_scales(part, DECAY)
    names = {name: scales.get(id(p), 1.0) for name, p in part.named_parameters()}
    # Three blocks in the first; two in the second, which reads the layer before the last.
    assert names["members.0.backbone.embeddings.patch_embedding.weight"] == 1 / 16
    assert names["members.0.backbone.encoder.layers.2.mlp.fc1.weight"] == 1 / 2
    assert names["members.1.inner.backbone.embeddings.patch_embedding.weight"] == 1 / 8
    assert names["members.1.inner.backbone.encoder.layers.0.mlp.fc1.weight"] == 1 / 4
    third = {scale for name, scale in names.items() if name.startswith("members.2.")}
    assert third == {1.0}, "no blocks"


class Between(Part):
    """Two blocks with a layer between them, and one before and behind."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.first, self.between = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
        self.second, self.behind = nn.Linear(2, 2), nn.Linear(2, 2)

    def blocks(self) -> list[nn.Module]:
        return [self.first, self.second]


def test_what_stands_between_blocks_goes_with_the_one_before() -> None:
    part = Between()
    scales = layer_scales(part, DECAY)
    found = {name: scales[id(p)] for name, p in part.named_parameters() if name.endswith("weight")}
    assert list(found.values()) == [1 / 8, 1 / 4, 1 / 4, 1 / 2, 1]


@pytest.mark.parametrize("case", [name for name in CASES if CASES[name].slots.get("encoder")])
def test_rates_of_every_encoder_rise_in_the_order_of_its_blocks(case: str) -> None:
    encoder = build_on_meta(tiny_slots(**CASES[case].slots)).encoder
    blocks = list(encoder.blocks())
    if not blocks:
        with pytest.raises(ValueError, match=r"has no blocks\(\) whose learning rates could differ"):
            layer_scales(encoder, DECAY)
        return
    scales = layer_scales(encoder, DECAY)
    of_blocks = [{scales[id(p)] for p in block.parameters()} for block in blocks]
    assert all(len(one) == 1 for one in of_blocks)
    factors = [one.pop() for one in of_blocks]
    ends = sum(factor == DECAY for factor in factors)  # the last block of each member
    assert ends >= 1
    for before, after in pairwise(factors):
        assert after == 2 * before or before == DECAY
    within = {id(p) for block in blocks for p in block.parameters()}
    first = next(id(p) for p in encoder.parameters() if id(p) in scales)
    assert first not in within, "embeddings come first in every encoder"
    assert scales[first] <= factors[0] / 2


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (lambda: Stage(layer_decay={"vision": 0.5}), "layer_decay names 'vision', which is no slot"),
        (
            lambda: Stage(layer_decay={"encoder": 0.0}),
            "encoder is above 0 and at most 1, such as 0.75, not 0.0",
        ),
        (lambda: Stage(layer_decay={"encoder": 1.1}), "layer_decay.encoder is above 0 and at most 1, .* not 1.1"),
        (
            lambda: Stage(train={"projector": 1.0}, layer_decay={"projector": 0.9}).freeze(tiny_vlm()),
            r"layer_decay names 'projector': MLP has no blocks\(\) .*: set model.stage.layer_decay.projector to null",
        ),
        (
            lambda: Stage(train={"projector": 1.0}, layer_decay={"encoder": 0.9}).freeze(tiny_vlm()),
            "layer_decay names 'encoder', which model.stage.train does not train: set model.stage.layer_decay.encoder",
        ),
        (lambda: Stage(ema=1.0), "model.stage.ema is between 0 and 1, such as 0.999, or null, not 1.0"),
    ],
)
def test_mistakes_are_named(stage: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stage()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_one_rate_of_a_slot_is_logged_and_the_table_says_the_least(optimizer: Any) -> None:
    model = tiny_vlm(encoder=ENCODER)
    train: dict[str, float | None] = {"encoder": RATE, "projector": 2e-3}
    stage = Stage(train=train, layer_decay={"encoder": 0.3}, optimizer=optimizer, warmup_ratio=0.5, schedule="constant")
    stage.freeze(model)
    made = stage.make_optimizer(model)
    schedule = stage.scheduler(made, total_steps=8)
    made.step()
    schedule.step()
    assert learning_rates(made) == {"encoder": pytest.approx(RATE / 4), "projector": pytest.approx(2e-3 / 4)}
    rows = stage.summary(model)
    assert rows[0].least_lr == pytest.approx(RATE * 0.3**4)
    cells = list(freeze_table("x", rows).columns[4].cells)
    assert cells[:2] == ["8.1e-06 to 0.001", "0.002"]


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "optimizer"), [("fsdp", "muon"), ("fsdp", "adamw"), ("ddp", "adamw")])
def test_two_processes_give_the_weights_of_one_and_resume(strategy: str, optimizer: str, tmp_path: Path) -> None:
    stage = '{"encoder": 1e-3, "projector": 1e-3, "decoder": 1e-3}'
    flags = ["--trainer.logger", "false", "--trainer.limit_val_batches", "0", "--model.stage.optimizer", optimizer,
             "--model.stage.train", stage, "--model.stage.layer_decay", '{"encoder": 0.5, "decoder": 0.9}',
             "--model.stage.weight_decay", "0.1",
             "--checkpoint.every_n_steps", "2", "--checkpoint.keep", "-1"]  # fmt: skip
    two = [*flags, "--data.batch_size", "1", "--trainer.devices", "2"]
    whole = tiny_fit(tmp_path, "one", "2_sft", *flags, "--data.batch_size", "2")
    found = tiny_fit(tmp_path, "two", "2_sft", *two, strategy=strategy)
    middle = str(tmp_path / "two" / "checkpoints" / "step=00000002.ckpt")
    tiny_fit(tmp_path, "resumed", "2_sft", *two, "--ckpt_path", middle, strategy=strategy)
    # Muon multiplies in bf16, which makes more of the order of sums; its own test is exact.
    near = 2e-5 if optimizer == "adamw" else 3e-4
    for name, value in whole.items():
        torch.testing.assert_close(found[name], value, atol=near, rtol=1e-3, msg=name)
    expected, resumed = (content(tmp_path / out / "checkpoints" / "step=00000004.ckpt") for out in ("two", "resumed"))
    assert expected.keys() == resumed.keys()
    assert [name for name, value in expected.items() if not torch.equal(resumed[name], value)] == []
    even = tiny_fit(tmp_path, "even", "2_sft", *flags, "--data.batch_size", "2", "--model.stage.layer_decay", "{}")
    far = max(float((even[name] - value).abs().max()) for name, value in whole.items() if name.startswith("encoder"))
    assert far > 2 * near


def test_blocks_beside_a_part_with_blocks_are_refused() -> None:
    class Both(Part):
        """A part with a block of its own and another part in it."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = HFEncoder(config=CLIP)
            self.own = nn.Linear(2, 2)

        def blocks(self) -> list[nn.Module]:
            return [self.own]

    with pytest.raises(ValueError, match="Both has blocks of its own and parts with blocks in it"):
        layer_scales(Both(), 0.5)
