from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_vlm.checkpoints import read_slots
from lit_vlm.core.lora import Adapters, Lora
from lit_vlm.core.part import load_state, meta_parameters
from lit_vlm.embedders import Holistic, Splice
from lit_vlm.encoders import EvePatchEmbedding, HFEncoder
from lit_vlm.heads import FeatureDistillation
from lit_vlm.model.build import build, build_on_meta
from lit_vlm.model.vlm import VLM
from lit_vlm.projectors import Identity, Linear
from lit_vlm.teachers import EncoderTeacher
from lit_vlm.training.stage import SLOTS, Stage, frozen_tensors
from tests.runs import one_step
from tests.tiny import CLIP, batch_of, gradients, tiny_decoder, tiny_slots, tiny_vlm

HEAD = {"distil": partial(FeatureDistillation, teacher=partial(EncoderTeacher, encoder=tiny_slots().encoder), layer=2)}


def with_head() -> VLM:
    return tiny_vlm(heads=HEAD)


@pytest.mark.parametrize("slot", ["encoder", "projector", "decoder", "heads"])
def test_gradients_reach_exactly_the_slot_that_trains(slot: str) -> None:
    model = with_head()
    stage = Stage(train={slot: 1e-3}, losses={"next_token": 1.0, "distil": 1.0})
    stage.freeze(model)
    model.train()
    batch = batch_of(model)
    batch.teacher_images["distil"] = batch.images
    sum(model(batch, stage.losses).values()).backward()
    assert {name.split(".")[0] for name in gradients(model)} == {slot}
    trained = [p for part in model.slots()[slot] for p in part.parameters()]
    assert all(p.grad is not None for p in trained)
    optimizer = stage.make_optimizer(model)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in trained}
    modes = {name: parts[0].training for name, parts in model.slots().items()}
    assert modes == {name: name == slot for name in modes}


def test_learning_rates_and_weight_decay_by_slot() -> None:
    model = tiny_vlm()
    stage = Stage(train={"projector": 1e-3, "decoder": 2e-5}, weight_decay=0.1)
    stage.freeze(model)
    groups = stage.make_optimizer(model).param_groups
    assert {(group["slot"], group["lr"]) for group in groups} == {("projector", 1e-3), ("decoder", 2e-5)}
    for group in groups:
        assert {p.ndim > 1 for p in group["params"]} == {group["weight_decay"] > 0}


def test_tied_weights_are_counted_and_stepped_once() -> None:
    model = tiny_vlm(decoder=tiny_decoder(tie_word_embeddings=True))
    stage = Stage(train={"decoder": 1e-3})
    stage.freeze(model)
    members = [id(p) for group in stage.make_optimizer(model).param_groups for p in group["params"]]
    assert len(members) == len(set(members))
    table = model.decoder.lm.get_input_embeddings().weight
    assert model.decoder.lm.get_output_embeddings().weight is table
    assert sum(p.numel() for p in model.decoder.parameters()) == stage.summary(model)[3].trained


