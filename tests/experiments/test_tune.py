"""`lit-vlm tune`: its file, its study, and searches that are interrupted."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock
from rich.console import Console

from lit_vlm.checkpoints.folder import checkpoints_in, is_done
from lit_vlm.checkpoints.progress import AT_WORK, Progress, State, now
from lit_vlm.commands.cli import main
from lit_vlm.commands.diff import resolved
from lit_vlm.commands.recipe import find_recipe
from lit_vlm.commands.runs import RunState
from lit_vlm.core.launcher import LOST
from lit_vlm.experiments.file import flag_words
from lit_vlm.experiments.tune import best, report, search
from lit_vlm.experiments.tune.file import TuneFile, read_file
from lit_vlm.experiments.tune.study import Trials, best_of
from lit_vlm.experiments.tune.trial import Outcome, folder_of, outcome, words_of
from tests.forkserver import interpreter
from tests.runs import environment, lit_vlm

RATE = "model.stage.train.decoder"
GIVEN: dict[str, Any] = {
    "recipe": "llava15",
    "scale": "tiny",
    "stages": ["2_sft"],
    "search": {RATE: {"low": 1e-5, "high": 1e-1, "log": True}, "data.batch_size": {"choices": [4, 8]}},
    "score": "val/loss",
    "better": "lower",
    "trials": 4,
}


def written(folder: Path, **changes: Any) -> Path:
    """A file of a search; None leaves a key out."""
    content = {key: value for key, value in {**GIVEN, **changes}.items() if value is not None}
    file = folder / "tune.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


# ---------------------------------------------------------------------------- the file


def test_numbers_are_numbers_as_yaml_or_people_write_them(tmp_path: Path) -> None:
    file = tmp_path / "tune.yaml"
    file.write_text(
        "recipe: quickstart\nscore: val/loss\nbetter: lower\nsearch:\n"
        "  a: {low: 1e-5, high: 1.0e-2, log: true}\n  b: {low: 1, high: 3}\n"
        "  c: {choices: [1e-4, 8, true, null, MLP]}\n"
        "  d: {low: 0.1, high: 0.4, step: 0.1}\n"
        "  e: {choices: ['32', '007', nan, 16-mixed, 1E+3, .5e1]}\n"
        "  f: {low: 1, high: 1000000000000000}\n"
    )
    found = read_file(file)
    assert (found.search["a"].low, found.search["a"].count) == (1e-5, None)
    assert found.search["b"].values() == [1, 2, 3]
    assert found.search["c"].values() == [1e-4, 8, True, None, "MLP"]
    assert found.search["d"].values() == [0.1, 0.2, 0.3, 0.4]
    assert found.search["e"].values() == ["32", "007", "nan", "16-mixed", 1e3, 5.0]
    assert found.search["f"].count == 10**15  # and nothing that holds them
    assert found.count == 20


def ranges(**one: Any) -> dict[str, Any]:
    return {"search": {RATE: one}}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"serach": {}}, r"there is no key 'serach' \(did you mean 'search'"),
        (ranges(lo=1, high=2), rf"search.{RATE}: there is no key 'lo' \(did you mean 'low'.*keys: low, high"),
        ({"recipe": None}, r"tune.yaml: recipe: Field required"),
        ({"better": None}, r"better: Field required"),
        ({"better": "less"}, r"better: Input should be 'higher' or 'lower', found 'less'"),
        ({"sampler": "gp"}, r"sampler: Input should be 'tpe', 'random' or 'grid', found 'gp'"),
        ({"trials": 0}, r"trials: Input should be greater than or equal to 1, found 0"),
        ({"search": {}}, r"search: name at least one flag"),
        (ranges(low=1), r"give low and high, or choices"),
        (ranges(low=1, high=float("inf")), r"low, high and step are finite numbers, found 1, inf and None"),
        (ranges(low=float("nan"), high=1), r"low, high and step are finite numbers, found nan, 1 and None"),
        (ranges(low=0, high=1, step=float("inf")), r"low, high and step are finite numbers, found 0, 1 and inf"),
        ({**ranges(low=1, high=10**12), "sampler": "grid"}, r"takes 10000 combinations at most, found 1000000000000"),
        (ranges(low=2, high=1), r"low must be less than high, found 2 and 1"),
        (ranges(low=0, high=1, log=True), r"log goes from a low above 0"),
        (ranges(low=0.0, high=1.0, step=-1), r"step must be above 0"),
        (ranges(low="a", high=1), r"low.*Input should be a valid"),
        (ranges(choices=[1]), r"choices are two or more different values"),
        (ranges(choices=[1, 1]), r"choices are two or more different values"),
        (ranges(choices=[1, 2], log=True), r"choices are all values; low, high, log and step are of a range"),
        ({"search": {"--" + RATE: {"choices": [1, 2]}}}, rf"search: write '{RATE}' without dashes"),
        ({"base": {"trainer.default_root_dir": "x"}}, r"base: trainer.default_root_dir is what a search sets itself"),
        ({"base": {RATE: 1.0}}, rf"{RATE} is both in base and in search"),
        ({"score": "held_out/accuracy"}, r"held_out/accuracy is known at the end alone.*set pruner: none"),
        ({"sampler": "grid"}, rf"sampler grid needs choices, or a step, for {RATE}"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        read_file(written(tmp_path, **changes))


def test_a_file_that_is_no_mapping_or_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ValueError, match=r"list.yaml holds keys of a search.*not a list"):
        read_file(tmp_path / "list.yaml")
    with pytest.raises(ValueError, match=r"none.yaml cannot be read: .*No such file"):
        read_file(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"recipe": "llava16"}, r"there is no recipe 'llava16' \(did you mean 'llava15'"),
        ({"scale": "tinyy"}, r"has no scale 'tinyy' \(did you mean 'tiny'"),
        ({"stages": ["2_stf"]}, r"has no stage '2_stf' \(did you mean '2_sft'"),
        ({"base": {"1_align.trainer.max_steps": 2}}, r"1_align.trainer.max_steps: '1_align' is neither a stage"),
        ({"base": {"modle.compile": "blocks"}}, r"modle.compile: 'modle' is neither .* \(did you mean 'model'"),
    ],
)
def test_a_wrong_recipe_stage_or_flag_is_refused_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], match: str
) -> None:
    with pytest.raises(SystemExit, match="1"):
        main(["tune", str(written(tmp_path, **changes)), "--out", str(tmp_path / "out")])
    assert re.search(match, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_what_the_machine_lacks_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as changed:
        changed.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(SystemExit, match="1"):
            main(["tune", str(written(tmp_path))])
    assert "lit-vlm tune needs the package optuna: pip install 'lit-vlm[tune]'" in capsys.readouterr().err
    with monkeypatch.context() as changed:
        changed.setenv("RANK", "0")
        changed.setenv("WORLD_SIZE", "2")
        with pytest.raises(SystemExit, match="1"):
            main(["tune", str(written(tmp_path))])
    assert "lit-vlm tune is one process" in capsys.readouterr().err
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"--jobs 3 needs as many GPUs, and there are 2"):
        search.places(3)
    assert search.places(2) == [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]
    assert search.places(1) == [{}]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(16)))
    assert search.places(3) == [{"OMP_NUM_THREADS": "5"}] * 3


# ---------------------------------------------------------------------------- the study


def test_a_study_that_was_closed_goes_on_with_other_settings_and_the_trials_that_were_under_way(
    tmp_path: Path,
) -> None:
    file = TuneFile(**GIVEN)
    once = Trials(file, tmp_path / "once", parallel=False)
    drawn = []
    for value in (3.0, 2.0, 1.0):
        trial = once.next()
        drawn.append(trial.params)
        once.end(trial, value)
    assert len({params[RATE] for params in drawn}) == 3
    for index, value in enumerate((3.0, 2.0, 1.0)):  # a process for each
        again = Trials(file, tmp_path / "again", parallel=False)
        begun = again.next()
        (trial,) = Trials(file, tmp_path / "again", parallel=False).under_way()
        assert (trial.number, trial.params) == (index, begun.params)
        assert trial.params == drawn[index]
        again.end(trial, value)
    found = best_of(Trials(file, tmp_path / "again", parallel=False).finished(), "lower")
    assert (found.number, found.params) == (2, drawn[2])


def test_a_folder_takes_the_trials_of_one_file(tmp_path: Path) -> None:
    Trials(TuneFile(**GIVEN), tmp_path, parallel=False)
    Trials(TuneFile(**GIVEN | {"trials": 9}), tmp_path, parallel=False)  # more of them
    with pytest.raises(ValueError, match=r"holds the search of another file: seed was 0, and is 1 now. Choose another"):
        Trials(TuneFile(**GIVEN | {"seed": 1}), tmp_path, parallel=False)


def test_a_grid_is_all_combinations_once(tmp_path: Path) -> None:
    grid = {"a": {"choices": ["x", None]}, "b": {"low": 1, "high": 5, "step": 2}}
    file = TuneFile(**GIVEN | {"search": grid, "sampler": "grid", "trials": None})
    for _ in range(2):  # the second time none is added
        trials = Trials(file, tmp_path, parallel=False)
    found = [trials.next().params for _ in range(file.count)]
    assert found == [{"a": a, "b": b} for a in ("x", None) for b in (1, 3, 5)]
    assert TuneFile(**GIVEN | {"search": grid, "sampler": "grid", "trials": 40}).count == 6


def test_the_best_is_the_best_of_those_that_came_to_their_end(tmp_path: Path) -> None:
    trials = Trials(TuneFile(**GIVEN | {"better": "higher"}), tmp_path, parallel=False)
    for value, reason, failed in ((0.2, "", False), (0.4, "", False), (None, "diverged", False), (None, "no", True)):
        trials.end(trials.next(), value, reason, failed)
    assert [one.state.name for one in trials.finished()] == ["COMPLETE", "COMPLETE", "PRUNED", "FAIL"]
    assert best_of(trials.finished(), "higher").number == 1
    assert best_of(trials.finished(), "lower").number == 0
    assert best_of(trials.finished()[2:], "higher") is None
    files = report.write(trials, tmp_path, "lit-vlm tune tune.yaml", tmp_path / "best")
    assert [file.name for file in files] == ["report.md", "history.png", "slice.png", "importances.png", "contour.png"]
    assert all(file.stat().st_size for file in files)
    text = files[0].read_text()
    assert "Best: **val/loss 0.4** (trial 1, trials/0001)" in text
    rows = [line for line in text.splitlines() if line.startswith("| ") and line[2].isdigit()]
    assert [row.split(" | ")[0] for row in rows] == ["| 1", "| 0", "| 2", "| 3"]
    assert rows[2].endswith("| pruned | diverged |")


def test_a_plot_that_cannot_be_drawn_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*arguments: object, **more: object) -> None:
        raise ValueError("no values")

    monkeypatch.setattr("optuna.visualization.matplotlib.plot_slice", fails)
    trials = Trials(TuneFile(**GIVEN), tmp_path, parallel=False)
    for value in (0.2, 0.4):
        trials.end(trials.next(), value)
    files = report.write(trials, tmp_path, "lit-vlm tune tune.yaml", None)
    assert [file.name for file in files] == ["report.md", "history.png", "importances.png", "contour.png"]
    assert re.search(r"slice.png is left out: ValueError: no values", caplog.text)
    assert "slice" not in files[0].read_text()


# ---------------------------------------------------------------------------- trials


def held_out(choices: int) -> dict[str, Any]:
    scores = {"loss": 1.5, "choice_accuracy": 0.75, "exact_match": 0.25, "num_choices": choices, "precision": "32"}
    return {"after": scores | {"by_source": {"count": scores | {"loss": 2.0}}}}


@pytest.mark.parametrize(
    ("score", "left", "found"),
    [
        ("val/loss", {"value": 1.0, "pruned": False, "step": 9}, Outcome(1.0)),
        ("val/loss", {"value": 1.0, "pruned": True, "step": 3}, Outcome(None, "given up at step 3")),
        ("val/loss", {"value": float("nan"), "pruned": False, "step": 9}, Outcome(None, "its score is nan")),
        ("held_out/loss", held_out(8), Outcome(1.5)),
        ("held_out/accuracy", held_out(8), Outcome(0.75)),
        ("held_out/accuracy", held_out(0), Outcome(0.25)),
        ("held_out/count/loss", held_out(8), Outcome(2.0)),
    ],
)
def test_what_a_trial_that_has_ended_is_worth(tmp_path: Path, score: str, left: dict[str, Any], found: Outcome) -> None:
    file = "held_out.json" if score.startswith("held_out/") else "tuned.json"
    (tmp_path / "2_sft").mkdir()
    (tmp_path / "2_sft" / file).write_text(json.dumps(left))
    assert outcome(0, tmp_path, ["1_align", "2_sft"], score, now()) == found


def test_a_trial_without_its_score_says_which_there_are(tmp_path: Path) -> None:
    (tmp_path / "2_sft").mkdir()
    found = outcome(0, tmp_path, ["2_sft"], "held_out/loss", now())
    assert (found.failed, found.value) == (True, None)
    assert "there is no 'held_out/loss'; there are none, in " in found.reason
    (tmp_path / "2_sft" / "held_out.json").write_text(json.dumps(held_out(8)))
    assert "(did you mean 'held_out/loss'" in outcome(0, tmp_path, ["2_sft"], "held_out/los", now()).reason


@pytest.mark.parametrize(("score", "file"), [("val/loss", "tuned.json"), ("held_out/loss", "held_out.json")])
def test_a_score_that_cannot_be_read_fails_the_trial_and_not_the_search(tmp_path: Path, score: str, file: str) -> None:
    (tmp_path / "2_sft").mkdir()
    if score == "val/loss":
        found = outcome(0, tmp_path, ["2_sft"], score, now())
        assert (found.failed, found.value) == (True, None)
        assert re.search(r"score: .*2_sft/tuned.json cannot be read: FileNotFoundError", found.reason)
    (tmp_path / "2_sft" / file).write_text('{"value": 1.')
    found = outcome(0, tmp_path, ["2_sft"], score, now())
    assert (found.failed, found.value) == (True, None)
    assert f"{file} cannot be read: JSONDecodeError" in found.reason


def test_a_training_that_breaks_is_kept_away_from_and_one_that_never_began_is_not(tmp_path: Path) -> None:
    (tmp_path / "output.log").write_text("...\nerror: there is no flag --x\n(set LIT_VLM_DEBUG=1 ...)\n")
    since = now()
    assert outcome(1, tmp_path, ["2_sft"], "val/loss", since) == Outcome(None, "there is no flag --x", failed=True)
    ended = Progress(3, 9, 0, None, since, since, "", 1, None, "failed", "ValueError: non-finite loss")
    ended.write(tmp_path / "2_sft")
    assert not outcome(1, tmp_path, ["2_sft"], "val/loss", since).failed
    assert outcome(-9, tmp_path / "none", ["2_sft"], "val/loss", since) == Outcome(None, "exit code -9", failed=True)


@pytest.mark.parametrize("state", AT_WORK)
def test_a_training_that_is_killed_is_kept_away_from_unless_it_was_an_earlier_process(
    tmp_path: Path, state: State
) -> None:
    started = "2026-07-01T10:00:05+00:00"
    Progress(3, 9, 0, None, started, started, "", 1, None, state).write(tmp_path / "2_sft")
    for code in (-9, LOST):  # the trial itself, or its stage, by the kernel that lacks memory
        found = outcome(code, tmp_path, ["1_align", "2_sft"], "val/loss", "2026-07-01T10:00:00+00:00")
        assert found == Outcome(None, f"exit code {code}", failed=False)
    # What is there was written before the search itself was killed; now the trial went on, and never began to train.
    assert outcome(1, tmp_path, ["1_align", "2_sft"], "val/loss", "2026-07-01T11:00:00+00:00").failed


def test_a_command_has_base_then_setting_then_the_callback_of_the_last_stage(tmp_path: Path) -> None:
    file = TuneFile(**GIVEN | {"base": {"trainer.max_steps": 2, "model.heads.align": None}})
    words = words_of(file, ["1_align", "2_sft"], tmp_path, 3, 4, {RATE: 1e-5})
    assert words[:9] == ["run", "llava15", "--stages", "1_align,2_sft", "--out", str(tmp_path / "trials" / "0003"),
                         "--scale", "tiny", "--trainer.max_steps"]  # fmt: skip
    assert words[9:14] == ["2", "--model.heads.align", "null", f"--{RATE}", "1e-05"]
    assert words[14] == "--2_sft.trainer.callbacks+"
    assert json.loads(words[15])["init_args"] == {
        "study": str(tmp_path / "study.db"), "trial": 4, "score": "val/loss", "pruner": "median", "startup": 5,
    }  # fmt: skip
    held = TuneFile(**GIVEN | {"score": "held_out/loss", "pruner": "none"})
    assert "--2_sft.trainer.callbacks+" not in words_of(held, ["2_sft"], tmp_path, 0, 1, {})


# ---------------------------------------------------------------------------- the best setting


def test_the_recipe_of_the_best_keeps_what_a_file_would_replace(tmp_path: Path) -> None:
    config = {
        "model": {
            "projector": {"class_path": "lit_vlm.projectors.MLP", "init_args": {"depth": 2, "width": None}},
            "stage": {"train": {"projector": 1e-3, "decoder": 2e-5}, "warmup_ratio": 0.1},
            "heads": {"align": {"class_path": "A", "init_args": {"every": 4}}, "other": None},
        },
        "trainer": {"max_steps": 7},
    }
    for stage in ("1_align", "2_sft"):
        (tmp_path / "trial" / stage).mkdir(parents=True)
        (tmp_path / "trial" / stage / "config.yaml").write_text(yaml.safe_dump(config))
    setting = {
        "model.stage.train.decoder": 2e-5, "model.projector.depth": 2, "model.heads.align.every": 4,
        "2_sft.trainer.max_steps": 7, "2_sft.model.stage.warmup_ratio": 0.1, "seed_everything": 3,
    }  # fmt: skip
    stages = ["1_align", "2_sft"]
    recipe = best.write_recipe(tmp_path, "llava15", None, stages, tmp_path / "trial", setting)
    first = {
        "model": {
            "stage": {"train": {"projector": 1e-3, "decoder": 2e-5}},
            "projector": {"class_path": "lit_vlm.projectors.MLP", "init_args": {"depth": 2}},
            "heads": config["model"]["heads"],
        },
        "seed_everything": 3,
    }
    assert yaml.safe_load((recipe / "1_align.yaml").read_text()) == first
    second = yaml.safe_load((recipe / "2_sft.yaml").read_text())
    assert second["trainer"] == {"max_steps": 7}
    assert second["model"].pop("stage") == first["model"].pop("stage") | {"warmup_ratio": 0.1}
    assert second["model"] == first["model"]
    found = find_recipe(str(recipe))
    assert found.base.name == "llava15"
    at_scale = best.write_recipe(tmp_path / "scaled", "llava15", "tiny", stages, tmp_path / "trial", setting)
    found = find_recipe(str(at_scale))
    assert found.scale == "tiny"
    assert found.configs("2_sft", "tiny", "single")[-2] == at_scale / "scales" / "tiny" / "2_sft.yaml"


@pytest.mark.parametrize(
    ("base", "setting"),
    [
        ({}, {"model.projector.init_args.depth": 3, "model.encoder.init_args.layer": -3}),
        ({}, {"model.projector.class_path": "lit_vlm.projectors.Linear", "data.batch_size": 2}),
        ({}, {"model.projector": "Resampler", "model.projector.depth": 3}),
        ({"model.projector": "Resampler"}, {"model.projector.depth": 3}),
        ({"model.projector": "Resampler"}, {"model.projector.num_queries": 9, "model.projector.init_args.depth": 3}),
        ({"model.projector.depth": 4}, {"model.projector": "MLP"}),
        (
            {"data.train": None, "data.train.own": "Shapes"},
            {"data.train.own.count": 5, "model.stage.train.decoder": 1e-3, "trainer.max_steps": 3},
        ),
    ],
)
def test_the_recipe_of_the_best_gives_the_settings_of_its_trial(
    tmp_path: Path, base: dict[str, Any], setting: dict[str, Any]
) -> None:
    def settings(recipe: str, *flags: str) -> dict[str, Any]:
        files = find_recipe(recipe).configs("2_sft", "tiny", "single")
        return resolved([*(word for file in files for word in ("--config", str(file))), *flags])

    def searched(config: dict[str, Any]) -> list[Any]:
        found = []
        for flag in setting:
            there: Any = config
            for part in flag.split("."):
                if "class_path" in there and part not in there:
                    there = there["init_args"]
                there = there[part]
            found.append(there)
        return found

    trial = settings("llava15", *flag_words({**base, **setting}))
    assert trial != settings("llava15")
    (tmp_path / "trial" / "2_sft").mkdir(parents=True)
    (tmp_path / "trial" / "2_sft" / "config.yaml").write_text(yaml.safe_dump(trial))
    recipe = best.write_recipe(tmp_path, "llava15", "tiny", ["2_sft"], tmp_path / "trial", setting)
    assert searched(settings(str(recipe))) == searched(trial)


# ---------------------------------------------------------------------------- searches


def test_one_process_works_in_a_folder(tmp_path: Path) -> None:
    setup = search.Setup(TuneFile(**GIVEN), tmp_path, ["2_sft"], 4)
    with FileLock(tmp_path / search.LOCK_FILE), pytest.raises(ValueError, match=r"another lit-vlm tune works in"):
        search.Search(setup, dict, Console(), lambda one: None).run()


def test_a_search_ends_when_its_first_trials_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = TuneFile(**GIVEN | {"recipe": "nowhere", "trials": 9})
    setup = search.Setup(file, tmp_path / "out", ["2_sft"], 9)
    ended: list[str] = []
    with pytest.raises(ValueError, match=r"the first 3 trials failed, the last one by: there is no recipe 'nowhere'"):
        search.Search(setup, dict, Console(quiet=True), lambda one: ended.append(one.state.name)).run()
    assert ended == ["FAIL"] * 3


@pytest.mark.slow
def test_a_dry_run_checks_the_ends_of_ranges_and_all_choices(tmp_path: Path) -> None:
    rate = {"low": 1e-5, "high": 1e-1, "log": True}
    file = written(tmp_path, search={RATE: rate, "model.projector": {"choices": ["Linear", "MLPs"]}})
    done = lit_vlm(tmp_path, "tune", str(file), "--dry-run", check=False)
    assert done.returncode == 1
    assert done.stdout.count("ready: config parses") == 1
    assert f"{RATE}=0.1 model.projector=MLPs" in done.stdout
    assert "there is no class 'MLPs' (did you mean 'MLP'" in " ".join((done.stdout + done.stderr).split())
    assert not (tmp_path / "runs").exists()


BASE = {
    "trainer.accelerator": "cpu", "trainer.precision": "32-true", "trainer.max_steps": 10, "trainer.max_epochs": -1,
    "trainer.val_check_interval": 2, "trainer.limit_val_batches": 1,
    "trainer.callbacks+": {"class_path": "tests.cluster.pause.Pause", "init_args": {"seconds": 0.2}},
}  # fmt: skip


def wait_for(met: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 600
    while not met():
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < end, log.read_text()[-3000:]
        time.sleep(0.05)


def begin(folder: Path, python: str, *words: str) -> tuple[subprocess.Popen[bytes], Path]:
    """Start a search; returns its process and what it prints."""
    log = folder / "search.log"
    command = [python, "-m", "lit_vlm", "tune", *words]
    with log.open("wb") as file:
        return subprocess.Popen(command, cwd=folder, env=environment(folder), stdout=file, stderr=file), log


@pytest.mark.slow
def test_a_search_that_is_killed_goes_on_in_the_middle_of_a_trial(tmp_path: Path) -> None:
    rates = {RATE: {"choices": [1e-3, 1e-7, 5e-3]}}
    file = written(tmp_path, base=BASE, search=rates, sampler="grid", trials=None, startup=1)
    process, log = begin(tmp_path, interpreter(), str(file), "--out", "out")
    stage = tmp_path / "out" / "trials" / "0000" / "2_sft"
    wait_for(lambda: bool(checkpoints_in(stage)), process, log)
    process.kill()
    process.wait()
    assert not is_done(stage)
    printed = lit_vlm(tmp_path, "tune", str(file), "--out", "out").stdout
    assert "going on: 0 trials have ended, 1 were under way" in printed
    assert (stage / "config-resumed.yaml").is_file()  # from its checkpoint
    # The first one may have been killed between its checkpoint and the validation of that step.
    assert re.search("trial 1: decoder=1e-07 pruned: given up at step [24]\n", printed)
    trials = Trials(read_file(file), tmp_path / "out", parallel=False)
    *first, last = (one.state.name for one in trials.finished())
    assert first == ["COMPLETE", "PRUNED"]
    assert last in ("COMPLETE", "PRUNED")  # how the larger rate does is that of the machine's arithmetic
    found = best_of(trials.finished(), "lower")
    kept = [number for number in range(3) if checkpoints_in(folder_of(tmp_path / "out", number) / "2_sft")]
    assert kept == [found.number]
    # The recipe of the best has its rate, and the other rate of the stage.
    assert f"lit-vlm run {Path('out/best')}" in printed
    steps = ["--trainer.max_steps", "1", "--trainer.accelerator", "cpu"]
    lit_vlm(tmp_path, "run", "out/best", "--stages", "2_sft", "--out", "again", *steps)
    assert RunState.load(tmp_path / "again").scale == "tiny"
    train = [
        yaml.safe_load((folder / "2_sft" / "config.yaml").read_text())["model"]["stage"]["train"]
        for folder in (tmp_path / "again", folder_of(tmp_path / "out", found.number))
    ]
    assert train[0] == train[1]
    assert train[0]["decoder"] == found.params[RATE]
    # Once more, nothing is left to do.
    again = lit_vlm(tmp_path, "tune", str(file), "--out", "out").stdout
    assert "going on: 3 trials have ended, 0 were under way" in again
    assert "starts" not in again


@pytest.mark.slow
def test_two_trials_at_a_time_leave_in_order_and_go_on(tmp_path: Path) -> None:
    # One may start long before the other; both are in the middle when the signal comes.
    meet = {"class_path": "tests.cluster.pause.Meet", "init_args": {"folder": str(tmp_path / "met"), "count": 2}}
    added = ["callbacks.HeldOut", meet, BASE["trainer.callbacks+"]]
    held = {"trainer.callbacks+": added, "trainer.limit_val_batches": 0, "trainer.max_steps": 40}
    changes = {"base": BASE | held, "score": "held_out/loss", "pruner": "none", "trials": 2}
    file = written(tmp_path, **changes)
    words = (str(file), "--out", "out", "--jobs", "2")
    process, log = begin(tmp_path, sys.executable, *words)  # a signal reaches no fork
    stages = [folder_of(tmp_path / "out", number) / "2_sft" for number in range(2)]
    wait_for(lambda: all((one := Progress.read(stage)) and one.step > 0 for stage in stages), process, log)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(600) == 130, log.read_text()
    assert "left: the same command goes on" in log.read_text()
    states = [one.state for stage in stages if (one := Progress.read(stage))]
    assert states == ["preempted"] * 2, log.read_text()
    printed = lit_vlm(tmp_path, "tune", *words).stdout
    assert "going on: 0 trials have ended, 2 were under way" in printed
    assert all((stage / "config-resumed.yaml").is_file() for stage in stages)
    assert "best: trial" in printed
    # One MLflow run for the search, above those of the trials.
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("lit-vlm").experiment_id])
    (above,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert (above.info.status, above.data.tags["state"]) == ("FINISHED", "FINISHED")
    assert f"best.{RATE}" in above.data.tags
    below = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == above.info.run_id]
    names = {run.data.tags["trial"]: run.info.run_name for run in below}
    assert names == {"0": "out/0000", "1": "out/0001"}
    assert above.data.metrics["best held_out/loss"] > 0
