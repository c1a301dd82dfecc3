"""Checkpoints that hold what trains: read, resumed, sharded, and refused where the rest is gone or another."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lit_vlm.checkpoints import find_checkpoint, read_slots, read_state
from lit_vlm.checkpoints.published import export_published, load_published
from lit_vlm.checkpoints.weights import find_start, read_bases, read_shapes
from lit_vlm.core.lora import is_adapter
from lit_vlm.evaluation.asker import load_run
from lit_vlm.model.bases import digest_of
from lit_vlm.model.build import build_on_meta, check_saved
from tests.runs import lit_vlm, tiny_fit
from tests.tiny import LLAMA, batch_of

QUICK = ["--trainer.limit_val_batches", "0", "--trainer.logger", "false", "--data.batch_size", "4"]
LORA = ["--model.lora", "{encoder: {rank: 2}, decoder: {rank: 2}}", "--model.stage.start_from", "align",
        "--model.stage.train", "{encoder: 1e-2, projector: 1e-2, decoder: 1e-2}",
        "--model.stage.warmup_ratio", "0"]  # fmt: skip
Runs = tuple[Path, dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """A folder with the runs `align`, saved whole, and `tuned`, which saved what trained; and what it saved."""
    folder = tmp_path_factory.mktemp("runs")
    tiny_fit(folder, "align", "1_align", *QUICK)
    tiny_fit(folder, "tuned", "2_sft", *QUICK, *LORA, "--checkpoint.every_n_steps", "2", "--checkpoint.keep", "-1")
    return folder, read_state(folder / "tuned")


def resaved(run: Path, **changes: torch.Tensor) -> None:
    """Change weights in the newest checkpoint of a run."""
    path = find_checkpoint(run)
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["state_dict"] |= changes
    torch.save(checkpoint, path)


def test_a_run_with_adapters_saves_them_and_what_trains_whole(runs: Runs) -> None:
    folder, state = runs
    assert state
    assert all(is_adapter(name) or name.startswith("projector.") for name in state)
    assert {name.split(".")[0] for name in state} == {"encoder", "projector", "decoder"}
    assert read_bases(folder / "tuned").keys() == {"encoder", "decoder"}
    assert read_bases(folder / "align") == {}


def test_it_is_asked_exported_and_checked_like_a_whole_one(runs: Runs, tmp_path: Path) -> None:
    folder, state = runs
    model = load_run(folder / "tuned").module.vlm
    own = model.state_dict()
    assert all(torch.equal(own[name], value) for name, value in state.items())
    before = read_state(folder / "align")
    base = {name.replace(".base_layer.", "."): value for name, value in own.items() if name not in state}
    assert all(torch.equal(value, before[name]) for name, value in base.items())
    batch = batch_of(model)
    expected = model.logits(batch)
    export_published("llava-hf", model, tmp_path / "out", None)
    again = load_published("llava-hf", tmp_path / "out").eval()
    torch.testing.assert_close(again.logits(batch)[..., : expected.shape[-1]], expected, atol=1e-4, rtol=1e-4)
    slots = load_run(folder / "tuned").module.slots
    shapes = read_shapes(folder / "tuned")
    assert shapes is not None
    check_saved(build_on_meta(slots), slots, shapes, (), "it")


def test_a_killed_run_goes_on_and_ends_as_one_that_was_not(runs: Runs) -> None:
    folder, expected = runs
    shutil.copytree(folder / "tuned", folder / "cut")
    middle, end = sorted((folder / "cut" / "checkpoints").iterdir())
    end.unlink()
    found = tiny_fit(folder, "cut", "2_sft", *QUICK, *LORA, "--ckpt_path", str(middle))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.slow
def test_shards_hold_the_same_and_go_on(runs: Runs) -> None:
    folder, expected = runs
    two = [
        "--trainer.devices",
        "2",
        "--data.batch_size",
        "2",
        "--checkpoint.every_n_steps",
        "2",
        "--checkpoint.keep",
        "-1",
    ]
    state = tiny_fit(folder, "sharded", "2_sft", *QUICK, *LORA, *two, strategy="fsdp")
    assert find_checkpoint(folder / "sharded").is_dir()
    assert state.keys() == expected.keys()
    assert read_bases(folder / "sharded") == read_bases(folder / "tuned")
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, atol=2e-3, rtol=2e-3)
    middle, end = sorted((folder / "sharded" / "checkpoints").iterdir())
    shutil.rmtree(end)
    found = tiny_fit(folder, "sharded", "2_sft", *QUICK, *LORA, *two, "--ckpt_path", str(middle), strategy="fsdp")
    assert all(torch.equal(found[name], value) for name, value in state.items())
    load_run(folder / "sharded")


def test_a_later_stage_starts_from_it(runs: Runs) -> None:
    folder, _ = runs
    flags = ["--model.lora", "{encoder: {rank: 2}, decoder: {rank: 2}}", "--model.stage.start_from", "tuned"]
    found = tiny_fit(folder, "third", "1_align", *QUICK, *flags)
    assert all(name.startswith("projector.") for name in found)
    model, before = (
        load_run(folder / "third").module.vlm.state_dict(),
        load_run(folder / "tuned").module.vlm.state_dict(),
    )
    moved = {name.split(".")[0] for name, value in model.items() if not torch.equal(value, before[name])}
    assert moved == {"projector"}


def test_runs_that_are_moved_together_are_found_and_one_that_is_alone_is_not(runs: Runs, tmp_path: Path) -> None:
    folder, _ = runs
    for name in ("align", "tuned"):
        shutil.copytree(folder / name, tmp_path / "there" / name)
    path = find_checkpoint(tmp_path / "there" / "tuned")
    checkpoint = torch.load(path, weights_only=True)
    for base in checkpoint["bases"].values():
        base["start"] = base["start"].replace(str(folder), "/nowhere")
    torch.save(checkpoint, path)
    read_slots(path)
    shutil.rmtree(tmp_path / "there" / "align")
    for read in (read_slots, read_shapes, find_start, load_run):
        with pytest.raises(
            ValueError, match=r"holds only what trained, and the rest of the slot '\w+' .HF.* is gone: put"
        ):
            read(path)


def test_a_base_that_was_changed_is_refused(runs: Runs, tmp_path: Path) -> None:
    folder, _ = runs
    shutil.copytree(folder, tmp_path / "there")
    for path in [find_checkpoint(tmp_path / "there" / "tuned")]:
        checkpoint = torch.load(path, weights_only=True)
        for base in checkpoint["bases"].values():
            base["start"] = base["start"].replace(str(folder), str(tmp_path / "there"))
        torch.save(checkpoint, path)
    name = "model.decoder.lm.model.norm.weight"
    resaved(tmp_path / "there" / "align", **{name: torch.rand(64)})
    with pytest.raises(
        ValueError, match=r"rest of HFDecoder came from '.*align.*', and these are other weights now .digest"
    ):
        load_run(tmp_path / "there" / "tuned")
    words = ["--config", "tuned/config.yaml", "--ckpt_path", "tuned"]
    done = lit_vlm(tmp_path / "there", "fit", *words, "--trainer.max_steps", "6", check=False)
    assert (
        "--ckpt_path: the checkpoint holds only what trained; the rest of the slot 'decoder' (HFDecoder)" in done.stderr
    )


def test_pretrained_weights_are_left_out_too_and_random_ones_are_not(tmp_path: Path) -> None:
    torch.manual_seed(0)
    published = AutoModelForCausalLM.from_config(AutoConfig.for_model(**LLAMA | {"vocab_size": 300}))
    published.save_pretrained(tmp_path / "llama")
    flags = ["--model.decoder.init_args.name", str(tmp_path / "llama"), "--model.decoder.init_args.config", "null",
             "--model.lora.decoder.rank", "2", "--model.stage.train.decoder", "1e-2"]  # fmt: skip
    state = tiny_fit(tmp_path, "out", "1_align", *QUICK, *flags)
    assert all(is_adapter(name) for name in state if name.startswith("decoder."))
    assert "encoder.backbone.embeddings.class_embedding" in state
    assert read_bases(tmp_path / "out")["decoder"].start == ""
    model = load_run(tmp_path / "out").module.vlm
    assert torch.equal(model.decoder.lm.model.norm.weight, published.model.norm.weight)
    slots = load_run(tmp_path / "out").module.slots
    shapes = read_shapes(tmp_path / "out")
    assert shapes is not None
    check_saved(build_on_meta(slots), slots, shapes, (), "it")
    with torch.no_grad():
        published.model.norm.weight.uniform_()
    published.save_pretrained(tmp_path / "llama")
    with pytest.raises(
        ValueError, match=r"rest of HFDecoder .*llama came from its pretrained weights, and these are other"
    ):
        load_run(tmp_path / "out")
    shutil.rmtree(tmp_path / "llama")
    with pytest.raises(ValueError, match=r"there are no weights at .*llama"):
        load_run(tmp_path / "out")


def test_the_key_turns_it_off_and_on(runs: Runs) -> None:
    folder, _ = runs
    whole = tiny_fit(folder, "whole", "2_sft", *QUICK, *LORA, "--checkpoint.only_trained", "false")
    assert any(".base_layer." in name for name in whole)
    assert read_bases(folder / "whole") == {}
    plain = ["--model.stage.start_from", "align", "--model.stage.train", "{projector: 1e-3}"]
    small = tiny_fit(folder, "small", "2_sft", *QUICK, *plain, "--checkpoint.only_trained", "true")
    assert all(name.startswith("projector.") for name in small)
    load_run(folder / "small")
    path = str(find_checkpoint(folder / "small"))
    words = ["--config", "small/config.yaml", "--ckpt_path", path, "--checkpoint.only_trained", "false"]
    done = lit_vlm(folder, "fit", *words, "--trainer.max_steps", "6", check=False)
    assert "the checkpoint lacks" in done.stderr
    assert "as it holds only what trained: set checkpoint.only_trained to true" in done.stderr


def test_the_digest_is_that_of_weights_in_bf16_and_in_fp32() -> None:
    state = {"a": torch.randn(4, 4), "b": torch.arange(3)}
    assert digest_of(state) == digest_of(
        {name: value.to(torch.bfloat16) if name == "a" else value for name, value in state.items()}
    )
    assert digest_of(state) != digest_of(state | {"a": state["a"] * 1.1})
