"""Statistics of ablations: paired differences, verdicts on claims, looks while seeds are added.

Method, assumptions and simulations: `docs/design/ablation_statistics.md`.
"""

from lit_vlm.experiments.statistics.paired import Difference, difference
from lit_vlm.experiments.statistics.sequential import Looks, judge_looks, planned_looks
from lit_vlm.experiments.statistics.verdict import Judged, Tested, Verdict, judge

__all__ = ["Difference", "Judged", "Looks", "Tested", "Verdict", "difference", "judge", "judge_looks", "planned_looks"]
