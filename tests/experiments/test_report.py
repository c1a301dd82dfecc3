"""Reports: findings in words, tables, figures, one page, MLflow."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lit_vlm.commands.cli import main
from lit_vlm.experiments.report import Study, curves, findings, findings_table, gaps, log_report, tables, write_report
from lit_vlm.experiments.report.forest import panels
from lit_vlm.experiments.report.words import details, headline, number, summary
from lit_vlm.experiments.results import Claim, Cost, Run, Score
from lit_vlm.experiments.scores import read_run
from lit_vlm.training.mlflow_run import MLflowRun
from tests.runs import lit_vlm

KINDS = ("count", "depth")


def run(variant: str, seed: int, accuracy: float, loss: float) -> Run:
    """A run whose answers are right where a number of the question is below the accuracy."""
    answers = {str(index): float((index * 7 + seed) % 50 < 50 * accuracy) for index in range(50)}
    kinds = {question: KINDS[int(question) % 2] for question in answers}
    by_kind = {kind: accuracy + index / 100 for index, kind in enumerate(KINDS)}
    return Run(
        variant, seed, Path("out") / variant / f"seed-{seed}", ("eve", f"--model.x {variant}"),
        {
            "scenes/0-shot/accuracy": Score(
                accuracy, answers=answers, kinds=kinds, chance=0.25, shuffled=0.3, main=True, by_kind=by_kind
            ),
            "held_out/loss": Score(loss, "lower", share=False, main=True),
        },
        {"train/loss": [(step, 3 + loss - step / 100) for step in range(0, 100, 10)]},
        Cost(3600, 8, 7_000_000_000, 100, 41_000, 60 * 2**30, 8 * 3600),
        origin={"version.torch": "2.15", "git.commit": f"abc{seed % 2}"},
    )  # fmt: skip


CLAIMS = (
    Claim("PAL brings +2.9", "base", "no-pal", "scenes/0-shot/accuracy", "EVE, table 5"),
    Claim("PAL harms the loss", "no-pal", "base", "held_out/loss"),
    Claim("a second <run> is better", "base", "again", "held_out/loss"),
    Claim("stage 1 helps", "base", "no-stage-1", "scenes/0-shot/accuracy"),
)


def study(seeds: int = 4, claims: Sequence[Claim] = CLAIMS) -> Study:
    """The base is far better than one variant, and cannot be told from another."""
    runs = []
    for seed in range(seeds):
        noise = 0.01 * (seed % 2)
        runs += [
            run("base", seed, 0.8 + 2 * noise, 1.0 + noise),
            run("no-pal", seed, 0.4, 2.0),
            run("again", seed, 0.8, 1.0 + 0.03 * (seed % 3) - noise),
        ]
    return Study("What PAL brings", "base", runs, claims, command="lit-vlm ablate pal.yaml", about={"saved": "3 h"})


def test_findings_say_what_was_found_and_what_was_not() -> None:
    found = findings(study())
    assert [one.judged.verdict if one.judged else "" for one in found] == ["shown", "contradicted", "undecided", ""]
    said = [(headline(one, index in (0, 3)), details(one, index in (0, 3))) for index, one in enumerate(found)]
    assert said[0][0] == "base is 41.0 points better than no-pal on scenes/0-shot/accuracy"
    assert re.match(r"base − no-pal: \+41\.0 points \(95% interval \+\d.*, better at 4 of 4 seeds, p", said[0][1])
    assert said[1][0] == "base is 0.995 better than no-pal on held_out/loss"
    assert said[1][1].startswith("no-pal − base: −0.995 (95% interval −1.")
    assert said[2][0] == "base and again are not told apart on held_out/loss"
    assert re.search(r"seeds would (not )?decide, if the difference is as observed\. A true diff", said[2][1])
    assert said[3][1] == "No finished run of no-stage-1 has the score scenes/0-shot/accuracy."


def test_one_seed_gives_no_verdict_about_seeds() -> None:
    found = findings(study(1))
    assert {one.judged.verdict for one in found if one.judged} == {"one seed"}
    assert headline(found[0], True) == "With one seed, base came out 40.0 points better than no-pal on " + (
        "scenes/0-shot/accuracy"
    )
    assert details(found[0], True).startswith("50 questions: +40.0 [")
    assert details(found[1], False) == "Nothing is said about other seeds."
    assert {row[2] for row in tables.gaps_table(study(1), gaps(study(1))).rows} == {"one seed"}


def test_verdicts_of_several_looks_are_those_of_the_report_with_their_intervals() -> None:
    known = [one.judged for one in findings(study()) if one.judged is not None]
    looked = [replace(one, verdict="undecided", low=one.low - 1, high=one.high + 1) for one in known]
    given = replace(study(), judged=looked)
    found = [one.judged for one in findings(given) if one.judged is not None]
    assert [one.verdict for one in found] == ["undecided"] * 3
    assert [(one.difference.low, one.difference.high) for one in found] == [(one.low, one.high) for one in looked]
    methods = dict(tables.origin_table(given, [one.difference for one in found]).rows)["intervals"]
    assert "paired t over seeds, for all claims and looks at once" in methods


def test_where_seeds_are_added_only_claims_have_verdicts() -> None:
    given = replace(study(), judged=[one.judged for one in findings(study()) if one.judged is not None])
    table = tables.gaps_table(given, gaps(given))
    assert {(row[2], row[6]) for row in table.rows} == {("–", "–")}
    assert "only claims have verdicts that allow for that" in table.note
    waiting = findings(replace(study(), open="of the look at 2 seeds 3 runs have not finished"))
    assert {(one.judged, one.missing) for one in waiting} == {(None, "of the look at 2 seeds 3 runs have not finished")}


def test_what_does_not_count_is_said() -> None:
    made = study()
    first = made.runs[1]
    scores = dict(first.scores)
    accuracy = scores["scenes/0-shot/accuracy"]
    scores["scenes/0-shot/accuracy"] = replace(
        accuracy, answers={k: v for k, v in accuracy.answers.items() if k != "0"}
    )
    scores["held_out/loss"] = replace(scores["held_out/loss"], value=math.inf)
    runs = [replace(one, scores=scores) if one is first else one for one in made.runs]
    given = replace(made, runs=[one for one in runs if (one.variant, one.seed) != ("again", 3)])
    assert "(1 questions left out, as not all runs have answered them)" in details(findings(given)[0], True)
    note = tables.gaps_table(given, gaps(given)).note
    assert "Of some: 1 questions left out, as not all runs have answered them; seed 3 left out, as only one" in note
    assert "Not compared: no-pal on held_out/loss: seed 0: a score is not a finite number; leave this seed out." in note
    assert tables.scores_table(given).rows[1][4] == "– (1 of 4 not finite)"


def test_equal_differences_ask_for_no_more_seeds() -> None:
    claims = (Claim("less memory", "base", "again", "memory/peak_gib"),)
    base = study(3, claims)
    runs = [
        replace(one, scores={"memory/peak_gib": Score(2.0 + (one.variant == "again"), "lower", share=False)})
        for one in base.runs
    ]
    (found,) = findings(replace(base, runs=runs))
    assert details(found, False).endswith(
        "p = 1.000. All differences are equal, so nothing says how uncertain they are."
    )


def test_signs_that_libraries_read_as_their_own_stay_letters(tmp_path: Path) -> None:
    text = "what ${oc.env:X} | and\n<b>$x^y^z$</b> bring"
    given = replace(study(3, [replace(CLAIMS[0], text=text)]), title=text)
    runs = [replace(one, variant=f"{one.variant}: $x^y^z$") for one in given.runs]
    claims = [replace(given.claims[0], better="base: $x^y^z$", worse="no-pal: $x^y^z$")]
    files = write_report(replace(given, base="base: $x^y^z$", runs=runs, claims=claims), tmp_path)
    assert {file.name for file in files} == {"report.md", "report.html", "forest.png", "curves.png"}
    assert "&lt;b>$x^y^z$&lt;/b> bring”" in files[0].read_text()
    assert "<b>$x" not in files[1].read_text()


def test_a_report_leaves_no_figure_of_an_earlier_one(tmp_path: Path) -> None:
    write_report(study(), tmp_path)
    files = write_report(
        replace(study(), runs=[replace(run("base", 0, 0.5, 1.0), curves={}, origin={})], claims=(), about={}), tmp_path
    )
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(file.name for file in files)
    assert "## Origin\n\n    lit-vlm ablate pal.yaml" in files[0].read_text()
    assert not (tmp_path / "forest.png").exists()


def test_without_claims_the_differences_are_summed_up(tmp_path: Path) -> None:
    files = write_report(study(4, ()), tmp_path)
    told = "Worse than base: no-pal on scenes/0-shot/accuracy, no-pal on held_out/loss. Undecided: 2 of 4 differences."
    assert [told in file.read_text() for file in files[:2]] == [True, True]
    assert summary(gaps(study(1)), "base") == "One seed: nothing is said about other seeds."
    assert summary([], "base") == ""


def test_tables_have_every_variant_kind_cost_and_run() -> None:
    made = study()
    scores = tables.scores_table(made)
    assert scores.head == ("variant", "seeds", "scenes/0-shot/accuracy", "pictures shuffled", "held_out/loss")
    assert scores.rows[0] == ("base", "0 1 2 3", "81.0 ± 1.2", "30.0 ± 0.0", "1.005 ± 0.006")
    assert scores.rows[-1] == ("guessing", "", "25.0", "", "")
    (kinds,) = tables.kinds_tables(made)
    assert kinds.rows[1] == ("depth", "82.0", "41.0 (−41.0)", "81.0 (−1.0)")
    assert tables.costs_table(made).rows[0] == (
        "base", "4", "60 min", "8", "32.0 h", "100", "7 B", "41,000", "60.0 GiB",
    )  # fmt: skip
    assert tables.seeds_table(made).rows[5] == ("no-pal, seed 1", "40.0", "2.000", "out/no-pal/seed-1")
    assert tables.settings_table(made).rows[:2] == (("all", "eve"), ("base", "--model.x base"))
    origin = dict(tables.origin_table(made, []).rows)
    assert (origin["git.commit"], origin["saved"]) == ("abc0 / abc1", "3 h")


def test_a_number_has_as_many_digits_as_tell_something() -> None:
    assert [number(value, False) for value in (1234.56, 45.678, 1.2345, math.nan, -math.inf)] == [
        "1,235", "45.7", "1.234", "–", "−∞",
    ]  # fmt: skip
    assert (number(-0.1234, True, signed=True), number(0.5, True)) == ("−12.3", "50.0")


def test_marks_stand_on_an_axis_for_each_unit_and_far_ends_are_cut_off() -> None:
    shares, losses = panels(study(2), findings(study(2)), [])
    assert [mark.label for mark in losses.marks] == ["PAL harms the loss", "a second <run> is better"]
    assert (shares.axis, shares.marks[0].mean) == ("points; right of the line is as claimed", pytest.approx(41))
    assert all(0 <= panel.place(0) <= 1 for panel in (shares, losses))
    wild = losses.marks[1]
    assert wild.high - wild.low > 0
    assert losses.left >= -3.4 * max(abs(seed) for mark in losses.marks for seed in mark.seeds)
    assert shares.place(-1e9) == 0
    assert any(abs(tick) < 1e-9 for tick in shares.ticks())
    without = Study("t", "base", study().runs)
    marks = [mark for panel in panels(without, [], gaps(without)) for mark in panel.marks]
    assert {(mark.label, mark.verdict) for mark in marks} >= {("no-pal", "worse"), ("again", "undecided")}


def test_equal_variants_have_an_axis_too(tmp_path: Path) -> None:
    same = Study("t", "base", [run(variant, 0, 0.5, 1.0) for variant in ("base", "same")])
    loss = panels(same, [], gaps(same))[1]
    assert (loss.left, loss.place(0), loss.right) == (-1.12, 0.5, 1.12)
    assert "forest.png" in {file.name for file in write_report(same, tmp_path)}


def test_curves_are_means_over_seeds_in_a_band() -> None:
    line = curves.curves(study())["train/loss"][0]
    assert line.variant == "base"
    assert line.steps.shape == line.mean.shape == (10,)
    np.testing.assert_allclose(line.mean[0], 4.005)
    np.testing.assert_allclose(line.high - line.low, 0.01)
    drawn = curves.svg("train/loss", [line])
    assert drawn.startswith("<svg")
    assert "currentColor" in drawn
    assert drawn == curves.svg("train/loss", [line])


class Links(HTMLParser):
    """Collects what a page would load, and counts open tags."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        named = dict(attrs)
        self.loaded += [named[key] or "" for key in ("src", "href", "xlink:href") if key in named]


