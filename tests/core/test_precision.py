"""Precision is what the device does fast, an explicit one wins, and a run goes on in its own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.plugins import MixedPrecision
from torch.nn.utils import clip_grad_norm_

from lit_vlm import precision
from lit_vlm.commands.cli import lightning_cli, main
from lit_vlm.commands.recipe import find_recipe
from lit_vlm.core.precision import CHOSEN, choose, crowded, matmul_speed
from lit_vlm.training.stage import Stage
from lit_vlm.training.trainer import Trainer
from tests.tiny import tiny_vlm


@pytest.fixture(autouse=True)
def nothing_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (CHOSEN, "WORLD_SIZE", "SLURM_NTASKS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture
def capable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that says it has bf16."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)


@pytest.mark.parametrize(("gain", "name"), [(3.5, "bf16-mixed"), (1.1, "32-true"), (0.01, "32-true")])
@pytest.mark.usefixtures("capable")
def test_what_a_processor_says_is_measured(monkeypatch: pytest.MonkeyPatch, gain: float, name: str) -> None:
    speeds = {torch.bfloat16: 200e9 * gain, torch.float32: 200e9}
    monkeypatch.setattr(precision, "matmul_speed", speeds.__getitem__)
    found = choose("cpu")
    assert found.name == name
    assert found.why.endswith("at 200 GFLOP/s in fp32")
    # Processes that this one starts do not measure anew, beside each other.
    assert os.environ[CHOSEN] == f"cpu:{name}"
    monkeypatch.setattr(precision, "matmul_speed", None)
    assert choose("cpu").name == name


def test_a_processor_without_bf16_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    monkeypatch.setattr(precision, "matmul_speed", None)
    assert choose("cpu").name == "32-true"


@pytest.mark.usefixtures("capable")
def test_several_processes_on_cpus_do_not_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(precision, "matmul_speed", None)
    assert choose("cpu").name == "32-true"


def test_the_choice_is_right_on_this_machine() -> None:
    speeds = {name: matmul_speed(dtype) for name, dtype in precision.DTYPES.items() if name != "16-mixed"}
    chosen = choose("cpu")
    # Twice as fast is no matter of noise.
    assert speeds[chosen.name] > 0.5 * max(speeds.values())


@pytest.mark.parametrize(
    ("capability", "scaled", "name"),
    [
        ((9, 0), True, "bf16-mixed"),
        ((8, 0), False, "bf16-mixed"),
        ((7, 5), True, "16-mixed"),
        ((7, 0), False, "32-true"),
    ],
)
def test_cards(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], scaled: bool, name: str) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    assert choose("cuda", scaled).name == name


def test_autocast_is_what_it_says() -> None:
    product = [p.autocast("cpu") for p in (precision.Precision("bf16-mixed", ""), precision.Precision("32-true", ""))]
    found = []
    for context in product:
        with context:
            found.append((torch.ones(2, 2) @ torch.ones(2, 2)).dtype)
    assert found == [torch.bfloat16, torch.float32]


def test_a_crowded_machine_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(os, "getloadavg", lambda: (7.25, 1.0, 1.0))
    assert "the load is 7.2 on 2 cores" in str(crowded())
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert "OMP_NUM_THREADS" not in str(crowded())
    monkeypatch.setattr(os, "getloadavg", lambda: (2.0, 1.0, 1.0))
    assert crowded() is None


def test_the_trainer_takes_auto_and_what_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CHOSEN, "cpu:bf16-mixed")
    quiet = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "barebones": False}
    assert Trainer(**quiet).precision == "bf16-mixed"
    given = Trainer(precision="64-true", **quiet)
    assert (given.precision, given.chosen) == ("64-true", None)


def test_a_precision_plugin_decides_alone() -> None:
    quiet = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    made = Trainer(plugins=[MixedPrecision("bf16-mixed", "cpu")], **quiet)
    assert (made.precision, made.chosen) == ("bf16-mixed", None)


def test_scaled_gradients_are_clipped_after_they_are_unscaled() -> None:
    # What Lightning does in a step of 16-mixed, on a CPU, where it offers no such precision itself.
    model = tiny_vlm()
    stage = Stage(train={"projector": 1e-3})
    stage.freeze(model)
    optimizer = stage.make_optimizer(model, fused=False)
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**16))
    loss = sum(p.sum() for p in model.projector.parameters())
    plugin.scaler.scale(loss).backward()
    plugin.scaler.unscale_(optimizer)
    norm = clip_grad_norm_(list(model.projector.parameters()), 1.0)
    count = sum(p.numel() for p in model.projector.parameters())
    assert float(norm) == pytest.approx(count**0.5)
    plugin.clip_gradients(optimizer, 1.0)  # the fused optimizer is refused here
    with pytest.raises(RuntimeError, match="gradient clipping"):
        plugin.clip_gradients(stage.make_optimizer(model), 1.0)


def test_a_run_writes_down_its_precision_and_goes_on_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    configs = find_recipe("llava15").configs("1_align", "tiny", "single")
    words = [word for path in configs for word in ("--config", str(path))]
    flags = ["--trainer.logger", "false", "--trainer.accelerator", "cpu", "--trainer.limit_val_batches", "0"]
    fit = ["fit", *words, *flags, "--trainer.default_root_dir", str(tmp_path)]
    monkeypatch.setenv(CHOSEN, "cpu:bf16-mixed")
    main([*fit, "--trainer.max_steps", "2"])
    assert "precision bf16-mixed: " in capsys.readouterr().out
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["trainer"]["precision"] == "bf16-mixed"
    monkeypatch.setenv(CHOSEN, "cpu:32-true")  # another machine
    main([*fit, "--trainer.max_steps", "3", "--ckpt_path", str(tmp_path)])
    assert "precision bf16-mixed: as the config says" in capsys.readouterr().out
    resumed = yaml.safe_load((tmp_path / "config-resumed.yaml").read_text())
    assert resumed["trainer"]["precision"] == "bf16-mixed"
    cli = lightning_cli([*words, *flags, "--trainer.precision", "32-true"], run=False)
    assert cli.trainer.precision == "32-true"


def test_casting_weights_leaves_computed_tables_alone() -> None:
    model = tiny_vlm()
    before = dict(model.named_buffers())
    tables = [name for name in before if name.endswith("inv_freq") or "pixel_" in name]
    assert len(tables) >= 3
    model.to(torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    for name in tables:
        assert torch.equal(model.get_buffer(name), before[name]), name
