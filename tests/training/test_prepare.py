"""Prepared features: the same numbers as online, refused when stale, taken up after a stop."""

from __future__ import annotations

import json
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch

import lit_vlm.training.prepare
from lit_vlm.commands.cli import lightning_cli, main
from lit_vlm.commands.recipe import find_recipe
from lit_vlm.core.batch import Batch, VisualTokens
from lit_vlm.core.devices import own_devices
from lit_vlm.core.launcher import Launch
from lit_vlm.data.feed.loader import SourceDataset, assemble
from lit_vlm.data.feed.plan import Place
from lit_vlm.data.sets.convert import convert
from lit_vlm.teachers import EncoderTeacher
from lit_vlm.training.module import LitVLM
from lit_vlm.worlds import Shapes
from tests.forkserver import FIXED
from tests.runs import run_ranks
from tests.tiny import CLIP

TEACHER = {
    "class_path": "lit_vlm.teachers.EncoderTeacher",
    "init_args": {
        "encoder": {
            "class_path": "lit_vlm.encoders.HFEncoder",
            "init_args": {"name": None, "config": {**CLIP, "image_size": 42}, "layer": -1},
        }
    },
}
HEAD = {"class_path": "lit_vlm.heads.FeatureDistillation", "init_args": {"teacher": TEACHER}}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of a tiny LLaVA with a distillation head, over a converted set of shapes; a third is text only."""
    folder = tmp_path_factory.mktemp("prepare")
    convert(Shapes(24), folder / "set")
    files = find_recipe("llava15").configs("2_sft", "tiny", "single")
    source = {"class_path": "lit_vlm.data.Converted", "init_args": {"path": str(folder / "set")}}
    return [
        *[word for path in files for word in ("--config", str(path.resolve()))],
        *("--data.train", json.dumps([source]), "--data.val", "null"),
        *("--model.heads", json.dumps({"distil": HEAD}), "--model.stage.losses.distil", "0.5"),
        *("--trainer.accelerator", "cpu", "--trainer.logger", "false"),
    ]


def prepare(config: list[str], out: Path, *flags: str) -> Path:
    main(["prepare", "targets", *config, "--out", str(out), "--batch-size", "5", *flags])
    return out


def first_batch(config: list[str], *flags: str) -> tuple[LitVLM, Batch]:
    cli = lightning_cli([*config, *flags], run=False)
    module, data = cli.model, cli.datamodule
    module.model = module.build().eval()
    module.stage.freeze(module.model)
    encode = data.train_sample_encoder(module.input_spec)
    dataset = SourceDataset(data.train_sources, encode)
    collate = data.collator(module.input_spec, prepared=tuple(encode.prepared))
    return module, assemble([dataset[Place(i, i)] for i in range(12)], collate)


@torch.no_grad()
def losses(module: LitVLM, batch: Batch) -> dict[str, float]:
    return {name: float(value) for name, value in module.vlm(batch, module.stage.losses).items()}


@pytest.mark.parametrize(
    ("what", "dtype", "tolerance"),
    [("distil", "bfloat16", 2e-3), ("distil", "int8", 1e-2), ("encoder", "bfloat16", 2e-3)],
)
def test_prepared_features_give_the_losses_of_online_ones(
    what: str, dtype: str, tolerance: float, config: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = prepare(config, tmp_path / "out", "--of", what, "--dtype", dtype)
    shown = capsys.readouterr().out.replace("\n", "")
    assert "features of 16 images, 32 wide" in shown
    info = json.loads((out / "prepared.json").read_text())
    assert 0 < info["error"] < tolerance
    online = losses(*first_batch(config))
    module, batch = first_batch(config, f"--data.prepared.{what}", str(out))
    assert isinstance(batch.prepared[what], VisualTokens)
    if what == "encoder":
        assert not batch.images.sizes  # no picture was decoded for it
    else:
        assert not batch.teacher_images
    assert losses(module, batch) == pytest.approx(online, rel=tolerance)
    assert set(online) == {"next_token", "distil"}


def test_prepared_features_of_tiles_are_put_together_as_online_ones(config: list[str], tmp_path: Path) -> None:
    """How tiles make up a picture is read from the picture's size, as the features do not say."""
    own = [*config, "--model.heads.distil", "null", "--model.stage.losses", '{"next_token": 1.0}']
    own += ["--model.embedder", "SpliceTiles", "--data.transform", "AnyRes"]
    out = prepare(own, tmp_path / "out", "--of", "encoder")
    shown, online = first_batch(own)
    module, batch = first_batch(own, "--data.prepared.encoder", str(out))
    assert not batch.images.sizes
    assert any(batch.tilings)
    assert batch.tilings == online.tilings
    assert batch.image_grids == online.image_grids
    assert losses(module, batch) == pytest.approx(losses(shown, online), rel=2e-3)


