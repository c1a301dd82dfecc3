"""Reading the folders of finished runs."""

from __future__ import annotations

import json
import math
import shutil
from itertools import count
from pathlib import Path

import pytest

from lit_vlm.experiments.scores import by_settings, read_run
from lit_vlm.training.mlflow_run import MLflowRun
from tests.experiments.made import STAGES, finished_run, finished_stage, score_held_out, score_task


def test_held_out_scores_have_direction_chance_control_kinds_and_answers(tmp_path: Path) -> None:
    run = read_run(finished_run(tmp_path / "a", ["--seed_everything=3"], right=[1, 0, 1, 1]))
    accuracy, loss = run.scores["held_out/accuracy"], run.scores["held_out/loss"]
    assert (accuracy.value, accuracy.better, accuracy.chance, accuracy.shuffled) == (0.75, "higher", 0.25, 0.0)
    assert accuracy.by_kind == {"count": 0.5, "depth": 1.0}
    assert accuracy.answers == {"count/0": 1, "count/1": 0, "depth/0": 1, "depth/1": 1}
    assert accuracy.kinds["depth/0"] == "depth"
    assert (loss.value, loss.better, loss.share, loss.answers) == (1.25, "lower", False, {})
    assert run.scores["held_out/depth/accuracy"].answers == {"depth/0": 1, "depth/1": 1}
    control = run.scores["held_out/shuffled/accuracy"]
    assert (control.value, control.answers["count/0"]) == (0.0, 0.0)
    assert {name for name, one in run.scores.items() if one.main} == {"held_out/accuracy", "held_out/loss"}
    assert run.seed == 3
    assert run.flags == ("llava15", "--scale mini", "--strategy single", "--stages 1_align,2_sft")


def test_a_source_that_is_alone_has_scores_of_its_own_name(tmp_path: Path) -> None:
    folder = finished_run(tmp_path / "a", answered=False)
    file = folder / "2_sft" / "held_out.json"
    found = json.loads(file.read_text())
    found["after"]["by_source"] = {"count": {**found["after"], "by_source": {}}}
    file.write_text(json.dumps(found))
    scores = read_run(folder).scores
    assert scores["held_out/count/accuracy"].value == scores["held_out/accuracy"].value == 0.5
    assert scores["held_out/accuracy"].by_kind == {}


def test_without_options_accuracy_is_exact_match(tmp_path: Path) -> None:
    folder = finished_run(tmp_path / "a", answered=False)
    file = folder / "2_sft" / "held_out.json"
    found = json.loads(file.read_text())
    found["after"] |= {"num_choices": 0, "choice_accuracy": None, "choice_chance": None, "exact_match": 0.3}
    file.write_text(json.dumps(found))
    accuracy = read_run(folder).scores["held_out/accuracy"]
    assert (accuracy.value, accuracy.chance, accuracy.answers) == (0.3, None, {})


def test_tasks_asked_afterwards_and_while_training_are_read(tmp_path: Path) -> None:
    stage = finished_run(tmp_path / "a") / "2_sft"
    scores = {"accuracy": 75.0, "kind/x": 50.0, "kind/y": 100.0}
    score_task(stage / "evaluation" / "scenes" / "4-shot", scores, [1, 0, 1, 1], chance=25.0)
    score_task(stage / "evaluation" / "step=00000010" / "scenes" / "4-shot", {"accuracy": 1.0}, [0, 0])
    score_task(stage / "tasks" / "pope" / "0-shot" / "9", {"f1": 1.0}, [1, 0], averaged=None, task="pope")
    score_task(stage / "tasks" / "pope" / "0-shot" / "10", {"f1": 70.0}, [1, 0], averaged=None, task="pope")
    score_task(stage / "evaluation" / "text" / "0-shot", {"perplexity": 9.0}, [None], averaged=None)
    found = read_run(tmp_path / "a").scores
    scenes = found["scenes/4-shot/accuracy"]
    assert (scenes.value, scenes.share, scenes.main, scenes.chance) == (0.75, True, True, 0.25)
    assert scenes.answers == {"0": 1, "1": 0, "2": 1, "3": 1}
    assert scenes.by_kind == {"a": 1.0, "b": 0.5}  # of the answers' groups
    assert found["scenes/4-shot/kind/x"].value == 0.5
    f1 = found["pope/0-shot/f1"]
    assert (f1.value, f1.share, f1.answers) == (70.0, False, {})  # of the last step; no mean over questions
    assert (found["text/0-shot/perplexity"].value, found["text/0-shot/perplexity"].better) == (9.0, "lower")


