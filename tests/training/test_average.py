"""Averages of weights: the rule, what of a run sees them, and that resumed and sharded runs have the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lit_vlm.checkpoints.weights import PREFIX, RAW
from lit_vlm.core.lora import Adapters, Lora, is_adapter
from lit_vlm.model.build import build
from lit_vlm.training.average import WeightAverage, check_resumed
from lit_vlm.training.module import LitVLM
from lit_vlm.training.stage import Stage
from tests.callbacks.test_callbacks import lit, trainer
from tests.runs import lit_vlm, tiny_fit
from tests.tiny import batch_of, tiny_decoder, tiny_slots, tiny_vlm
from tests.training.test_resharded import content

EMA = 0.6
"""Small, so that it rules from the eighth step on, and steps before go by the rule for short stages."""


def by_hand(start: Tensor, weights: list[Tensor], decay: float) -> Tensor:
    """The average in fp64, as a sum of all weights."""
    average = start.double()
    for step, weight in enumerate(weights, start=1):
        keep = min(decay, (1 + step) / (10 + step))
        average = keep * average + (1 - keep) * weight.double()
    return average


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_average_is_that_of_the_rule_in_fp32_and_of_what_trains(dtype: torch.dtype) -> None:
    model = tiny_vlm().to(dtype)
    Stage(train={"projector": 1.0}).freeze(model)
    average = WeightAverage(model, EMA)
    weight = model.projector.layers[0].weight
    start, seen = weight.detach().clone(), []
    for step in range(1, 13):
        torch.nn.init.normal_(weight)
        seen.append(weight.detach().clone())
        average.update(step)
    trained = {f"{PREFIX}projector.{name}" for name, _ in model.projector.named_parameters()}
    checkpoint: dict[str, Any] = {"state_dict": {PREFIX + name: value for name, value in model.state_dict().items()}}
    frozen = {name: value for name, value in checkpoint["state_dict"].items() if name not in trained}
    average.record(checkpoint | {"optimizer_states": []}, dict)
    name = f"{PREFIX}projector.layers.0.weight"
    found = checkpoint["state_dict"][name]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), by_hand(start, seen, EMA), atol=1e-6, rtol=0)
    assert all(checkpoint["state_dict"][name] is value for name, value in frozen.items())
    assert len(average.tensors) == len(trained)


def test_weights_come_back_bit_for_bit_and_the_average_is_not_rounded() -> None:
    model = tiny_vlm().to(torch.bfloat16)
    Stage(train={"projector": 1.0}).freeze(model)
    average = WeightAverage(model, EMA)
    weight = model.projector.layers[0].weight
    torch.nn.init.normal_(weight)
    average.update(1)
    before = weight.detach().clone()
    exact = [one.clone() for one in average.tensors]
    average.use()
    assert torch.equal(weight, exact[0].bfloat16())
    assert not torch.equal(weight, before)
    assert not torch.equal(weight.float(), exact[0])
    checkpoint: dict[str, Any] = {"state_dict": {f"{PREFIX}projector.layers.0.weight": weight}, "optimizer_states": []}
    average.record(checkpoint, dict)
    assert torch.equal(checkpoint[RAW][f"{PREFIX}projector.layers.0.weight"], before)
    assert torch.equal(checkpoint["state_dict"][f"{PREFIX}projector.layers.0.weight"], exact[0])
    average.put_back()
    assert torch.equal(weight, before)
    assert all(torch.equal(one, kept) for one, kept in zip(average.tensors, exact, strict=True))


def test_of_a_slot_with_adapters_these_alone_are_averaged() -> None:
    model = build(tiny_slots(lora=Adapters(decoder=Lora(rank=2, alpha=4))))
    Stage(train={"decoder": 1.0}).freeze(model)
    adapters = [p for name, p in model.named_parameters() if is_adapter(name)]
    assert [one.shape for one in WeightAverage(model, EMA).tensors] == [p.shape for p in adapters]


def test_a_tied_word_table_is_averaged_once_under_both_names() -> None:
    model = tiny_vlm(decoder=tiny_decoder(tie_word_embeddings=True))
    Stage(train={"decoder": 1.0}).freeze(model)
    average = WeightAverage(model, EMA)
    checkpoint: dict[str, Any] = {"state_dict": {PREFIX + name: value for name, value in model.state_dict().items()}}
    average.record(checkpoint, dict)
    state = checkpoint["state_dict"]
    table, head = state["model.decoder.lm.model.embed_tokens.weight"], state["model.decoder.lm.lm_head.weight"]
    assert table is head
    assert any(table is one for one in average.tensors)
    assert RAW not in checkpoint, "without an optimizer nothing goes on"


def test_a_run_goes_on_as_it_began() -> None:
    check_resumed({}, None)
    check_resumed({"ema": 0.9}, 0.99)
    with pytest.raises(ValueError, match=r"began with model.stage.ema 0.9, .*: set model.stage.ema to 0.9, or begin"):
        check_resumed({"ema": 0.9}, None)
    with pytest.raises(ValueError, match=r"model.stage.ema is 0.9, and the checkpoint has no average to go on with"):
        check_resumed({}, 0.9)


@pytest.mark.filterwarnings("ignore")
def test_lightnings_own_trainer_is_refused(tmp_path: Path) -> None:
    module = lit()
    module.stage.ema = 0.9
    batches = torch.utils.data.DataLoader([batch_of(tiny_vlm())], batch_size=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"model.stage.ema: .* use lit_vlm.training.trainer.Trainer"):
        trainer(tmp_path, max_steps=1).fit(module, batches)


# ----- whole runs -----


def own(parameter: Tensor) -> Tensor:
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach().clone()


class Watch(L.Callback):
    """Keeps the weights of each step, and what scoring at the end sees, in a file; all of whole tensors."""

    def __init__(self) -> None:
        self.seen: dict[str, list[Tensor]] = {}
        self._step = 0

    def _look(self, module: L.LightningModule) -> dict[str, Tensor]:
        return {name: own(p) for name, p in module.named_parameters() if p.requires_grad}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step = trainer.global_step
        self.seen = {name: [value] for name, value in self._look(pl_module).items()}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step > self._step:
            self._step = trainer.global_step
            for name, value in self._look(pl_module).items():
                self.seen[name].append(value)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, LitVLM)
        end = self._look(pl_module)
        if trainer.is_global_zero:
            torch.save({"seen": self.seen, "end": end}, Path(trainer.default_root_dir) / "watched.pt")


class Losses(L.Callback):
    """Keeps the losses of validations, and whether they are of the averages, in a file."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, LitVLM)
        if not trainer.sanity_checking and pl_module.average is not None:
            self.lines.append(
                {"averages": pl_module.average.in_use, "loss": float(trainer.callback_metrics["val/loss"])}
            )

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            (Path(trainer.default_root_dir) / "losses.json").write_text(json.dumps(self.lines))


