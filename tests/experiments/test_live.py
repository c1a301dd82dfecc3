"""What is said of an ablation while it runs: plan, times, table."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from lit_vlm.checkpoints.folder import mark_done
from lit_vlm.checkpoints.progress import Progress
from lit_vlm.checkpoints.progress import State as Doing
from lit_vlm.experiments.live import cost_line, known_seconds, live_table, plan_table, print_states
from lit_vlm.experiments.plan import Plan, RunKey, Wanted, make_plan
from lit_vlm.experiments.pool import State, Task


@pytest.fixture
def plan() -> Plan:
    """Two variants at two seeds, which share the alignment."""
    runs = [RunKey(variant, seed) for seed in (0, 1) for variant in ("base", "other")]
    return make_plan(
        Wanted(run, stage, start, {"seed": run.seed, "own": run.variant if start else ""}, {})
        for run in runs
        for stage, start in (("align", None), ("tune", "align"))
    )


def folders(plan: Plan, root: Path) -> dict[str, Path]:
    for node in plan.nodes:
        (root / node).mkdir(exist_ok=True)
    return {node: root / node for node in plan.nodes}


def progress(folder: Path, step: int, seconds: int, state: Doing = "training") -> None:
    time = f"2026-01-01T00:{seconds // 60:02}:{seconds % 60:02}+00:00"
    Progress(step, 100, 0, None, time, "2026-01-01T00:00:00+00:00", "host", 1, None, state).write(folder)


def printed(shown: object) -> list[list[str]]:
    console = Console(width=120, file=io.StringIO())
    console.print(shown)
    return [line.split() for line in written(console).splitlines() if line.strip()]


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_plan_says_what_trains(plan: Plan) -> None:
    assert printed(plan_table(plan))[2:] == [["align", "4", "2", "2"], ["tune", "4", "4", "0"]]


def test_times_are_those_of_stages_that_have_trained(plan: Plan, tmp_path: Path) -> None:
    where = folders(plan, tmp_path)
    assert cost_line(plan, known_seconds(plan, where)) == "times are known once a run has trained align, tune"
    first, *_, last = plan.nodes
    progress(where[first], 100, 60, "finished")
    mark_done(where[first], 100)
    progress(where[last], 50, 30)
    assert known_seconds(plan, where) == {"align": 60}
    for name, seconds in (("tune", 100), ("align", 999)):
        (tmp_path / "run" / name).mkdir(parents=True)
        progress(tmp_path / "run" / name, 100, seconds, "finished")
        mark_done(tmp_path / "run" / name, 100)
    known = known_seconds(plan, where, (tmp_path / "run").iterdir())
    assert known == {"align": 60, "tune": 100}
    assert cost_line(plan, known) == "8 min 40 s of training, 2 min saved by sharing stages"


def tasks(plan: Plan, root: Path) -> list[Task]:
    return [Task(node, list, root / "log", lambda: False) for node in plan.nodes]


def test_the_table_shows_what_runs_and_what_failed_first(plan: Plan, tmp_path: Path) -> None:
    where, all_of_them = folders(plan, tmp_path), tasks(plan, tmp_path)
    names = list(plan.nodes)
    states = dict.fromkeys(names, State.WAITING) | {names[0]: State.DONE, names[1]: State.RUNNING}
    states[names[2]] = State.FAILED
    progress(where[names[0]], 100, 60, "finished")
    mark_done(where[names[0]], 100)
    progress(where[names[1]], 25, 10)
    head, _, _, running, failed, *waiting = printed(live_table(plan, all_of_them, states, where, 1))
    assert " ".join(head) == "1 of 6 done (3 waiting, 1 running, 1 done, 1 failed)"  # nothing is known of a tuning yet
    assert running == ["tune", "base", "seed", "0", "running", "25/100", "30", "s"]
    assert failed == ["tune", "other", "seed", "0", "failed"]
    assert [row[0] for row in waiting] == ["align", "tune", "tune"]
    assert waiting[0][1:5] == ["base,", "other", "seed", "1"]
    progress(where[names[2]], 100, 40, "finished")
    mark_done(where[names[2]], 100)
    (head, *_) = printed(live_table(plan, all_of_them, states, where, 2))
    assert " ".join(head).endswith("; about 1 min 25 s to go")  # (30 + 60 + 40 + 40) / 2


def test_without_a_terminal_changes_are_lines(plan: Plan, tmp_path: Path) -> None:
    console = Console(file=io.StringIO())
    all_of_them, before = tasks(plan, tmp_path), dict[str, State]()
    names = list(plan.nodes)
    states = dict.fromkeys(names, State.WAITING) | {names[0]: State.DONE}
    print_states(console, all_of_them, states, before)
    states[names[1]] = State.RUNNING
    print_states(console, all_of_them, states, before)
    print_states(console, all_of_them, states, before)
    assert written(console).splitlines() == ["1 of 6 done already", f"{names[1]}: running"]


def test_a_stage_that_was_resumed_took_the_time_of_all_its_processes(plan: Plan, tmp_path: Path) -> None:
    where = folders(plan, tmp_path)
    first = next(iter(plan.nodes))
    told = Progress(9, 9, 5, None, "2026-01-01T00:10:00+00:00", "2026-01-01T00:00:00+00:00", "h", 1, None, "finished",
                    seconds_before=36_000.0)  # fmt: skip
    told.write(where[first])
    mark_done(where[first], 9)
    assert known_seconds(plan, where) == {"align": 36_600}


def test_what_is_left_counts_devices(plan: Plan, tmp_path: Path) -> None:
    where, all_of_them = folders(plan, tmp_path), tasks(plan, tmp_path)
    large = replace(plan, nodes={name: replace(node, devices=8) for name, node in plan.nodes.items()})
    states = dict.fromkeys(plan.nodes, State.DONE)
    last = list(plan.nodes)[-1]
    states[last] = State.RUNNING
    progress(where[last], 50, 600)
    assert "; about 10 min to go" in " ".join(printed(live_table(large, all_of_them, states, where, 8))[0])