def test_kinds_without_answers_come_from_names_of_scores(tmp_path: Path) -> None:
    stage = finished_run(tmp_path / "a") / "2_sft"
    scores = {"accuracy": 75.0, "kind/x": 50.0, "kind/y": 100.0}
    (score_task(stage / "evaluation" / "scenes" / "0-shot", scores, [1, 0, 1, 1]) / "answers.jsonl").unlink()
    found = read_run(tmp_path / "a").scores["scenes/0-shot/accuracy"]
    assert (found.by_kind, found.answers) == ({"x": 0.5, "y": 1.0}, {})


def test_answers_beyond_a_smaller_limit_do_not_count(tmp_path: Path) -> None:
    stage = finished_run(tmp_path / "a") / "2_sft"
    score_task(stage / "evaluation" / "scenes" / "0-shot", {"accuracy": 50.0}, [1, 0, 1, 1], count=2)
    assert read_run(tmp_path / "a").scores["scenes/0-shot/accuracy"].answers == {"0": 1, "1": 0}


def test_probes_kept_beside_a_stage_are_read_by_layer(tmp_path: Path) -> None:
    stage = finished_run(tmp_path / "a") / "2_sft"
    (stage / "probe-depth").mkdir()
    result = {"cosine": [0.2, 0.4], "score": [0.5, 0.9], "score_name": "depth order"}
    other = {"cosine": [0.9], "score": [], "score_name": ""}
    saved = {"target": "depth", "results": {"/elsewhere/2_sft": other, str(stage): result}}
    (stage / "probe-depth" / "probe.json").write_text(json.dumps(saved))
    found = read_run(tmp_path / "a").scores
    assert found["probe/depth/cosine"].value == pytest.approx(0.3)
    assert found["probe/depth/depth_order"].by_kind == {"layer 1": 0.5, "layer 2": 0.9}
    assert found["probe/depth/layer-2/depth_order"].value == 0.9


def test_costs_are_summed_over_stages_and_stages_may_be_links(tmp_path: Path) -> None:
    folder = finished_run(tmp_path / "a")
    shared = tmp_path / "stages" / "1_align-4f2a"
    shutil.move(folder / "1_align", shared)
    (folder / "1_align").symlink_to(shared)
    cost = read_run(folder).cost
    assert (cost.seconds, cost.device_seconds, cost.devices) == (120, 240, 2)
    assert (cost.steps, cost.trained, cost.tokens_per_second) == (sum(STAGES.values()), 12_345, 1000)
    assert cost.peak_bytes == 3 * 2**30
    (shared / "progress.json").unlink()
    assert math.isnan(read_run(folder).cost.seconds)