FSDP = '{"class_path": "lit_vlm.training.sharding.FSDP2", "init_args": {"save_distributed_checkpoint": %s}}'
BF16 = ["--trainer.precision", "bf16-true"]
TWO = ["--trainer.devices", "2", "--data.batch_size", "1"]
FORMS: dict[str, tuple[str, list[str]]] = {
    "single": ("single", ["--data.batch_size", "2"]),
    "accumulated": ("single", ["--data.batch_size", "1", "--trainer.accumulate_grad_batches", "2"]),
    "ddp": ("ddp", TWO),
    "sharded": ("fsdp", TWO),
    "whole": ("fsdp", [*TWO, "--trainer.strategy", FSDP % "false"]),
    "adapters": ("fsdp", [*TWO, "--model.lora.decoder", '{"rank": 2, "alpha": 4}']),
    "bf16": ("single", ["--data.batch_size", "2", *BF16]),
    "bf16 sharded": ("fsdp", [*TWO, *BF16]),
    "bf16 whole": ("fsdp", [*TWO, "--trainer.strategy", FSDP % "false", *BF16]),
}


def fit(folder: Path, out: str, form: str, *flags: str, ema: float = EMA) -> dict[str, Tensor]:
    strategy, own_flags = FORMS[form]
    watch = json.dumps([{"class_path": "tests.training.test_average.Watch"}])
    return tiny_fit(folder, out, "2_sft", "--trainer.logger", "false", "--trainer.limit_val_batches", "0",
                    "--model.stage.ema", str(ema), "--trainer.callbacks+", watch, "--checkpoint.every_n_steps", "2",
                    "--checkpoint.keep", "-1", *own_flags, *flags, strategy=strategy)  # fmt: skip