def test_a_batch_without_images_keeps_the_names(config: list[str], tmp_path: Path) -> None:
    out = prepare(config, tmp_path / "out", "--of", "encoder")
    cli = lightning_cli([*config, "--data.prepared.encoder", str(out)], run=False)
    module = cli.model
    module.model = module.build().eval()
    module.stage.freeze(module.model)
    encode = cli.datamodule.train_sample_encoder(module.input_spec)
    dataset = SourceDataset(cli.datamodule.train_sources, encode)
    batch = assemble([dataset[Place(0, 2)]], cli.datamodule.collator(module.input_spec, prepared=("encoder",)))
    assert not batch.image_grids
    calls: list[Any] = []
    module.vlm.encoder.register_forward_hook(lambda *_: calls.append(1))
    assert losses(module, batch)["next_token"] > 0
    assert not calls  # on no rank does the encoder run


def test_data_without_a_readable_picture_is_refused(
    config: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [{"from": "human", "value": "<image>q"}, {"from": "gpt", "value": "a"}]
    (tmp_path / "bad.json").write_text(json.dumps([{"image": "none.png", "conversations": turns}] * 3))
    source = {"class_path": "lit_vlm.data.LlavaJson", "init_args": {"path": str(tmp_path / "bad.json")}}
    with pytest.raises(SystemExit):
        prepare([*config, "--data.train", json.dumps([source])], tmp_path / "out", "--of", "encoder")
    assert "no record of 'bad' in data.train has an image that can be read" in capsys.readouterr().err
    assert not (tmp_path / "out" / "prepared.json").exists()


def test_stale_features_are_refused_with_the_reason(config: list[str], tmp_path: Path) -> None:
    out = str(prepare(config, tmp_path / "out", "--of", "distil"))
    given = [*config, "--data.prepared.distil", out]
    with pytest.raises(
        ValueError, match=r"data\.prepared\.distil: .* does not fit this run\. preprocessing: .*PadSquare"
    ):
        first_batch(given, "--data.transform", "Resize")
    other = json.loads(json.dumps(HEAD).replace('"layer": -1', '"layer": -2'))
    with pytest.raises(ValueError, match="network: prepared with HFEncoder"):
        first_batch(given, "--model.heads", json.dumps({"distil": other}))
    convert(Shapes(9, seed=3), tmp_path / "other")
    source = {"class_path": "lit_vlm.data.Converted", "init_args": {"path": str(tmp_path / "other")}}
    with pytest.raises(ValueError, match=r"data: source 'other' \(.*\) is not covered"):
        first_batch(given, "--data.train", json.dumps([source]))
    with pytest.raises(ValueError, match="made for: prepared with distil, this run has encoder"):
        first_batch([*config, "--data.prepared.encoder", out])
    with pytest.raises(ValueError, match=r"data\.prepared names 'depth'; this model has encoder, distil"):
        first_batch([*config, "--data.prepared.depth", out])
    with pytest.raises(ValueError, match=r"holds no prepared features: it has no prepared\.json"):
        first_batch([*config, "--data.prepared.distil", str(tmp_path)])


def test_another_encoder_weight_is_stale(config: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = str(prepare(config, tmp_path / "out", "--of", "encoder"))
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")  # other random weights
    with pytest.raises(ValueError, match=r"network: prepared with .* weights (\w+), this run has .* weights (?!\1)"):
        first_batch([*config, "--data.prepared.encoder", out, "--seed_everything", "5"])


def test_a_stopped_preparation_goes_on(
    config: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lit_vlm.training.prepare.BLOCK", 7)
    calls: list[int] = []

    def stop(self: Any, images: Any) -> Any:
        calls.append(len(images))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, images)

    real = EncoderTeacher.__call__
    monkeypatch.setattr(EncoderTeacher, "__call__", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare(config, tmp_path / "out", "--of", "distil")
    assert (tmp_path / "out" / "parts" / "000000" / "part.json").exists()
    with pytest.raises(SystemExit):
        prepare(config, tmp_path / "out", "--of", "distil", "--dtype", "int8")
    assert "unfinished work on something else (dtype bfloat16 → int8)" in capsys.readouterr().err
    monkeypatch.setattr(EncoderTeacher, "__call__", real)
    prepare(config, tmp_path / "out", "--of", "distil")
    prepare(config, tmp_path / "whole", "--of", "distil")
    a, b = (json.loads((tmp_path / name / "prepared.json").read_text()) for name in ("out", "whole"))
    assert a == b
    assert losses(*first_batch(config, "--data.prepared.distil", str(tmp_path / "out")))


def _as_task(rank: str, out: str, *config: str) -> None:
    variables = {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2"}
    os.environ.update(variables)
    lit_vlm.training.prepare.BLOCK = 2
    with Path(f"{out}.{rank}").open("w") as said, redirect_stdout(said):
        prepare(list(config), Path(out), "--of", "distil")


def test_two_tasks_of_a_launcher_share_the_blocks(
    config: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_vlm.training.prepare.BLOCK", 2)
    whole = prepare(config, tmp_path / "whole", "--of", "distil")
    run_ranks(tmp_path, "tests.training.test_prepare", str(tmp_path / "out"), *config)
    content = {file.name: file.read_bytes() for file in whole.iterdir()}
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == content
    assert "features of 16 images" in (tmp_path / "out.0").read_text().replace("\n", "")
    assert "features of" not in (tmp_path / "out.1").read_text()
    prepare(config, tmp_path / "out", "--of", "distil")  # the same command finds it whole
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == content


@pytest.mark.slow
def test_workers_of_ray_open_the_network_and_share_the_blocks(
    config: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for name, value in FIXED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("lit_vlm.training.prepare.BLOCK", 6)
    whole = prepare(config, tmp_path / "whole", "--of", "distil")
    monkeypatch.setattr("lit_vlm.training.prepare._write_block", None)  # nothing is computed here
    prepare(config, tmp_path / "rays", "--of", "distil", "--on", "ray")
    content = {file.name: file.read_bytes() for file in whole.iterdir()}
    assert {file.name: file.read_bytes() for file in (tmp_path / "rays").iterdir()} == content


@pytest.mark.slow
def test_each_device_has_a_process_with_its_own_network(
    config: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_vlm.training.prepare.BLOCK", 6)
    whole = prepare(config, tmp_path / "whole", "--of", "distil")
    monkeypatch.setattr("lit_vlm.data.sets.engine.own_devices", lambda started: ["cpu", "cpu"])
    monkeypatch.setattr("lit_vlm.training.prepare._write_block", None)  # nothing is computed here
    prepare(config, tmp_path / "both", "--of", "distil")
    content = {file.name: file.read_bytes() for file in whole.iterdir()}
    assert {file.name: file.read_bytes() for file in (tmp_path / "both").iterdir()} == content


@pytest.mark.parametrize(
    ("seen", "started", "expected"),
    [
        (0, Launch("srun", 3, 4, 1, per_node=2), ["cpu"]),
        (2, Launch("alone"), ["cuda:0", "cuda:1"]),
        (2, Launch("srun", 1, 2, 0), ["cuda:0", "cuda:1"]),  # a task for each machine
        (4, Launch("torchrun", 5, 8, 1, per_node=4), ["cuda:1"]),
        (4, Launch("srun", 5, 8, 1, per_node=2), ["cuda:1", "cuda:3"]),
        (4, Launch("srun", 5, 8, 1, per_node=0), ["cuda:1"]),  # not as many on each machine
        (1, Launch("srun", 5, 8, 1, per_node=4), ["cuda:0"]),  # a device that is this task's alone
    ],
)
def test_tasks_of_a_machine_share_its_devices(
    seen: int, started: Launch, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    assert own_devices(started) == expected


def test_the_first_stage_of_hovle_needs_no_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(Shapes(12, text_only=False), tmp_path / "set")
    pictures = {"class_path": "lit_vlm.data.Converted", "init_args": {"path": str(tmp_path / "set")}}
    texts = {"class_path": "lit_vlm.worlds.Shapes", "init_args": {"count": 9, "seed": 4}}
    source = {"class_path": "lit_vlm.data.Unpaired", "init_args": {"pictures": pictures, "texts": texts}}
    files = find_recipe("hovle").configs("1_distill", "tiny", "single")
    flags = [word for path in files for word in ("--config", str(path))]
    flags += ["--data.train", json.dumps([source]), "--data.val", "null"]
    flags += ["--trainer.accelerator", "cpu", "--trainer.logger", "false"]
    online = losses(*first_batch(flags))
    out = prepare(flags, tmp_path / "out")
    monkeypatch.setattr(EncoderTeacher, "__call__", None)  # nobody may ask it now
    module, batch = first_batch([*flags, "--data.prepared.image", str(out)])
    assert not batch.teacher_images
    assert losses(module, batch) == pytest.approx(online, rel=1e-2)  # features are kept in bf16


def test_all_targets_of_ola_are_prepared_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(Shapes(12, text_only=False), tmp_path / "set")
    pictures = {"class_path": "lit_vlm.data.Converted", "init_args": {"path": str(tmp_path / "set")}}
    files = find_recipe("ola_vlm").configs("1_pretrain", "tiny", "single")
    flags = [word for path in files for word in ("--config", str(path))]
    flags += ["--data.train", json.dumps([pictures]), "--data.val", "null"]
    flags += ["--trainer.accelerator", "cpu", "--trainer.logger", "false"]
    online = losses(*first_batch(flags))
    assert online.keys() == {"next_token", "depth", "seg", "gen"}
    for name in ("depth", "seg", "gen"):
        flags += [f"--data.prepared.{name}", str(prepare(flags, tmp_path / name, "--of", name))]
    monkeypatch.setattr(EncoderTeacher, "__call__", None)  # nobody may ask them now
    module, batch = first_batch(flags)
    assert not batch.teacher_images
    assert losses(module, batch) == pytest.approx(online, rel=2e-2)  # features are kept in bf16


if __name__ == "__main__":
    _as_task(*sys.argv[1:])
