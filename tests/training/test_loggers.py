"""Whole runs with MLflow, W&B (offline) and TensorBoard: all tell the same of a stage that fails and goes on."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import wandb
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from mlflow import MlflowClient
from mlflow.entities import Run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_vlm.commands.cli import main
from lit_vlm.commands.lightning_cli import ParsedCLI
from lit_vlm.commands.recipe import find_recipe
from lit_vlm.training.loggers import check_packages, refusals_in_one_line, report_of, tell_end, tell_folder
from lit_vlm.training.reports import Report
from lit_vlm.training.tracking import MLflow
from lit_vlm.training.trainer import Trainer
from tests.forkserver import interpreter
from tests.runs import environment
from tests.wandb_offline import OfflineRun, read_offline

TAGS = {"variant": "no-pal", "seed": 7, "owner": "me"}
COMMAND = [
    *("run", "llava15", "--scale", "tiny", "--strategy", "single", "--stages", "1_align", "--out", "runs/eve-a"),
    *("--trainer.accelerator", "cpu", "--trainer.max_steps", "4", "--trainer.log_every_n_steps", "1"),
    *("--seed_everything", "7", "--checkpoint.every_n_steps", "2"),
    *("--trainer.callbacks+=callbacks.HeldOut", "--trainer.callbacks+=callbacks.Predictions"),
    "--trainer.callbacks+=tests.training.failing.FailsOnce",
    *("--trainer.logger+=WandbLogger", "--trainer.logger.project=vlm"),
    *("--trainer.logger+=TensorBoardLogger", "--trainer.logger.save_dir=tb"),
]


@dataclass
class Told:
    """What the loggers know after one attempt."""

    said: str
    parent: Run
    stage: Run
    files: set[str]
    kind: str | None
    wandb: list[OfflineRun]
    events: EventAccumulator


def attempt(folder: Path, code: int) -> Told:
    """Give the command, and read what its loggers have kept."""
    variables = environment(folder) | {"WANDB_MODE": "offline", "LIT_VLM_RUN_TAGS": json.dumps(TAGS)}
    # In fresh processes: what W&B makes when it is imported, a scratch folder, forks of one process would share.
    command = [sys.executable, "-m", "lit_vlm", *COMMAND]
    result = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)
    assert result.returncode == code, result.stdout[-3000:] + result.stderr[-6000:]
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("lit-vlm")
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    (stage,) = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    events = EventAccumulator(str(folder / "tb" / "eve-a" / "1_align"), size_guidance={"tensors": 0, "images": 0})
    events.Reload()
    return Told(
        result.stdout + result.stderr,
        parent,
        stage,
        {item.path for item in client.list_artifacts(stage.info.run_id)},
        experiment.tags.get("mlflow.experimentKind"),
        [read_offline(one) for one in sorted((folder / "wandb").glob("offline-run-*"))],
        events,
    )


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[Told, Told]:
    """An attempt that fails at step 3, and the next one by the same command, which comes to the end."""
    folder = tmp_path_factory.mktemp("loggers")
    return attempt(folder, 1), attempt(folder, 0)


@pytest.mark.slow
def test_runs_are_named_and_tagged_by_what_tells_them_apart(told: tuple[Told, Told]) -> None:
    last = told[1]
    assert (last.parent.info.run_name, last.stage.info.run_name) == ("eve-a", "eve-a/1_align")
    common = {"run": "eve-a", "variant": "no-pal", "seed": "7", "owner": "me", "system": "llava15", "scale": "tiny",
              "strategy": "single"}  # fmt: skip
    for run, own in ((last.parent, "runs/eve-a"), (last.stage, "runs/eve-a/1_align")):
        assert run.data.tags | common | {"folder": own} == run.data.tags
        assert run.data.tags["flags"].startswith("--trainer.accelerator cpu --trainer.max_steps 4")
        assert run.data.params | {"seed": "7", "variant": "no-pal"} == run.data.params
    assert last.stage.data.tags["stage"] == "align"
    assert last.kind == "custom_model_development"


@pytest.mark.slow
def test_sources_are_flat_parameters(told: tuple[Told, Told]) -> None:
    params = told[1].stage.data.params
    assert (params["data.train.0"], params["data.train.0.count"], params["data.val.0.seed"]) == ("Shapes", "48", "1")
    assert "data.train" not in params
    assert not [value for value in params.values() if value.startswith(("{", "[{"))]


@pytest.mark.slow
def test_a_failure_is_told_until_the_run_has_come_to_its_end(told: tuple[Told, Told]) -> None:
    first, last = told
    assert first.stage.data.tags["failure"] == "RuntimeError: a cable was pulled"
    assert first.parent.data.tags["failure"] == "stage 1_align ended with exit code 1"
    assert first.wandb[0].summary["failure"] == "RuntimeError: a cable was pulled"
    assert "failure" not in last.wandb[1].summary
    for run in (last.stage, last.parent):
        assert (run.info.status, run.data.tags["state"]) == ("FINISHED", "FINISHED")
        assert "failure" not in run.data.tags
    assert last.stage.info.run_id == first.stage.info.run_id
    ends = [event.tensor_proto.string_val[0].decode() for event in last.events.Tensors("end/text_summary")]
    assert ends == ["FAILED: RuntimeError: a cable was pulled", "FINISHED"]


@pytest.mark.slow
def test_wandb_gets_what_mlflow_gets(told: tuple[Told, Told]) -> None:
    first, last = told[1].wandb
    assert first.id == last.id  # kept in the folder
    for run in (first, last):
        assert (run.name, run.group, run.job_type) == ("eve-a/1_align", "eve-a", "1_align")
        assert run.tags == {"variant:no-pal", "seed:7"}
    stage = told[1].stage
    own = {"state", "failure", "mlflow"}
    expected = {key: value for key, value in stage.data.tags.items() if key.split(".")[0] not in own}
    assert first.config | stage.data.params | expected == first.config
    assert {"record/config.yaml", "record/data_fingerprints.json", "record/data_provenance.json"} <= first.files
    assert "record/config-resumed.yaml" in last.files
    tables = {name for run in (first, last) for row in run.history for name in row}
    assert {"freeze_table/nrows", "held_out_scores/nrows", "answers/nrows", "answers.png/count"} <= tables
    losses = {row["trainer/global_step"]: row["train/loss"] for row in first.history if "train/loss" in row}
    assert losses
    assert all(value > 0 for value in losses.values())
    assert last.summary["held_out/after_loss"] == pytest.approx(stage.data.metrics["held_out/after_loss"])


@pytest.mark.slow
def test_tensorboard_gets_what_mlflow_gets(told: tuple[Told, Told]) -> None:
    events = told[1].events
    names = events.Tags()
    texts = {name.removesuffix("/text_summary") for name in names["tensors"]}
    tables = {"freeze_table", "held_out_scores", "answers", "tags"}
    assert tables | {"config.yaml", "data_fingerprints.json", "data_provenance.json"} <= texts
    assert len(events.Tensors("config.yaml/text_summary")) == 2  # of both attempts
    assert "answers.png" in names["images"]
    assert {"train/loss", "held_out/after_loss", "lr/projector"} <= set(names["scalars"])
    steps = [event.step for event in events.Scalars("train/loss")]
    assert steps[-1] == 3
    (tags,) = {event.tensor_proto.string_val[0].decode() for event in events.Tensors("tags/text_summary")}
    assert "| variant | no-pal |" in tags
    assert "| version.torch |" in tags
    held_out = events.Tensors("held_out_scores/text_summary")[-1].tensor_proto.string_val[0].decode().splitlines()
    assert [line.split(" | ")[0] for line in held_out] == ["| when", "| ---", "| before", "| after", "| shuffled"]


@pytest.mark.slow
def test_tables_of_mlflow_are_files(told: tuple[Told, Told]) -> None:
    data = {"data_fingerprints.json", "data_provenance.json"}
    expected = {"config.yaml", "config-resumed.yaml", "freeze_table.json", "answers.json"} | data
    assert expected | {"answers.png", "held_out_scores.json"} <= told[1].files
    assert "does not hold" not in told[1].said  # MLflow is among the loggers, and holds everything


def one_step(folder: Path, *flags: str) -> None:
    """Train a tiny stage for one step in this process."""
    words = [
        word for path in find_recipe("llava15").configs("1_align", "tiny", "single") for word in ("--config", str(path))
    ]
    words += ["--trainer.max_steps", "1", "--trainer.limit_val_batches", "0", "--trainer.log_every_n_steps", "1"]
    main(["fit", *words, "--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(folder), *flags])


def test_lightning_s_own_choice_of_a_logger_is_tensorboard_in_the_folder(tmp_path: Path) -> None:
    one_step(tmp_path, "--trainer.logger", "true")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert "train/loss" in events.Tags()["scalars"]
    assert "freeze_table/text_summary" in events.Tags()["tensors"]


def test_a_logger_that_the_kit_does_not_know_gets_metrics_and_settings(tmp_path: Path) -> None:
    one_step(tmp_path / "run", "--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", str(tmp_path / "csv"))
    (folder,) = (tmp_path / "csv" / "lightning_logs").iterdir()
    assert "model.projector: MLP\n" in (folder / "hparams.yaml").read_text()
    assert "train/loss" in (folder / "metrics.csv").read_text()


def test_what_another_logger_does_not_hold_is_said(tmp_path: Path, caplog, monkeypatch: pytest.MonkeyPatch) -> None:
    def said(*loggers: Any) -> str:
        trainer = Trainer(logger=list(loggers), default_root_dir=tmp_path, accelerator="cpu", devices=1)
        caplog.clear()
        with caplog.at_level(logging.INFO):
            tell_folder(trainer, tmp_path, go_on=False)
        return caplog.text

    monkeypatch.setenv("WANDB_MODE", "offline")
    assert "CSVLogger does not hold tags, texts, tables, pictures" in said(CSVLogger(tmp_path))
    assert "W&B does not hold reports that wait" in (both := said(WandbLogger(), TensorBoardLogger(tmp_path)))
    assert "TensorBoard does not hold tags to filter by" in both
    assert said(CSVLogger(tmp_path), MLflow(f"sqlite:///{tmp_path}/m.db")) == ""


def test_a_name_that_the_user_gives_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_RUN_GROUP", "mine")
    wandb = WandbLogger(name="own")
    report_of(wandb).belongs_to(tmp_path / "eve-a", go_on=False)
    assert (wandb._wandb_init["name"], wandb._wandb_init.get("group")) == ("own", None)
    board = TensorBoardLogger(tmp_path, version="own")
    report_of(board).belongs_to(tmp_path / "eve-a", go_on=False)
    assert Path(board.log_dir) == tmp_path / "lightning_logs" / "own"
    inside = TensorBoardLogger(tmp_path / "eve-a")  # as `--trainer.logger true` makes it
    report_of(inside).belongs_to(tmp_path / "eve-a", go_on=False)
    assert Path(inside.log_dir) == tmp_path / "eve-a" / "tensorboard"


@pytest.mark.parametrize(
    ("flags", "package"),
    [
        (["--trainer.logger", "WandbLogger"], "wandb"),
        (["--trainer.logger", "lightning.pytorch.loggers.WandbLogger"], "wandb"),
        (["--trainer.logger+=WandbLogger"], "wandb"),
        (["--trainer.logger", "TensorBoardLogger", "--trainer.logger.save_dir", "tb"], "tensorboard"),
    ],
)
def test_a_logger_without_its_package_is_refused_in_one_line(
    flags: list[str], package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = find_recipe("llava15").configs("1_align", "tiny", "single")
    config = ParsedCLI([*(word for path in configs for word in ("--config", str(path))), *flags]).config
    check_packages(config.trainer.logger)
    monkeypatch.setattr("lit_vlm.training.loggers.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"which is not installed: pip install {package}$"):
        check_packages(config.trainer.logger)


def test_a_run_that_wandb_refuses_has_failed_for_mlflow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuses(**arguments: object) -> None:
        asked.append(1)
        raise wandb.Error("no login")

    asked: list[int] = []
    monkeypatch.setattr("wandb.init", refuses)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/m.db")
    with pytest.raises(SystemExit, match="1"):
        one_step(tmp_path / "run", "--trainer.logger+=WandbLogger")
    assert "W&B says: no login" in capsys.readouterr().err
    assert len(asked) == 1
    client = MlflowClient(f"sqlite:///{tmp_path}/m.db")
    (run,) = client.search_runs([client.get_experiment_by_name("lit-vlm").experiment_id])
    assert (run.info.status, run.data.tags["state"]) == ("FAILED", "FAILED")
    assert "no login" in run.data.tags["failure"]


def test_a_logger_that_fails_keeps_the_end_from_no_other(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = Trainer(logger=[CSVLogger(tmp_path), TensorBoardLogger(tmp_path)], default_root_dir=tmp_path)
    told: list[str] = []

    def tell(report: Report) -> None:
        told.append(report.place)
        if report.place == "CSVLogger":
            raise RuntimeError("no network")

    tell_end(trainer, tell)
    assert told == ["CSVLogger", "TensorBoard"]
    assert "CSVLogger is not told how the run ended: RuntimeError: no network" in caplog.text


@pytest.mark.parametrize(("said", "told"), [("no network\nat all", "no network"), ("", "Error")])
def test_an_error_of_wandb_is_one_line(said: str, told: str) -> None:
    match = f"^trainer.logger: W&B says: {told} Log in by `wandb login`"
    with pytest.raises(ValueError, match=match), refusals_in_one_line():
        raise wandb.Error(said)


def test_wandb_without_a_login_is_refused_in_one_line(tmp_path: Path) -> None:
    variables = {key: value for key, value in environment(tmp_path).items() if not key.startswith("WANDB_")}
    variables |= {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc"), "WANDB_BASE_URL": "http://127.0.0.1:9"}
    command = [interpreter(), "-m", "lit_vlm", "fit"]
    for path in find_recipe("llava15").configs("1_align", "tiny", "single"):
        command += ["--config", str(path.resolve())]
    command += ["--trainer.accelerator", "cpu", "--trainer.logger", "WandbLogger", "--trainer.max_steps", "1"]
    result = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert result.returncode == 1
    assert "error: trainer.logger: W&B says: No API key configured" in result.stderr
    assert "WANDB_MODE=offline" in result.stderr
    assert "Traceback" not in result.stderr