def step_file(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step={step:08d}.ckpt"


@pytest.mark.slow
@pytest.mark.parametrize("form", list(FORMS))
def test_the_average_of_a_run_is_that_of_its_steps_and_a_resumed_run_has_the_same(form: str, tmp_path: Path) -> None:
    averages = fit(tmp_path, "straight", form)
    watched = torch.load(tmp_path / "straight" / "watched.pt", weights_only=True)
    for name, (start, *weights) in watched["seen"].items():
        assert len(weights) == 4
        found = averages[name.removeprefix(PREFIX)]
        torch.testing.assert_close(found.double(), by_hand(start, weights, EMA), atol=1e-6, rtol=0, msg=name)
        used = watched["end"][name]
        assert torch.equal(used, found.to(used.dtype)), "what scores the trained model sees"
    moved = [name for name, (start, *rest) in watched["seen"].items() if not torch.equal(start, rest[-1])]
    assert len(moved) > 10

    last = content(step_file(tmp_path / "straight", 4))
    middle = step_file(tmp_path / "straight", 2)
    fit(tmp_path, "resumed", form, "--ckpt_path", str(middle))
    resumed = content(step_file(tmp_path / "resumed", 4))
    assert {name for name in last if name.startswith(f".{RAW}.")} == {f".{RAW}.{name}" for name in watched["seen"]}
    assert last.keys() == resumed.keys()
    assert [name for name, value in last.items() if not torch.equal(resumed[name], value)] == []


@pytest.mark.slow
@pytest.mark.parametrize("form", ["single", "sharded"])
def test_validation_has_the_average_and_training_goes_on_as_without(form: str, tmp_path: Path) -> None:
    watch = json.dumps([{"class_path": f"tests.training.test_average.{name}"} for name in ("Watch", "Losses")])
    validate = ["--trainer.callbacks+", watch, "--trainer.limit_val_batches", "1", "--trainer.val_check_interval", "1",
                "--trainer.num_sanity_val_steps", "1"]  # fmt: skip
    fit(tmp_path, "plain", form)
    fit(tmp_path, "validated", form, *validate)
    expected, found = (content(step_file(tmp_path / out, 4)) for out in ("plain", "validated"))
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []
    lines = json.loads((tmp_path / "validated" / "losses.json").read_text())
    assert [line["averages"] for line in lines] == [True] * 4
    # The last validation is of the weights that are saved, which another process scores.
    config, last = tmp_path / "validated" / "config.yaml", step_file(tmp_path / "validated", 4)
    again = lit_vlm(tmp_path, "validate", "--config", str(config), "--ckpt_path", str(last),
                    "--trainer.default_root_dir", "scored", "--trainer.callbacks", "null")  # fmt: skip
    (row,) = [line for line in again.stdout.splitlines() if "val/loss " in line]
    assert float(row.split()[3]) == pytest.approx(lines[-1]["loss"], rel=1e-5)
    assert lines[-1]["loss"] != lines[-2]["loss"]


@pytest.mark.slow
def test_one_process_goes_on_with_the_averages_of_two(tmp_path: Path) -> None:
    again = json.dumps([{"class_path": "tests.training.test_resharded.SavesAgain"}])
    whole = fit(tmp_path, "two", "sharded")
    middle = step_file(tmp_path / "two", 2)
    one = ["--trainer.devices", "1", "--trainer.callbacks+", again, "--ckpt_path", str(middle)]
    found = fit(tmp_path, "one", "sharded", *one)
    expected, read = content(middle), content(tmp_path / "one" / "again.ckpt")
    assert expected.keys() == read.keys()
    assert [name for name, value in expected.items() if not torch.equal(read[name], value)] == []
    for name, value in whole.items():
        torch.testing.assert_close(found[name], value, atol=1e-7, rtol=0, msg=name)


def test_running_statistics_of_what_trains_are_averaged_and_others_are_left() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.BatchNorm1d(4)).double()
    model[2].requires_grad_(False)
    average = WeightAverage(model, EMA)  # type: ignore[arg-type]
    start, seen = model[1].running_mean.clone(), []
    for step in range(1, 5):
        model(torch.randn(8, 3, dtype=torch.double) + step)
        seen.append(model[1].running_mean.clone())
        average.update(step)
    left, frozen = seen[-1], model[2].running_mean.clone()
    average.use()
    torch.testing.assert_close(model[1].running_mean, by_hand(start, seen, EMA), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(model[2].running_mean, frozen)
    average.put_back()
    torch.testing.assert_close(model[1].running_mean, left)
    state = {"state_dict": {PREFIX + name: value for name, value in model.state_dict().items()}, "optimizer_states": []}
    average.record(state, dict)
    assert f"{PREFIX}1.running_mean" in state[RAW]
    assert f"{PREFIX}2.running_mean" not in state[RAW]