def test_curves_of_all_stages_stand_one_after_the_other(tmp_path: Path) -> None:
    folder = finished_run(tmp_path / "a")
    for number, stage in enumerate(STAGES):
        tracked = MLflowRun(f"sqlite:///{tmp_path}/mlflow.db", "lit-vlm", stage, {}, folder / stage)
        tracked.owns_folder()
        for step in (10, 20):
            tracked.metrics({"train/loss": 4.0 - number - step / 100, "val/loss": 5.0, "lr/projector": 1.0}, step)
        tracked.metrics({"train/loss": 9.0, "memory/reserved": 7.0}, 20)  # taken again after an interruption
        tracked.tag("version.torch", "2.15")
        tracked.text(json.dumps({"train/shapes": "abc"}), "data_fingerprints.json")
        tracked.text(json.dumps({"train/shapes": {"licence": "MIT"}}), "data_provenance.json")
        tracked.end("FINISHED")
    run = read_run(folder)
    assert run.curves["train/loss"] == [(10, 3.9), (20, 9.0), (40, 2.9), (50, 9.0)]
    assert "lr/projector" not in run.curves
    assert (run.scores["train/loss"].value, run.scores["val/loss"].better) == (9.0, "lower")
    assert (run.cost.peak_bytes, run.scores["memory/peak_gib"].value) == (7 * 2**30, 7.0)
    assert run.origin == {"version.torch": "2.15", "data.train/shapes": "abc"}


def test_a_loss_that_was_infinite_stays_so(tmp_path: Path) -> None:
    folder = finished_run(tmp_path / "a")
    tracked = MLflowRun(f"sqlite:///{tmp_path}/mlflow.db", "lit-vlm", "2_sft", {}, folder / "2_sft")
    tracked.owns_folder()
    for step, value in ((10, 2.0), (20, math.inf)):
        tracked.metrics({"train/loss": value}, step)
    tracked.end("FINISHED")
    assert [value for _, value in read_run(folder).curves["train/loss"]] == [2.0, math.inf]


def test_a_store_that_is_gone_leaves_curves_out_and_is_not_made_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = finished_run(tmp_path / "a")
    store = tmp_path / "gone.db"
    told = {"tracking_uri": f"sqlite:///{store}", "run_id": "1"}
    (folder / "2_sft" / "mlflow.json").write_text(json.dumps(told))
    assert read_run(folder).curves == {}
    assert "is gone; curves are left out" in caplog.text
    assert not store.exists()


def test_a_single_stage_is_a_run(tmp_path: Path) -> None:
    inside = finished_run(tmp_path / "a", ["--seed_everything", "2", "--model.x", "1"]) / "2_sft"
    run = read_run(inside)
    assert (run.seed, run.flags[3:], run.cost.steps) == (2, ("--stages 1_align,2_sft", "--model.x 1"), 50)
    config = "seed_everything: 5\ntrainer: {max_steps: 3, default_root_dir: runs/x}\nmodel: {projector: null}\n"
    alone = finished_stage(tmp_path / "alone", 9, config)
    score_held_out(alone, [1, 0])
    run = read_run(alone)
    assert (run.seed, run.flags) == (5, ("--trainer.max_steps 3",))


def test_runs_of_the_same_settings_are_one_variant_and_repetitions_another(tmp_path: Path) -> None:
    flags = [["--m", "1"], ["--m=1", "--seed_everything", "1"], ["--m", "2"], ["--m", "1"]]
    runs = [read_run(finished_run(tmp_path / str(number), own)) for number, own in enumerate(flags)]
    assert [run.variant for run in by_settings(runs, map(str, count()))] == ["0", "0", "1", "2"]


def test_the_last_of_equal_flags_and_the_strategy_tell_variants_apart(tmp_path: Path) -> None:
    flags = [["--m", "1", "--m", "2"], ["--m", "2", "--m", "1"], ["--n", "3", "--m", "1"], ["--m", "1", "--n", "3"]]
    runs = [read_run(finished_run(tmp_path / str(number), own)) for number, own in enumerate(flags)]
    file = finished_run(tmp_path / "fsdp", ["--m", "1", "--n", "3", "--seed_everything", "1"]) / "run.json"
    file.write_text(file.read_text().replace('"single"', '"fsdp"'))
    runs.append(read_run(file.parent))
    assert [run.flags[4:] for run in runs[2:4]] == [("--m 1", "--n 3")] * 2
    assert [run.variant for run in by_settings(runs, map(str, count()))] == ["0", "1", "2", "3", "4"]


