"""The report of a study: findings, a forest plot, curves, tables, costs; as a page, as Markdown and as figures."""

from lit_vlm.experiments.report.study import SPENT, Finding, Gap, Study, findings, gaps, not_compared, tested
from lit_vlm.experiments.report.write import findings_table, log_report, write_report

__all__ = [
    "SPENT",
    "Finding",
    "Gap",
    "Study",
    "findings",
    "findings_table",
    "gaps",
    "log_report",
    "not_compared",
    "tested",
    "write_report",
]
