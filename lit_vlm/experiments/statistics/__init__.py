"""Statistics of ablations: paired differences, verdicts on claims, looks while seeds are added.

Method, assumptions and simulations: `docs/design/ablation_statistics.md`.
"""

from lit_vlm.experiments.statistics.paired import Difference, difference
from lit_vlm.experiments.statistics.sequential import Looks, judge_looks
from lit_vlm.experiments.statistics.verdict import Finding, Judged, Verdict, judge

__all__ = ["Difference", "Finding", "Judged", "Looks", "Verdict", "difference", "judge", "judge_looks"]