def test_the_page_stands_alone_and_has_the_findings_first(tmp_path: Path) -> None:
    files = write_report(study(), tmp_path / "report")
    assert [file.name for file in files] == ["report.md", "report.html", "forest.png", "curves.png"]
    page = (tmp_path / "report" / "report.html").read_text()
    parser = Links()
    parser.feed(page)
    assert [link for link in parser.loaded if not link.startswith("#")] == []
    assert not {"script", "link", "img"} & set(parser.tags)
    assert "url(http" not in page
    order = ["base is 41.0 points better", "What was found", "Curves", "Scores", "Differences to base", "by kind",
             "Cost", "Each run", "Variants", "Origin", "lit-vlm ablate pal.yaml"]  # fmt: skip
    places = [page.index(text) for text in order]
    assert places == sorted(places)
    assert "a second &lt;run&gt; is better" in page
    assert page.count('class="mean"') == 3
    assert page.count('class="seed"') == 3 * 4
    for file in files[2:]:
        with Image.open(file) as picture:
            assert min(picture.size) > 200
    assert write_report(study(), tmp_path / "report")[1].read_text() == page


def test_the_markdown_has_findings_figures_and_tables(tmp_path: Path) -> None:
    write_report(study(), tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "- **shown**: base is 41.0 points better than no-pal on scenes/0-shot/accuracy. base − no-pal" in text
    assert "Claimed: “PAL brings +2.9” (EVE, table 5)" in text
    assert "![forest](forest.png)" in text
    assert "| base | 4 | 60 min | 8 | 32.0 h | 100 | 7 B | 41,000 | 60.0 GiB |" in text
    assert "    lit-vlm ablate pal.yaml" in text


def test_one_variant_without_curves_is_a_report_too(tmp_path: Path) -> None:
    bare = [
        Run("base", 0, Path("x"), ("eve",), {"val/loss": Score(1.0, "lower", main=True)}, {}, Cost(math.nan, 0, 0, 9))
    ]
    files = write_report(Study("t", "base", bare), tmp_path)
    assert [file.name for file in files] == ["report.md", "report.html"]
    assert "| base | 1 | – | – | – | 9 | – | – | – |" in files[0].read_text()


def test_a_base_without_runs_is_refused() -> None:
    with pytest.raises(ValueError, match="no run of the variant 'bass', which others are compared with, has finished"):
        Study("t", "bass", study().runs)


def test_findings_of_several_studies_are_one_table() -> None:
    lines = findings_table([study(), study(1)]).splitlines()
    assert len(lines) == 2 + 2 * len(CLAIMS)
    assert lines[0] == "| claim | score | difference [95 %] | seeds | verdict | command | device time |"
    assert re.fullmatch(
        r"\| PAL brings \+2\.9 \(EVE, table 5\) \| scenes/0-shot/accuracy \| \+41\.0 \[.*\] points \| 4 \| shown "
        r"\| `lit-vlm ablate pal.yaml` \| 96.0 h \|",
        lines[2],
    )
    assert "| not judged |" in lines[5]


def test_a_report_is_logged_as_artifacts_and_metrics(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    run = MLflowRun(f"sqlite:///{tmp_path}/mlflow.db", "lit-vlm", "ablation", {}, tmp_path)
    log_report(run, study(), write_report(study(), tmp_path / "report"))
    run.end("FINISHED")
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    found = client.get_run(run.run_id)
    assert {file.path for file in client.list_artifacts(run.run_id)} == {
        "report.md", "report.html", "forest.png", "curves.png",
    }  # fmt: skip
    metrics = found.data.metrics
    assert metrics["claim/1/mean"] == pytest.approx(0.41)
    assert metrics["claim/1/low"] < metrics["claim/1/mean"] < metrics["claim/1/high"]
    assert metrics["difference/no-pal/held_out/loss/mean"] == pytest.approx(-0.995)
    assert found.data.tags["claim.1"] == "shown: PAL brings +2.9"


@pytest.mark.slow
def test_a_run_of_the_kit_is_read_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--trainer.max_steps", "4", "--trainer.log_every_n_steps", "1", "--trainer.accelerator", "cpu"]
    flags += ["--seed_everything", "3", "--trainer.callbacks+=callbacks.HeldOut"]
    lit_vlm(tmp_path, "run", "llava15", "--scale", "tiny", "--stages", "1_align", "--out", "run", *flags)
    run = read_run(tmp_path / "run")
    assert (run.seed, run.cost.steps, run.cost.devices) == (3, 4, 1)
    assert [step for step, _ in run.curves["train/loss"]] == [0, 1, 2, 3]
    assert run.cost.trained > 0
    assert run.scores["memory/peak_gib"].value > 0
    assert {"version.torch", "data.train/shapes"} <= run.origin.keys()
    main(["compare", str(tmp_path / "run"), "--report", str(tmp_path / "report")])
    assert "held_out/accuracy" in capsys.readouterr().out
    assert "version.torch" in (tmp_path / "report" / "report.html").read_text()
