"""`python -m tests.benchmarks [step|loss|data|eve|exports|hovle|ola|plan|saves|videos|watched]`: print every ratio."""

from __future__ import annotations

import sys

from tests.benchmarks import data, eve, exports, hovle, loss, ola, plan, saves, step, videos, watched

ALL = {
    "step": step.main,
    "loss": loss.main,
    "data": data.main,
    "eve": eve.main,
    "exports": exports.main,
    "hovle": hovle.main,
    "ola": ola.main,
    "plan": plan.main,
    "saves": saves.main,
    "videos": videos.main,
    "watched": watched.main,
}

if __name__ == "__main__":
    names = sys.argv[1:] or list(ALL)
    for name in names:
        ALL[name]()
