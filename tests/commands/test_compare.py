"""The table of finished runs."""

import json
import re
from pathlib import Path
from zipfile import ZipFile

import pytest

from lit_vlm.commands.cli import main
from lit_vlm.commands.runs import RunState


def finished_run(folder: Path, flags: list[str], choice: float, done: bool = True, scored: bool = True) -> Path:
    """A run's folder as two stages of 30 and 50 steps leave it."""
    stages = ["1_align", "2_sft"]
    RunState("llava15", "mini", "single", stages, flags, done=stages if done else stages[:1]).save(folder)
    for stage, step in zip(stages, (30, 50), strict=True):
        (folder / stage / "checkpoints").mkdir(parents=True)
        with ZipFile(folder / stage / "checkpoints" / f"step={step}.ckpt", "w") as file:
            file.writestr("data", "")
    count = {"loss": 1.0, "choice_accuracy": choice, "exact_match": 0.0, "choice_chance": 0.25, "num_choices": 8}
    spoken = count | {"num_choices": 0, "exact_match": 0.5}
    scores = {"after": count | {"by_source": {"count": count, "spoken": spoken}}}
    if scored:
        (folder / stages[-1] / "held_out.json").write_text(json.dumps(scores))
    return folder


def cells(printed: str) -> list[list[str]]:
    """What stands in the rows of a printed table."""
    lines = [re.split(r"\s{2,}", line.strip()) for line in printed.splitlines()]
    return [line for line in lines if line[0] in ("seeds", "steps", "loss", "all", "count", "spoken")]


def test_runs_that_differ_in_the_seed_alone_are_one_column(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    runs = [
        finished_run(tmp_path / "a", ["--data.batch_size", "8", "--model.x", "1"], 0.5),
        finished_run(tmp_path / "b", ["--seed_everything", "1", "--model.x=1", "--data.batch_size", "8"], 0.7),
        finished_run(tmp_path / "c", ["--data.batch_size", "8", "--flag"], 0.25),
    ]
    main(["compare", *map(str, runs), str(runs[0])])
    printed = capsys.readouterr().out
    assert (
        "all: llava15 --scale mini --stages 1_align,2_sft --data.batch_size 8\nA: --model.x 1\nB: --flag\n" in printed
    )
    assert cells(printed) == [
        ["seeds", "0 1", "0"],
        ["steps", "80", "80"],
        ["loss", "1.000 ± 0.000", "1.000"],
        ["all", "60.0 ± 14.1", "25.0", "25.0%"],
        ["count", "60.0 ± 14.1", "25.0", "25.0%"],
        ["spoken", "50.0 ± 0.0", "50.0"],
    ]


def test_a_run_without_end_or_scores_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = {
        "2_sft to go": finished_run(tmp_path / "unfinished", [], 0.5, done=False),
        "needs callbacks.HeldOut": finished_run(tmp_path / "unscored", [], 0.5, scored=False),
        "is not the folder of a `lit-vlm run`": tmp_path / "nowhere",
    }
    for message, folder in cases.items():
        with pytest.raises(SystemExit):
            main(["compare", str(folder)])
        assert message in capsys.readouterr().err
