"""Which stages are the same: the hash of a stage, and the plan of an ablation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import lit_vlm
from lit_vlm.experiments.plan import Plan, RunKey, Wanted, identity, make_plan

SETTINGS: dict[str, Any] = {
    "seed_everything": 0,
    "model": {"projector": "MLP", "stage": {"lr": 1.0, "start_from": "a"}},
    "trainer": {"max_steps": 3, "logger": "x", "default_root_dir": "a"},
    "watchdog": {"hang_after": 1},
}
DATA = {"train/shapes": "abc", "val/shapes": "def"}


def changed(path: str, value: object) -> dict[str, Any]:
    """The settings with another value at a dotted path."""
    first, _, rest = path.partition(".")
    inner = SETTINGS[first]
    for part in (parts := rest.split("."))[:-1] if rest else ():
        inner = inner[part]
    if not rest:
        return SETTINGS | {first: value}
    if len(parts) == 1:
        return SETTINGS | {first: {**SETTINGS[first], rest: value}}
    return SETTINGS | {first: {**SETTINGS[first], parts[0]: {**SETTINGS[first][parts[0]], parts[1]: value}}}


@pytest.mark.parametrize(
    ("path", "value", "counts"),
    [
        ("seed_everything", 1, True),
        ("model.projector", "Linear", True),
        ("model.stage.lr", 2.0, True),
        ("trainer.max_steps", 4, True),
        ("trainer.logger", "y", False),
        ("trainer.default_root_dir", "b", False),
        ("trainer.accelerator", "cpu", False),
        ("watchdog", None, False),
        ("model.stage.start_from", "b", False),  # what it starts from is known by its own identity
    ],
)
def test_a_setting_counts_if_the_outcome_depends_on_it(path: str, value: object, counts: bool) -> None:
    same = identity(changed(path, value), DATA, "before") == identity(SETTINGS, DATA, "before")
    assert same is not counts


def test_data_version_and_what_came_before_count(monkeypatch: pytest.MonkeyPatch) -> None:
    own = identity(SETTINGS, DATA, "before")
    assert own == identity(dict(reversed(SETTINGS.items())), dict(reversed(DATA.items())), "before")
    others = [identity(SETTINGS, DATA | {"train/shapes": "x"}, "before"), identity(SETTINGS, DATA, "other")]
    others += [identity(SETTINGS, DATA, None), identity(changed("model.stage.start_from", "b"), DATA, None)]
    monkeypatch.setattr(lit_vlm, "__version__", "9")
    others.append(identity(SETTINGS, DATA, "before"))
    assert len({own, *others}) == 6


def wanted(run: RunKey, stage: str, start: str | None, settings: Mapping[str, Any]) -> Wanted:
    return Wanted(run, stage, start, {"seed_everything": run.seed, **settings}, DATA)


def test_equal_stages_are_trained_once(tmp_path: Path) -> None:
    runs = [RunKey(variant, seed) for seed in (0, 1) for variant in ("base", "tuned", "other")]
    stages = []
    for run in runs:
        stages.append(wanted(run, "align", None, {"x": run.variant == "other"}))
        stages.append(wanted(run, "tune", "align", {"lr": run.variant == "tuned"}))
    plan = make_plan(stages)
    assert plan.wanted == 12
    assert [(node.stage, node.runs) for node in plan.nodes.values()] == [
        *[("align", (runs[0], runs[1])), ("tune", (runs[0],)), ("tune", (runs[1],))],
        *[("align", (runs[2],)), ("tune", (runs[2],))],  # the same settings after another stage are another stage
        *[("align", (runs[3], runs[4])), ("tune", (runs[3],)), ("tune", (runs[4],))],
        *[("align", (runs[5],)), ("tune", (runs[5],))],
    ]
    assert plan.nodes[plan.runs[runs[1]]["tune"]].start == plan.runs[runs[0]]["align"]
    assert plan.last(runs[2]).id == plan.runs[runs[2]]["tune"]
    plan.save(tmp_path)
    assert Plan.load(tmp_path) == plan
    with pytest.raises(ValueError, match=r"has no plan\.json, so it is not the folder of an ablation"):
        Plan.load(tmp_path / "other")