@pytest.mark.parametrize(("schedule", "last"), [("cosine", 0.0), ("linear", 0.0), ("constant", 1.0), ("wsd", 0.0)])
def test_schedules_warm_up_and_end_where_they_should(schedule: str, last: float) -> None:
    model = tiny_vlm()
    stage = Stage(train={"projector": 1.0}, schedule=schedule, warmup_ratio=0.1)
    stage.freeze(model)
    optimizer = stage.make_optimizer(model)
    scheduler = stage.scheduler(optimizer, total_steps=100)
    rates = []
    for _ in range(101):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[0] == 0
    assert rates[5] == pytest.approx(0.5)
    assert rates[10] == pytest.approx(1.0)
    assert rates[100] == pytest.approx(last, abs=1e-6)
    if schedule == "wsd":  # constant through step 80, then 1 − √(share of the last 20)
        assert rates[10:81] == pytest.approx([1.0] * 71)
        assert rates[85] == pytest.approx(1 - (5 / 20) ** 0.5)


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (lambda: Stage(train={"vision": 1.0}), f"train names 'vision', which is no slot; slots: {', '.join(SLOTS)}"),
        (lambda: Stage(fresh=["x"]), "fresh names 'x'"),
        (lambda: Stage(warmup_ratio=3.0), "warmup_ratio is a share between 0 and 1, not 3.0"),
        (lambda: Stage(decay_ratio=-1.0), "decay_ratio is a share between 0 and 1, not -1.0"),
        (
            lambda: Stage(schedule="wsd", warmup_ratio=0.5, decay_ratio=0.6),
            "decay_ratio 0.6 make more than all steps",
        ),
        (lambda: Stage(train={"projector": -1.0}), "negative learning rate"),
        (lambda: Stage(train={"embedder": 1.0}).freeze(tiny_vlm()), "nothing to train there"),
        (lambda: Stage(train={"heads": 1.0}).freeze(tiny_vlm()), "nothing to train there"),
        (
            lambda: Stage(losses={"depth": 1.0}).freeze(tiny_vlm()),
            r"names \['depth'\]; this model has \['next_token'\]",
        ),
        (lambda: Stage(losses={"next_token": 0.0}).freeze(tiny_vlm()), "no loss with a weight other than 0"),
        (lambda: Stage().make_optimizer(_frozen()), "names no slot, so there is nothing to train"),
    ],
)
def test_mistakes_in_a_stage_are_named(stage, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stage()


def _frozen() -> VLM:
    model = tiny_vlm()
    Stage().freeze(model)
    return model


def test_a_head_without_its_loss_is_frozen_and_a_removed_head_is_no_mistake() -> None:
    model = with_head()
    Stage(train={"heads": 1.0, "projector": 1.0}, losses={"next_token": 1.0}).freeze(model)
    assert model.heads["distil"].frozen()
    Stage(train={"heads": 1.0}, losses={"next_token": 1.0, "distil": 1.0}).freeze(tiny_vlm(), removed=["distil"])


def test_frozen_tensors_include_the_buffers_of_frozen_modules() -> None:
    model = tiny_vlm()
    Stage(train={"projector": 1.0}).freeze(model)
    names = frozen_tensors(model).keys()
    assert any(name.endswith("inv_freq") for name in names)
    assert not any(name.startswith("projector.") for name in names)


def test_swapping_a_slot_leaves_the_start_of_the_others_the_same() -> None:
    a, b = tiny_vlm().state_dict(), tiny_vlm(projector=Linear).state_dict()
    for name in a.keys() & b.keys():
        assert torch.equal(a[name], b[name]), name


def save(model: VLM, folder: Path) -> Path:
    path = folder / "step=00000001.ckpt"
    torch.save({"state_dict": {f"model.{name}": value for name, value in model.state_dict().items()}}, path)
    return path


def test_weights_of_an_earlier_stage_are_strict_by_slot(tmp_path: Path) -> None:
    path = str(save(tiny_vlm(), tmp_path))
    assert torch.equal(
        build(tiny_slots(), read_slots(path)).projector.layers[0].weight, tiny_vlm().projector.layers[0].weight
    )
    with pytest.raises(
        ValueError, match=r"do not fit the slot 'projector' \(Linear\).*add 'projector' to model.stage.fresh"
    ):
        build(tiny_slots(projector=Linear), read_slots(path), origin=path)
    assert build(
        tiny_slots(projector=Linear), read_slots(path), fresh=("projector",)
    ).projector.linear.weight.shape == (64, 32)
    teacher = partial(EncoderTeacher, encoder=tiny_slots().encoder)
    heads = {"new": partial(FeatureDistillation, teacher=teacher)}
    with pytest.raises(ValueError, match=r"no weights for the slot 'heads.new'.*add 'heads' to model.stage.fresh"):
        build(tiny_slots(heads=heads), read_slots(path))
    with pytest.raises(ValueError, match=r"step=2.ckpt does not exist"):
        build(tiny_slots(), read_slots(str(tmp_path / "step=2.ckpt")))
    (tmp_path / "half.ckpt").write_bytes(b"PK not a checkpoint")
    with pytest.raises(ValueError, match=r"half.ckpt is not a complete checkpoint"):
        build(tiny_slots(), read_slots(str(tmp_path / "half.ckpt")))


def test_adapters_start_on_the_weights_of_a_stage_without_them(tmp_path: Path) -> None:
    from lit_vlm.decoders import Lora

    plain = tiny_vlm()
    adapted = build(tiny_slots(decoder=tiny_decoder(Lora(rank=2))), read_slots(save(plain, tmp_path))).eval()
    batch = batch_of(plain)
    torch.testing.assert_close(adapted.logits(batch), plain.logits(batch))


def test_a_model_on_meta_has_real_buffers_and_takes_weights() -> None:
    model = build_on_meta(tiny_slots(decoder=tiny_decoder(tie_word_embeddings=True)))
    assert all(p.is_meta for p in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    reference = tiny_vlm(decoder=tiny_decoder(tie_word_embeddings=True))
    for name, parts in model.slots().items():
        load_state(parts[0], reference.slots()[name][0].state_dict(), name)
    assert model.decoder.lm.lm_head.weight is model.decoder.lm.model.embed_tokens.weight
    batch = batch_of(reference)
    torch.testing.assert_close(model.eval().logits(batch), reference.logits(batch))


def test_meta_parameters_end_with_their_block_even_on_an_error() -> None:
    with pytest.raises(RuntimeError), meta_parameters():
        raise RuntimeError
    assert not torch.nn.Linear(1, 1).weight.is_meta


def remarks_of(model: VLM, **settings: Any) -> list[str]:
    stage = Stage(**settings)
    stage.freeze(model)
    return stage.remarks(model)


WIDE = partial(HFEncoder, config=CLIP | {"hidden_size": 64})
FROM_DECODER = partial(Holistic, num_layers=2, num_heads=4, num_kv_heads=2, ffn_width=128)


@pytest.mark.parametrize(
    ("changes", "settings", "named"),
    [
        ({}, {"train": {"projector": 1.0}}, []),
        ({}, {"train": {"decoder": 1.0}}, ["projector (MLP, 6,272 parameters) starts from random weights"]),
        ({"projector": Identity, "encoder": WIDE}, {"train": {"decoder": 1.0}}, []),
        ({"embedder": FROM_DECODER}, {"train": {"projector": 1.0}}, []),
        ({"embedder": partial(FROM_DECODER, start="random")}, {"train": {"projector": 1.0}}, ["embedder (Holistic, "]),
        ({"embedder": partial(FROM_DECODER, merge=2)}, {"train": {"projector": 1.0}}, ["embedder (Holistic, "]),
        (
            {"embedder": partial(Splice, task_tokens={"a": 2})},
            {"train": {"projector": 1.0}},
            ["embedder (Splice, 128 "],
        ),
        ({"encoder": partial(EvePatchEmbedding, 32, 4)}, {"train": {"projector": 1.0}}, ["encoder (EvePatchEmbedding"]),
        (
            {"lora": Adapters(projector=Lora(rank=2))},
            {"train": {"projector": 1.0}},
            ["projector (MLP, 6,272 parameters) starts from random weights, and only its adapters train, so it stays"],
        ),
        ({"lora": Adapters(encoder=Lora(rank=2))}, {"train": {"encoder": 1.0, "projector": 1.0}}, []),
        ({"heads": HEAD}, {"train": {"projector": 1.0}, "losses": {"next_token": 1.0}}, []),
        (
            {"heads": HEAD},
            {"train": {"projector": 1.0}, "losses": {"distil": 0.5}},
            ["heads.distil (FeatureDistillation, 6,240 parameters) has a loss of weight 0.5 and starts from random"],
        ),
        ({"heads": HEAD}, {"train": {"projector": 1.0, "heads": 1.0}, "losses": {"distil": 0.5}}, []),
        (
            {"heads": HEAD},
            {"train": {"projector": 1.0, "heads": 1.0}},
            ["model.stage.train names heads, and no head has a loss"],
        ),
    ],
)
def test_what_stays_random_is_named(changes: dict[str, Any], settings: dict[str, Any], named: list[str]) -> None:
    found = remarks_of(tiny_vlm(**changes), **settings)
    assert len(found) == len(named)
    assert all(line.startswith(name) for line, name in zip(found, named, strict=True))
    assert all("model.stage" in line for line in found)


def test_what_an_earlier_stage_trained_is_no_longer_random_but_what_is_fresh_is(tmp_path: Path) -> None:
    path = str(save(tiny_vlm(heads=HEAD), tmp_path))
    settings = {"train": {"decoder": 1.0}, "losses": {"next_token": 1.0, "distil": 1.0}, "start_from": path}
    assert remarks_of(build(tiny_slots(heads=HEAD), read_slots(path)), **settings) == []
    fresh = ("projector", "heads")
    found = remarks_of(build(tiny_slots(heads=HEAD), read_slots(path), fresh), fresh=list(fresh), **settings)
    assert [line.split(" ")[0] for line in found] == ["heads.distil", "projector"]
    assert "as model.stage.fresh names projector, and it is frozen" in found[1]


@pytest.mark.parametrize(
    ("schedule", "ratio", "steps", "message"),
    [
        ("wsd", 0.03, 1, "the only step has learning rate 0"),
        ("wsd", 0.03, 3, None),
        ("cosine", 0.03, 1, "the only step has learning rate 0"),
        ("constant", 0.03, 1, "the only step has learning rate 0"),
        ("cosine", 0.03, 2, None),
        ("linear", 0.03, 3, None),
        ("cosine", 0.5, 2, None),
        ("cosine", 0.6, 2, "the first of 2 steps has learning rate 0, and none has the peak rate"),
        ("cosine", 1.0, 100, "the first of 100 steps has learning rate 0, and none has the peak rate"),
        ("cosine", 0.0, 1, None),
        ("cosine", 0.03, 5197, None),
    ],
)
def test_a_warm_up_that_never_ends_is_named(schedule: Any, ratio: float, steps: int, message: str | None) -> None:
    model = tiny_vlm()
    stage = Stage(train={"projector": 1.0}, schedule=schedule, warmup_ratio=ratio)
    stage.freeze(model)
    optimizer = stage.make_optimizer(model)
    scheduler = stage.scheduler(optimizer, steps)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    found = stage.schedule_remark(steps)
    assert (found is None) == (max(rates) == 1.0)
    assert (found is None) == (message is None)
    assert message is None or (found is not None and message in found and "model.stage.warmup_ratio" in found)


def test_a_run_warns_of_its_only_step_and_of_what_stays_random(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one_step(tmp_path, "llava15", "1_align")
    assert [line for line in caplog.messages if "stage 'align'" in line] == [
        "stage 'align': the warm-up covers all steps: the only step has learning rate 0, and none has the peak rate; "
        "set model.stage.warmup_ratio to 0, or train for more steps (trainer.max_steps)"
    ]


def test_frozen_tensors_are_told_under_all_names() -> None:
    module = torch.nn.Module()
    module.register_buffer("table", torch.ones(2))
    module.register_buffer("first_table", module.table)  # as rotary tables that grow with the text keep the first one
    assert set(frozen_tensors(module)) == {".table", ".first_table"}
