"""`lit-vlm ablate`: plan, runs, shared stages, failures, an end by force, seeds one by one, jobs of SLURM."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from lit_vlm.checkpoints.weights import read_state
from lit_vlm.commands.ablation import Ablation, make, unscored
from lit_vlm.commands.ablation_asked import name_for, read
from lit_vlm.commands.ablation_runs import Tracked
from lit_vlm.commands.cli import main
from lit_vlm.core.settings import checked
from lit_vlm.experiments.file import AblationFile
from lit_vlm.experiments.plan import Node, Plan, RunKey
from lit_vlm.experiments.pool import Task
from lit_vlm.experiments.stage_scores import stage_scores
from tests.forkserver import interpreter
from tests.runs import environment, lit_vlm

QUICK = {
    "trainer.max_steps": 2,
    "trainer.precision": "32-true",
    "trainer.accelerator": "cpu",
    "trainer.log_every_n_steps": 1,
}
FILE = {
    "recipe": "llava15",
    "scale": "tiny",
    "seeds": 2,
    "base": QUICK,
    "variants": {"short": {"2_sft.trainer.max_steps": 1}},
    "claims": [{"text": "longer is better", "better": "base", "worse": "short", "score": "train/loss"}],
}


def written(folder: Path, **changes: object) -> str:
    file = folder / "steps.yaml"
    file.write_text(yaml.safe_dump(FILE | changes))
    return str(file)


# ----- what a command asks for


def test_a_command_adds_to_a_file(tmp_path: Path) -> None:
    words = ["--scale", "mini", "--seeds", "3,5", "--vary", "model.projector=Linear,MLP", "--data.batch_size", "4"]
    file, options = read([written(tmp_path), *words, "--only", "short", "--stages=2_sft"])
    assert (file.scale, file.seeds, file.stages, file.sequential) == ("mini", (3, 5), ("2_sft",), False)
    assert file.base == QUICK | {"data.batch_size": "4"}
    assert file.grid == {"model.projector": {"Linear": "Linear", "MLP": "MLP"}}
    assert options.only == ["short"]
    assert name_for([str(tmp_path / "steps.yaml")], file) == "steps"


def test_a_command_wins_over_a_variant(tmp_path: Path) -> None:
    variants = {"small": {"scale": "tiny", "strategy": "ddp", "model.projector": "MLP"}}
    file, _ = read([written(tmp_path, variants=variants, claims=[]), "--scale", "mini"])
    assert [(one.scale, one.strategy) for one in file.all_variants()] == [("mini", None), ("mini", "ddp")]
    file, _ = read([written(tmp_path), "--2_sft.trainer.max_steps", "7"])
    assert {one.flags[-2:] for one in file.all_variants()} == {("--2_sft.trainer.max_steps", "7")}


def test_a_flag_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    words = ["--trainer.callbacks+=callbacks.HeldOut", "--trainer.callbacks+=callbacks.Throughput"]
    with pytest.raises(ValueError, match=r"--trainer.callbacks\+ is there twice: give it once, with a list"):
        read([written(tmp_path), *words])


@pytest.mark.parametrize(
    ("error", "status", "state"),
    [(SystemExit(75), "KILLED", "PREEMPTED"), (KeyboardInterrupt(), "KILLED", "PREEMPTED"),
     (OSError("full"), "FAILED", "FAILED"), (None, "RUNNING", "RUNNING")],
)  # fmt: skip
def test_however_an_ablation_ends_mlflow_knows(
    error: BaseException | None, status: str, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    file, _ = read([written(tmp_path)])
    with (
        contextlib.suppress(SystemExit, KeyboardInterrupt, OSError),
        Tracked(Ablation(tmp_path / "a", file, {}, Plan({}, {}))) as tracked,
    ):
        run_id = tracked.run_id
        if error is not None:
            raise error
    found = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").get_run(run_id)
    assert (found.info.status, found.data.tags["state"]) == (status, state)


def test_another_ablation_or_a_run_is_not_written_over(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "steps"
    folder.mkdir(parents=True)
    (folder / "ablation.yaml").write_text("recipe: eve\nabout: something else\n")
    with pytest.raises(ValueError, match=r"holds another ablation \(something else\): choose another --out"):
        make(read([written(tmp_path)])[0], folder)
    (folder / "run.json").touch()
    with pytest.raises(ValueError, match="is the folder of a run: choose another --out"):
        make(read([written(tmp_path)])[0], folder)


def test_claims_whose_score_nothing_leaves_are_named() -> None:
    score = {"text": "t", "better": "base", "worse": "a"}
    claims = [
        score | {"score": name}
        for name in (
            "held_out/loss",
            "train/loss",
            "scenes/0-shot/accuracy",
            "vqa/a",
            "probe/seg/miou",
            "probe/gen/x",
        )
    ]
    given = {"recipe": "eve", "variants": {"a": {}}, "evaluate": [{"task": "scenes"}], "claims": claims}
    given["probe"] = [{"target": "gen"}]
    callbacks = {"base": ["callbacks.HeldOut"], "a": ["callbacks.Throughput"]}
    last = {
        name: {"trainer": {"callbacks": [{"class_path": one} for one in own]}, "data": {"val": None}}
        for name, own in callbacks.items()
    }
    held_out, *tasks = unscored(checked(AblationFile, given, "x"), last)
    assert held_out.startswith("'t' wants held_out/loss, and the last stage of a has no callbacks.HeldOut: add")
    assert set(tasks) == {
        "'t' wants vqa/a, which nothing asks for: name the task under evaluate",
        "'t' wants probe/seg/miou: add 'probe: [{target: seg}]' to the file",
    }


@pytest.mark.parametrize(
    ("score", "remark"),
    [
        ("held_out/accuracy", None),
        ("held_out/shuffled/accuracy", None),
        ("held_out/colours/accuracy", None),
        (
            "held_out/sizes/accuracy",
            "'t' wants held_out/sizes/accuracy, and the last stage of a holds out colours, text: name one of "
            "these, or held_out/accuracy for all",
        ),
        (
            "held_out/shapes/accuracy",
            "'t' wants held_out/shapes/accuracy, and the last stage of a holds out colours, text: name one of "
            "these, or held_out/accuracy for all",
        ),
    ],
)
def test_claims_on_a_source_that_is_not_held_out_are_named(score: str, remark: str | None) -> None:
    claim = {"text": "t", "better": "base", "worse": "a", "score": score}
    file = checked(AblationFile, {"recipe": "eve", "variants": {"a": {}}, "claims": [claim]}, "x")
    one = {"class_path": "x"}
    both = {"shapes": one, "colours": one, "sizes": one}
    other = {"colours": one, "text": one, "sizes": None}
    callbacks = {"callbacks": [{"class_path": "callbacks.HeldOut"}]}
    last = {name: {"trainer": callbacks, "data": {"val": val}} for name, val in {"base": both, "a": other}.items()}
    assert unscored(file, last) == ([] if remark is None else [remark])
    for settings in last.values():  # sources of data.train are held out in part as well, under their own names
        settings["data"]["held_out"] = 0.1
    assert unscored(file, last) == []


def test_a_dry_run_lists_missing_data(tmp_path: Path) -> None:
    file = written(tmp_path, seeds=1, variants={"own": {"data.train": "none.json"}}, claims=[], stages=["2_sft"])
    done = lit_vlm(tmp_path, "ablate", file, "--dry-run", check=False)
    assert done.returncode == 1
    assert "missing or wrong: " in done.stdout
    assert "none.json" in done.stdout
    assert "not ready: own\n" in done.stdout


def test_a_command_needs_no_file() -> None:
    lora = "2_sft.model.decoder.lora={off: null, on: {r: 8}}"
    words = ["eve", "--scale", "mini", "--vary", "model.projector=Linear,MLP", "--vary", lora, "--seeds", "3"]
    file, _ = read(words)
    assert file.seeds == (0, 1, 2)
    assert [variant.name for variant in file.all_variants()][-1] == "projector=MLP,lora=on"
    assert name_for(words, file) == "eve-mini-projector-2_sft_model_decoder_lora"


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ([], "name the file of an ablation, or a recipe with --vary, as the first argument"),
        (
            ["eve"],
            "eve is no file of an ablation, whose name ends in .yaml, and as a recipe it needs something to vary",
        ),
        (["eve", "--vary", "x"], "--vary x: write a flag and its values, as model.projector=Linear,MLP"),
        (["eve", "--vary", "x={a"], "--vary x={a: while parsing"),
        (["eve", "--vary", "a.b=1,2", "--seeds", "x"], "--seeds x: write how many .3., or which .0,1,2."),
        (["eve", "--vary", "a.b=1,2", "--seed_everything", "1"], "name the seeds by --seeds"),
        (["eve", "--vary", "a.b=1,2", "--jobs", "0"], "--jobs is at least 1, not 0"),
        (
            ["eve", "--vary", "a.b=1,2", "--sequential"],
            "until claims are decided: add claims, and two seeds",
        ),
        (["eve", "--vary", "a.b=1,2", "--a.b", "3"], "--a.b is what the grid varies: leave it out"),
        (["--resume"], "--resume goes on with the ablation in a folder, and takes no other file"),
        (["--resume", "--out", "none"], r"none/ablation\.yaml cannot be read"),
    ],
)
def test_what_is_wrong_with_a_command_is_named(words: list[str], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        read(words)


def test_what_is_wrong_with_a_variant_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["ablate", written(tmp_path), "--out", str(tmp_path / "out"), "--only", "shot", "--dry-run"])
    assert "--only shot: there is no such variant; variants: base, short" in capfd.readouterr().err
    with pytest.raises(SystemExit):
        main(["ablate", written(tmp_path, variants={"a": {"stages": ["3_x"]}}, claims=[])])
    assert "variant a: recipe 'llava15' has no stage '3_x'; stages: 1_align, 2_sft" in capfd.readouterr().err
    with pytest.raises(SystemExit):
        main(["ablate", written(tmp_path, variants={"a": {"model.projctor": "MLP"}}, claims=[])])
    assert "projctor" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_dry_run_shows_the_plan_and_checks_each_variant(tmp_path: Path) -> None:
    said = lit_vlm(tmp_path, "ablate", written(tmp_path), "--dry-run").stdout
    assert "2 variants × 2 seeds = 4 runs of 8 stages; 6 train, as 2 are shared; into runs/steps" in said
    assert said.count("ready: config parses") == 3
    assert said.count("ready, as above") == 1
    assert not (tmp_path / "runs").exists()


def test_what_is_asked_in_another_way_is_asked_anew_each_time(tmp_path: Path) -> None:
    plan = Plan({"sft-1": Node("sft-1", "sft", None, 1, (RunKey("base", 0),))}, {RunKey("base", 0): {"sft": "sft-1"}})
    (tmp_path / "stages" / "sft-1" / "evaluation").mkdir(parents=True)

    def asked(limit: int, shots: int = 0) -> Task:
        evaluate = [{"task": "scenes", "limit": limit, "shots": [shots]}]
        file = checked(AblationFile, {"recipe": "eve", "evaluate": evaluate}, "x")
        return Ablation(tmp_path, file, {}, plan).tasks([0], lambda node: {})[1]

    asked(9, shots=4).mark()
    for limit in (100, 500):
        asked(limit).mark()
    assert [asked(limit).is_done() for limit in (100, 500)] == [False, True]
    assert asked(9, shots=4).is_done()


# ----- runs


@pytest.fixture(scope="module")
def ablation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an ablation that was killed on the way, and went on by the same command."""
    folder = tmp_path_factory.mktemp("ablate")
    words = [interpreter(), "-m", "lit_vlm", "ablate", written(folder), "--jobs", "2"]
    process = subprocess.Popen(words, cwd=folder, env=environment(folder), stdout=subprocess.DEVNULL)
    while len(list((folder / "runs").glob("steps/stages/*/done.json"))) < 2:
        assert process.poll() is None
        time.sleep(0.1)
    process.kill()
    process.wait()
    time.sleep(1)  # its stages die with it
    done = {file: file.stat().st_mtime_ns for file in folder.glob("runs/steps/stages/*/done.json")}
    assert len(done) < 6
    (folder / "said").write_text(lit_vlm(folder, "ablate", written(folder), "--jobs", "2").stdout)
    assert all(file.stat().st_mtime_ns == when for file, when in done.items()), "a stage that was done ran again"
    return folder / "runs" / "steps"


