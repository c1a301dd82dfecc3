"""The tables of finished runs."""

import json
import math
import re
from pathlib import Path

import pytest

from lit_vlm.commands.cli import main
from tests.experiments.made import finished_run, score_task


def rows(printed: str) -> list[list[str]]:
    """What stands in the rows of printed tables."""
    return [re.split(r"\s{2,}", line.strip()) for line in printed.splitlines() if re.search(r"\S\s{2,}\S", line)]


@pytest.fixture(autouse=True)
def _narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")  # tables are never cut off


def test_runs_that_differ_in_the_seed_alone_are_one_column(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [
        finished_run(tmp_path / "a", ["--data.batch_size", "8", "--model.x", "1"], [1, 0, 1, 0]),
        finished_run(tmp_path / "b", ["--seed_everything", "1", "--model.x=1", "--data.batch_size", "8"], [1, 0, 1, 1]),
        finished_run(tmp_path / "c", ["--data.batch_size", "8", "--flag"], [0, 0, 1, 0]),
    ]
    main(["compare", *map(str, runs), str(runs[0])])
    printed = capsys.readouterr().out
    assert (
        "all: llava15 --scale mini --strategy single --stages 1_align,2_sft --data.batch_size 8\n"
        "A: --model.x 1\nB: --flag\n" in printed
    )
    found = rows(printed)
    for row in (
        ["seeds", "0 1", "0"],
        ["steps", "80", "80"],
        ["held_out/loss", "1.375 ± 0.177", "1.750"],
        ["held_out/accuracy", "62.5 ± 17.7", "25.0", "25.0"],
        ["pictures shuffled", "0.0 ± 0.0", "0.0"],
        ["count", "50.0 ± 0.0", "0.0", "25.0"],
        ["depth", "75.0 ± 35.4", "50.0", "25.0"],
    ):
        assert row in found
    difference = next(row for row in found if row[:2] == ["B", "held_out/accuracy"])
    assert difference[2] == "−25.0"
    assert difference[-3:] == ["0 of 1", "–", "one seed"]
    assert "one seed: an interval is about questions alone; nothing is said about other seeds" in printed
    assert "differences are those of the seeds that both have" in printed


def many(folder: Path) -> list[str]:
    """Runs of two variants at five seeds, the second far better on held-out questions and equal in a task."""
    runs = []
    for seed in range(5):
        own = [float((index + seed) % 3 == 0) for index in range(40)]
        for name, flags, right in (("p", [], own), ("q", ["--model.x", "1"], [1 - 0.5 * (1 - one) for one in own])):
            run = finished_run(folder / f"{name}{seed}", [*flags, "--seed_everything", str(seed)], right)
            score_task(run / "2_sft" / "evaluation" / "scenes" / "0-shot", {"accuracy": 50.0}, [1, 0, 1, 0])
            runs.append(str(run))
    return runs


def test_differences_are_paired_judged_and_corrected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["compare", *many(tmp_path), "--json", str(tmp_path / "found" / "all.json")])
    printed = capsys.readouterr().out
    found = {row[1]: row for row in rows(printed) if row[0] == "B"}
    assert found["held_out/accuracy"][-1] == "better"
    assert found["held_out/accuracy"][-3] == "5 of 5"
    assert found["scenes/0-shot/accuracy"][-1] == "undecided"
    assert "p is corrected for 3 comparisons (Holm)" in printed
    saved = json.loads((tmp_path / "found" / "all.json").read_text())
    assert [run["seed"] for run in saved["runs"]] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert saved["runs"][0]["scores"]["held_out/accuracy"]["chance"] == 0.25
    own = next(one for one in saved["differences"] if one["score"] == "held_out/accuracy")
    assert (own["questions"], own["verdict"], len(own["by_seed"])) == (40, "shown", 5)
    assert own["low"] < own["mean"] < own["high"]


def test_the_base_and_the_scores_can_be_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = many(tmp_path)
    for base in ("B", f"{tmp_path}/q3"):
        main(["compare", *runs, "--base", base, "--score", "held_out/depth/accuracy"])
        printed = capsys.readouterr().out
        found = rows(printed)
        assert "against B; positive is better" in printed
        assert [row[:2] for row in found if row[0] == "A" and "/" in row[1]] == [["A", "held_out/depth/accuracy"]]
        assert next(row for row in found if row[0] == "A" and "/" in row[1])[2].startswith("−")


def test_a_report_names_variants_by_what_they_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["compare", *many(tmp_path), "--report", str(tmp_path / "report")])
    assert "report.html" in capsys.readouterr().out
    text = (tmp_path / "report" / "report.md").read_text()
    assert "| B: --model.x 1 | held_out/accuracy | better |" in text
    assert "## Differences to A" in text
    assert f"    lit-vlm compare {tmp_path}/p0" in text


def test_what_cannot_be_compared_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [finished_run(tmp_path / "a"), finished_run(tmp_path / "b", ["--m", "1", "--seed_everything", "7"])]
    main(["compare", *map(str, runs)])
    assert (
        "not compared with A: B on held_out/loss: The variants have no seed in common: [7] and [0]. Differences are "
        "paired by seed; run both with the same seeds; B on held_out/accuracy: " in capsys.readouterr().out
    )


def test_a_run_whose_loss_is_not_finite_is_named_and_hides_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = many(tmp_path)
    file = Path(runs[-1]) / "2_sft" / "held_out.json"
    found = json.loads(file.read_text())
    found["after"]["loss"] = math.nan
    file.write_text(json.dumps(found))
    main(["compare", *runs, "--json", str(tmp_path / "figures.json"), "--report", str(tmp_path / "report")])
    printed = " ".join(capsys.readouterr().out.split())
    assert "(1 of " in printed
    assert "not finite)" in printed
    assert "a score is not a finite number; leave this seed out" in printed
    assert "not compared with A: " in printed
    json.loads((tmp_path / "figures.json").read_text(), parse_constant=lambda name: pytest.fail(name))


def test_a_run_without_end_or_scores_and_unknown_names_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = str(finished_run(tmp_path / "good"))
    cases = {
        "2_sft to go": [str(finished_run(tmp_path / "unfinished", done=False))],
        "needs callbacks.HeldOut": [str(finished_run(tmp_path / "unscored", scored=False))],
        "is not the folder of a `lit-vlm run`": [str(tmp_path / "nowhere")],
        "--score held_out/acuracy: no run has it (did you mean 'held_out/accuracy'": [
            good, "--score", "held_out/acuracy",
        ],
        "--base C is neither a letter of the table (A) nor one of the folders": [good, "--base", "C"],
    }  # fmt: skip
    for message, words in cases.items():
        with pytest.raises(SystemExit):
            main(["compare", *words])
        assert message in capsys.readouterr().err
