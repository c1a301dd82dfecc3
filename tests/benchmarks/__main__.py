"""`python -m tests.benchmarks [NAME ...]`: print every ratio, or those of some; the names are in `ALL`."""

from __future__ import annotations

import sys

from tests.benchmarks import (
    converting,
    curation,
    data,
    eve,
    exports,
    hovle,
    loss,
    ola,
    plan,
    saves,
    scale,
    step,
    videos,
    watched,
)

ALL = {
    "step": step.main,
    "loss": loss.main,
    "converting": converting.main,
    "curation": curation.main,
    "data": data.main,
    "eve": eve.main,
    "exports": exports.main,
    "hovle": hovle.main,
    "ola": ola.main,
    "plan": plan.main,
    "saves": saves.main,
    "scale": scale.main,
    "videos": videos.main,
    "watched": watched.main,
}

if __name__ == "__main__":
    names = sys.argv[1:] or list(ALL)
    for name in names:
        ALL[name]()