@pytest.mark.slow
def test_equal_stages_train_once_and_runs_are_as_by_hand(ablation: Path) -> None:
    plan = Plan.load(ablation)
    assert len(list((ablation / "stages").iterdir())) == len(plan.nodes) == 6
    for run, stages in plan.runs.items():
        assert json.loads((ablation / run.folder / "run.json").read_text())["done"] == ["1_align", "2_sft"]
        for stage, node in stages.items():
            assert (ablation / run.folder / stage).resolve() == (ablation / "stages" / node).resolve()
    folder = ablation.parent.parent
    flags = [word for name, value in QUICK.items() for word in (f"--{name}", str(value))]
    own = ["--2_sft.trainer.max_steps", "1", "--seed_everything", "1", "--out", "hand"]
    lit_vlm(folder, "run", "llava15", "--scale", "tiny", *flags, *own)
    hand = read_state(folder / "hand" / "2_sft")
    for name, value in read_state(ablation / RunKey("short", 1).folder / "2_sft").items():
        assert hand[name].equal(value), name


@pytest.mark.slow
def test_the_report_says_what_was_found(ablation: Path) -> None:
    said = (ablation.parent.parent / "said").read_text()
    assert "report: runs/steps/report.md, runs/steps/report.html" in said
    page = (ablation / "report.md").read_text()
    assert "longer is better" in page
    assert "lit-vlm ablate" in page
    assert "8 in 4 runs, of which 6 trained and 2 shared" in page
    assert (ablation / "forest.png").is_file()


