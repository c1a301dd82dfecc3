"""The report of a study: report.md, report.html, and figures as PNG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lit_vlm.core.written import write_whole
from lit_vlm.experiments.report import curves, forest, tables, words
from lit_vlm.experiments.report.curves import Line
from lit_vlm.experiments.report.forest import Panel
from lit_vlm.experiments.report.study import SPENT, Finding, Gap, Study, findings, gaps
from lit_vlm.experiments.report.tables import Table, cell, markdown_table
from lit_vlm.training.mlflow_run import MLflowRun

MARKDOWN, PAGE, FOREST, CURVES = "report.md", "report.html", "forest.png", "curves.png"
TEMPLATE = "page.html.j2"


def write_report(study: Study, folder: Path) -> list[Path]:
    """Write the report of a study; files of an earlier one are replaced.

    Args:
        study: what ran, and what is claimed of it.
        folder: where the report goes; it is made if it is not there.

    Returns:
        the files: report.md, report.html, and forest.png and curves.png where there is something to draw.

    Raises:
        OSError: where a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found, compared = findings(study), gaps(study)
    panels, lines = forest.panels(study, found, compared), curves.curves(study)
    every = _tables(study, found, compared)
    summary = "" if study.claims else words.summary(compared, study.base)
    files = [folder / MARKDOWN, folder / PAGE]
    for name, drawn, draw in (
        (FOREST, panels, partial(forest.draw, panels, study.title)),
        (CURVES, lines, partial(curves.draw, lines)),
    ):
        if drawn:
            write_whole(folder / name, draw)
            files.append(folder / name)
        else:
            (folder / name).unlink(missing_ok=True)
    write_whole(folder / MARKDOWN, _markdown(study, found, summary, every, files))
    write_whole(folder / PAGE, _page(study, found, summary, panels, lines, every))
    return files


def log_report(run: MLflowRun, study: Study, files: Sequence[Path]) -> None:
    """Report a study to an MLflow run: its files as artifacts, and differences with their intervals as metrics.

    Args:
        run: such as the parent of all runs of an ablation.
        study: as it was written.
        files: what `write_report` returned.
    """
    for file in files:
        run.file(file)
    metrics: dict[str, float] = {}
    for gap in gaps(study):
        metrics |= _metrics(f"difference/{gap.variant}/{gap.score}", gap.judged.difference)
    for number, finding in enumerate(findings(study), 1):
        if finding.judged is not None:
            metrics |= _metrics(f"claim/{number}", finding.judged.difference)
            metrics[f"claim/{number}/p"] = finding.judged.p_value
            run.tag(f"claim.{number}", f"{finding.judged.verdict}: {finding.claim.text}")
    if metrics:
        run.metrics(metrics, step=0)


def findings_table(studies: Sequence[Study]) -> str:
    """A Markdown table of all claims of several studies: difference, interval, seeds, verdict, command, cost."""
    rows = []
    for study in studies:
        cost = study.about.get(SPENT) or words.hours(math.fsum(run.cost.device_seconds for run in study.runs))
        for finding in findings(study):
            judged = finding.judged
            cells = (finding.missing, "", "not judged")
            if judged is not None:
                share = study.example(finding.claim.score).share
                gained = f"{words.gained(judged.difference, share)}{words.unit(share)}"
                cells = (gained, str(judged.difference.seeds), judged.verdict)
            command = f"`{study.command}`" if study.command else ""
            source = f" ({finding.claim.source})" if finding.claim.source else ""
            rows.append((f"{finding.claim.text}{source}", finding.claim.score, *cells, command, cost))
    head = ("claim", "score", "difference [95 %]", "seeds", "verdict", "command", "device time")
    return markdown_table(Table("", head, tuple(rows)))


def _metrics(prefix: str, found: Any) -> dict[str, float]:
    values = {"mean": found.mean, "low": found.low, "high": found.high}
    return {f"{prefix}/{name}": value for name, value in values.items() if math.isfinite(value)}


def _tables(study: Study, found: Sequence[Finding], compared: Sequence[Gap]) -> list[Table]:
    judged = [*(one.judged for one in found), *(gap.judged for gap in compared)]
    differences = [one.difference for one in judged if one is not None]
    every = [
        tables.scores_table(study),
        tables.gaps_table(study, compared),
        *tables.kinds_tables(study),
        tables.costs_table(study),
        tables.seeds_table(study),
        tables.settings_table(study),
        tables.origin_table(study, differences),
    ]
    # Without rows the command stands under the one, and under the other why nothing was compared.
    kept = ["Origin", *([tables.differences(study)] if study.variants[1:] else [])]
    return [table for table in every if table.rows or table.title in kept]


def _about(study: Study) -> str:
    seeds = sorted({run.seed for run in study.runs})
    many = f"{len(seeds)} seeds" if len(seeds) > 1 else "one seed"
    return f"{len(study.variants)} variants, {many}, {len(study.runs)} runs"


# ---------------------------------------------------------------------- Markdown


def _markdown(
    study: Study, found: Sequence[Finding], summary: str, every: Sequence[Table], files: Sequence[Path]
) -> str:
    lines = [f"# {study.title}", "", f"{_about(study)}.", "", *([summary, ""] if summary else [])]
    for finding in found:
        share = study.example(finding.claim.score).share if finding.judged is not None else False
        verdict = finding.judged.verdict if finding.judged is not None else "not judged"
        source = f" ({finding.claim.source})" if finding.claim.source else ""
        told = f"{words.headline(finding, share)}. {words.details(finding, share)}"
        lines.append(f"- **{verdict}**: {told} Claimed: “{cell(finding.claim.text)}”{source}")
    lines += [""] if found else []
    for file in files:
        if file.suffix == ".png":
            lines += [f"![{file.stem}]({file.name})", ""]
    for table in every:
        lines += [f"## {table.title}", ""]
        if table.title == "Origin" and study.command:
            lines += [f"    {study.command}", ""]
        if table.rows:
            lines += [markdown_table(table), ""]
        lines += [table.note, ""] if table.note else []
    return "\n".join(lines)


# ---------------------------------------------------------------------- page


def _page(
    study: Study,
    found: Sequence[Finding],
    summary: str,
    panels: Sequence[Panel],
    lines: dict[str, list[Line]],
    every: Sequence[Table],
) -> str:
    """One page that needs no other file, and no network."""
    from jinja2 import Environment, PackageLoader
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("lit_vlm.experiments.report", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    legend = {line.variant: line for of_metric in lines.values() for line in of_metric}
    return environment.get_template(TEMPLATE).render(
        title=study.title,
        about=_about(study),
        summary=summary,
        findings=[_told(study, finding) for finding in found],
        forest="What was found" if study.claims else f"Differences to {study.base}",
        panels=panels,
        at=lambda panel, value: f"{100 * panel.place(value):.2f}%",
        tick_text=lambda value: f"{value:g}".replace("-", "−"),
        curves=[(name, Markup(curves.svg(name, of_metric))) for name, of_metric in lines.items()],
        legend=list(legend.values()),
        tables=every,
        command=study.command,
    )


def _told(study: Study, finding: Finding) -> dict[str, Any]:
    judged = finding.judged
    share = study.example(finding.claim.score).share if judged is not None else False
    verdict = judged.verdict if judged is not None else "not judged"
    return {
        "claim": finding.claim,
        "verdict": verdict,
        "state": verdict.replace(" ", "-") if judged is not None else "missing",
        "headline": words.headline(finding, share),
        "details": words.details(finding, share),
    }
