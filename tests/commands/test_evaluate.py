"""`lit-vlm evaluate`: questions of one's own, several checkpoints, where results go, MLflow."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from lit_vlm.checkpoints.folder import checkpoints_in
from lit_vlm.commands import evaluate
from lit_vlm.commands.cli import main
from lit_vlm.commands.named_runs import Named, find_named, labels
from lit_vlm.commands.runs import RunState
from lit_vlm.core.quantised import quantised_kinds
from tests.runs import one_step

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI.s args parameter", "ignore:The .srun. command")
FLAGS = ["--workers", "0", "--device", "cpu", "--max-length", "2048"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return one_step(tmp_path_factory.mktemp("evaluate") / "2_sft", "llava15", "2_sft")


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """The folder of a `lit-vlm run` whose last stage has not begun."""
    folder = tmp_path / "run"
    shutil.copytree(trained, folder / "2_sft")
    RunState("llava15", "tiny", "single", ["2_sft", "3_more"], [], ["2_sft"]).save(folder)
    return folder


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    file = tmp_path / "mine.jsonl"
    records: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": f"{n} + 1?"}], "answers": [str(n + 1), f"{n + 1}.0"], "kind": "sums"}
        for n in range(3)
    ]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_two_checkpoints_on_one_s_own_questions(run: Path, mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage = run / "2_sft"
    (checkpoint,) = checkpoints_in(stage)
    earlier = checkpoint.with_name("step=00000000.ckpt")
    shutil.copy(checkpoint, earlier)
    asked = ["--file", str(mine), "--score", "f1", "--shots", "0,1", "--no-mlflow", *FLAGS]
    main(["evaluate", str(run), str(earlier), str(stage), *asked])
    printed = " ".join(capsys.readouterr().out.split())
    assert f"{run}: its last finished stage, 2_sft ({checkpoint.name})" in printed
    assert "step=00000001" in printed.split("mine, 1 shots")[-1]  # the head of the table
    assert printed.count("mine, 0 shots: f1 ") == 2  # the stage is the run's: once more would be the same
    assert sorted(path.name for path in (stage / "evaluation").iterdir()) == ["mine", "step=00000000"]
    for folder in (stage / "evaluation", stage / "evaluation" / "step=00000000"):
        saved = json.loads((folder / "mine" / "0-shot" / "scores.json").read_text())
        found = lines(folder / "mine" / "0-shot" / "answers.jsonl")
        assert [line["id"] for line in found] == ["0", "1", "2"]
        assert {line["group"] for line in found} == {"sums"}
        assert 100 * sum(line["score"] for line in found) / 3 == pytest.approx(saved["scores"][saved["averaged"]])
        assert (saved["main"], saved["averaged"], saved["chance"]) == ("f1", "f1", None)
        shown = lines(folder / "mine" / "1-shot" / "answers.jsonl")
        for line in shown:
            question = f"{line['id']} + 1?"
            assert line["prompt"].count(question) == 1
            assert sum(f"{n} + 1?" in line["prompt"] for n in range(3)) == 2


def test_what_fewer_bits_change_is_said(
    run: Path, mine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["evaluate", str(run), "--file", str(mine), "--score", "f1", "--no-mlflow", *FLAGS]
    main(asked)
    whole = lines(run / "2_sft" / "evaluation" / "mine" / "0-shot" / "answers.jsonl")
    capsys.readouterr()
    stored = []
    load = evaluate.load_run
    monkeypatch.setattr(evaluate, "load_run", lambda *given: stored.append(load(*given)) or stored[-1])
    main([*asked, "--quantise", "nf4"])
    kinds = [quantised_kinds({"decoder": run.module.vlm.decoder}) for run in stored]
    assert kinds == [{}, {"decoder": "nf4"}]
    printed = " ".join(capsys.readouterr().out.split())
    rounded = lines(run / "2_sft" / "evaluation" / "mine" / "0-shot-nf4" / "answers.jsonl")
    unlike = sum(a["score"] != b["score"] for a, b in zip(whole, rounded, strict=True))
    change = 100 * sum(b["score"] - a["score"] for a, b in zip(whole, rounded, strict=True)) / 3
    assert f"mine, 0-shot: nf4 changes f1 by {change:+.2f} points" in printed
    assert "inf" not in printed.partition("nf4 changes")[2].partition(";")[0]
    assert f"; {unlike} of 3 answers score otherwise" in printed
    assert whole == lines(run / "2_sft" / "evaluation" / "mine" / "0-shot" / "answers.jsonl")
    saved = json.loads((run / "2_sft" / "evaluation" / "mine" / "0-shot-nf4" / "scores.json").read_text())
    assert saved["settings"]["quantise"] == "nf4"


def test_other_settings_are_refused_until_overwritten(
    run: Path, mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["evaluate", str(run), "--file", str(mine), "--no-mlflow", *FLAGS]
    main(asked)
    out = run / "2_sft" / "evaluation" / "mine" / "0-shot"
    before = (out / "answers.jsonl").read_text()
    with pytest.raises(SystemExit):
        main([*asked, "--system", "Think."])
    assert "of other questions or settings: --overwrite asks anew and replaces them" in capsys.readouterr().err
    assert (out / "answers.jsonl").read_text() == before
    main([*asked, "--system", "Think.", "--overwrite"])
    assert all("Think." in line["prompt"] for line in lines(out / "answers.jsonl"))


def test_an_attempt_without_an_answer_does_not_block_the_next(
    run: Path, mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["evaluate", str(run), "--file", str(mine), "--no-mlflow", "--workers", "0", "--device", "cpu"]
    with pytest.raises(SystemExit):
        main([*asked, "--max-length", "3"])
    assert "none of 3 examples could be asked: {'too_long': 3}" in capsys.readouterr().err
    assert not (run / "2_sft" / "evaluation" / "mine" / "0-shot").exists()
    main([*asked, "--max-length", "2048", "--dtype", "float32"])
    assert (run / "2_sft" / "evaluation" / "mine" / "0-shot" / "scores.json").is_file()


def test_scores_go_to_the_mlflow_run_of_the_stage(
    run: Path, mine: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = tmp_path / "store.db"
    client = MlflowClient(f"sqlite:///{store}")
    known = client.create_run(client.create_experiment("e"), run_name="2_sft").info.run_id
    client.set_terminated(known, "FAILED")
    identity = {"tracking_uri": f"sqlite:///{store}", "run_id": known, "experiment": "e", "name": "2_sft", "tags": {}}
    (run / "2_sft" / "mlflow.json").write_text(json.dumps(identity) + "\n")
    asked = ["evaluate", str(run), "--file", str(mine), *FLAGS]
    main(asked)
    found = client.get_run(known)
    assert {"evaluate/mine/0-shot/exact", "evaluate/mine/0-shot/kind/sums"} <= set(found.data.metrics)
    assert client.get_metric_history(known, "evaluate/mine/0-shot/exact")[0].step == 1
    assert found.info.status == "FAILED"  # what became of training stays
    assert not list((run / "2_sft").glob("mlflow_unsent-*"))
    client.delete_run(known)
    with caplog.at_level(logging.WARNING):
        main(asked)
        assert f"has no run {known} any more; scores are in files alone" in caplog.text
        store.unlink()
        main(asked)
    assert f"{store} is gone; scores are in files alone" in caplog.text
    assert not store.exists()


def test_flags_that_make_no_sense_together(run: Path, mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    same = mine.parent / "other" / "mine.jsonl"
    same.parent.mkdir()
    shutil.copy(mine, same)
    for flags, message in (
        ([], "name what is asked: --task for a benchmark, --file for questions of your own"),
        (["--task", "scenes", "--score", "f1"], "--score belongs to questions of --file, and there is none"),
        (["--file", str(mine), "--demonstrations", str(mine)], "--demonstrations are put into prompts by --shots"),
        (["--file", str(mine), "--file", str(same)], "two of what is asked are called mine"),
        (["--file", str(mine), "--shots", "3"], "3 demonstrations were asked for, and there are 2"),
        (["--file", "none.jsonl"], "none.jsonl is not there"),
        (["--task", "file"], "--task file: questions of your own are named by --file FILE"),
    ):
        with pytest.raises(SystemExit):
            main(["evaluate", str(run), *flags, "--device", "cpu"])
        assert message in capsys.readouterr().err


def test_what_a_name_stands_for(run: Path, tmp_path: Path) -> None:
    stage = run / "2_sft"
    (checkpoint,) = checkpoints_in(stage)
    assert find_named(str(run)).checkpoint == checkpoint
    assert find_named(str(stage)).note.endswith("its newest checkpoint, step=00000001.ckpt")
    assert find_named(str(checkpoint)).note == ""
    assert find_named(str(checkpoint)).results() == stage.resolve() / "evaluation"
    # Training that goes on makes a newer one, so that this is not the last.
    (stage / "done.json").unlink()
    assert find_named(str(stage)).results() == stage.resolve() / "evaluation" / "step=00000001"
    RunState("llava15", "tiny", "single", ["2_sft"], []).save(run)
    with pytest.raises(ValueError, match=r"no stage of the run .*run has ended \(2_sft\): name the folder of a stage"):
        find_named(str(run))
    shutil.rmtree(stage)
    with pytest.raises(ValueError, match=r"no stage of the run .*run has ended \(2_sft\): train it first"):
        find_named(str(run))


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        (["runs/a/2_sft step=3"], ["2_sft"]),
        (["runs/a/2_sft step=3", "runs/b/2_sft step=3"], ["a", "b"]),
        (["runs/a/1 step=3", "runs/a/1 step=6"], ["step=3", "step=6"]),
        (["runs/a/1 step=3", "runs/b/2 step=3"], ["a/1", "b/2"]),
    ],
)
def test_labels_are_what_differs(places: list[str], expected: list[str]) -> None:
    named = [Named(Path(f"{place.split()[1]}.ckpt"), Path(place.split()[0])) for place in places]
    assert labels(named) == expected