@pytest.mark.slow
def test_mlflow_has_one_run_above_all_stages(ablation: Path) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{ablation.parent.parent}/mlflow.db")
    (experiment,) = (one for one in client.search_experiments() if one.name == "lit-vlm")
    runs = client.search_runs([experiment.experiment_id])
    (above,) = (run for run in runs if run.data.tags.get("mlflow.runName") == "steps")
    assert above.info.status == "FINISHED"
    assert {file.path for file in client.list_artifacts(above.info.run_id)} >= {"report.html", "forest.png"}
    below = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == above.info.run_id]
    assert {(run.data.params["variant"], run.data.params["seed"]) for run in below} == {
        *(("base,short", seed) for seed in "01"),
        *(("base", seed) for seed in "01"),
        *(("short", seed) for seed in "01"),
    }
    assert all(run.info.status in ("FINISHED", "KILLED", "FAILED") or run.info.end_time for run in below)


@pytest.mark.slow
def test_a_failure_stops_no_other_run_and_is_tried_again(tmp_path: Path) -> None:
    bad = {"bad": {"data.train": str(tmp_path / "own.json")}}
    (tmp_path / "own.json").write_text('[{"id": "1", "conversations": [{"from": "human", "value": "a"}]}]')
    file = written(tmp_path, seeds=1, variants=bad, claims=[], stages=["2_sft"])
    found = lit_vlm(tmp_path, "ablate", file, check=False)
    assert found.returncode == 1
    assert "1 failed, 0 were left out for it; the same command tries them again" in found.stdout
    assert (tmp_path / "runs/steps/runs/base/seed-0/2_sft/done.json").is_file()
    probe = [{"target": "depth", "flags": {"steps": 2, "held-out": 4, "batch-size": 2, "exact": True}}]
    file = written(tmp_path, seeds=1, variants={}, claims=[], stages=["2_sft"], probe=probe)
    assert "report: " in lit_vlm(tmp_path, "ablate", file).stdout  # a changed file: what is there is used
    assert "probe/depth/cosine" in stage_scores(tmp_path / "runs/steps/runs/base/seed-0/2_sft")