def test_an_evaluation_tells_how_it_was_asked(tmp_path: Path) -> None:
    stage = finished_run(tmp_path / "a") / "2_sft"
    settings = {"prompt": {"shots": 4, "seed": 42}, "choosing": "letter", "limit": 2, "batch_size": 16, "dtype": "fp32"}
    score_task(stage / "evaluation" / "scenes" / "4-shot", {"accuracy": 50.0}, [1, 0], settings=settings)
    score_task(
        stage / "evaluation" / "wer" / "0-shot", {"wer": 9.0}, [None], averaged=None, lower=["wer"], settings=settings
    )
    found = read_run(tmp_path / "a").scores
    asked = {"shots": 4, "seed": 42, "choosing": "letter"}
    assert found["scenes/4-shot/accuracy"].asked == asked
    error = next(one for name, one in found.items() if name.endswith("/wer"))
    assert (error.better, error.asked) == ("lower", asked | {"questions": 1})


def test_probes_of_an_earlier_checkpoint_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stage = finished_run(tmp_path / "a") / "2_sft"
    results = {
        str(stage / "checkpoints" / f"step={step}.ckpt"): {"cosine": [step / 100], "score": [], "score_name": ""}
        for step in (10, STAGES["2_sft"])
    }
    for name, chosen in (("probe", results), ("probe-early", dict([next(iter(results.items()))]))):
        (stage / name).mkdir()
        target = "depth" if name == "probe" else "seg"
        (stage / name / "probe.json").write_text(json.dumps({"target": target, "results": chosen}))
    found = read_run(tmp_path / "a").scores
    assert found["probe/depth/cosine"].value == 0.5
    assert "probe/seg/cosine" not in found
    assert "probe-early/probe.json is of no last checkpoint of this stage" in caplog.text


def test_what_is_no_finished_run_with_scores_is_refused(tmp_path: Path) -> None:
    cases = {
        "unfinished has not ended: 2_sft to go; lit-vlm run --resume --out": finished_run(
            tmp_path / "unfinished", done=False
        ),
        "held_out.json holds no scores: the last stage of the run needs callbacks.HeldOut": finished_run(
            tmp_path / "unscored", scored=False
        ),
        "is not the folder of a `lit-vlm run`, and no config.yaml": tmp_path / "nowhere",
        "--seed_everything is 'true', and runs are paired": finished_run(tmp_path / "s", ["--seed_everything=true"]),
    }
    begun = finished_stage(tmp_path / "begun", 9)
    (begun / "done.json").unlink()
    score_held_out(begun, [1, 0])  # before training, or by an earlier end
    cases["begun has not ended: it has no done.json"] = begun
    for name, content, message in (
        ("cut", "{", "cut/run.json is not JSON"),
        ("empty", "{}", "empty/run.json has no 'recipe': it is written by lit-vlm run"),
        ("list", "[]", "list/run.json holds no JSON object"),
    ):
        (finished_run(tmp_path / name) / "run.json").write_text(content)
        cases[message] = tmp_path / name
    (finished_stage(tmp_path / "nothing", 9) / "config.yaml").write_text("")
    cases["nothing/config.yaml holds no settings of a stage"] = tmp_path / "nothing"
    foreign = finished_run(tmp_path / "foreign") / "2_sft" / "evaluation" / "x" / "0-shot"
    foreign.mkdir(parents=True)
    (foreign / "scores.json").write_text("{}")
    cases["scores.json has no 'task', so it is not of lit-vlm evaluate"] = tmp_path / "foreign"
    broken = finished_run(tmp_path / "broken")
    (broken / "2_sft" / "held_out.json").write_text("{")
    cases["held_out.json is not JSON"] = broken
    for message, folder in cases.items():
        with pytest.raises(ValueError, match=message):
            read_run(folder)