@pytest.mark.slow
def test_seeds_are_added_until_claims_are_decided(tmp_path: Path) -> None:
    claims = [{"text": "training helps", "better": "base", "worse": "hardly", "score": "train/loss"}]
    variants = {"hardly": {"model.stage.train.projector": 1e-9, "model.stage.train.decoder": 1e-9}}
    base = QUICK | {"trainer.max_steps": 12}
    file = written(tmp_path, seeds=4, base=base, variants=variants, claims=claims, stages=["2_sft"])
    said = lit_vlm(tmp_path, "ablate", file, "--sequential", "--jobs", "2").stdout
    seeds = {path.name for path in tmp_path.glob("runs/steps/runs/*/*") if (path / "2_sft" / "done.json").is_file()}
    assert "report: " in said
    assert {"seed-0", "seed-1"} <= seeds


@pytest.mark.slow
def test_a_signal_is_passed_on(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "lit_vlm", "ablate", written(tmp_path, seeds=1)]  # no signal reaches a fork
    with subprocess.Popen(words, cwd=tmp_path, env=environment(tmp_path), stdout=subprocess.PIPE, text=True) as process:
        while not list(tmp_path.glob("runs/steps/stages/*/log.txt")):
            assert process.poll() is None
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGTERM)
        said, _ = process.communicate(timeout=240)
    assert process.returncode == 75
    assert "left, as SIGTERM asked it to: the same command goes on" in said
    assert not list(tmp_path.glob("runs/steps/stages/*/done.json"))


def test_a_script_for_slurm_is_shown(tmp_path: Path) -> None:
    words = ["--on", "slurm", "--jobs", "3", "--gpus", "0", "--time", "60", "--dry-run"]
    said = lit_vlm(tmp_path, "ablate", written(tmp_path), *words).stdout
    assert "#SBATCH --array=0-2" in said
    assert "-m lit_vlm ablate --resume --out" in said
    assert "#SBATCH --time=60" in said
    assert not (tmp_path / "runs").exists()
