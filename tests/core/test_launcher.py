from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest

from lit_vlm.core.launcher import PORTS, Launch, end_of_job, launch, launch_name, rendezvous, tasks_of_job

JOB = {"SLURM_JOB_ID": "12", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURMD_NODENAME": "n1"}
TASK = JOB | {"SLURM_STEP_ID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
TWO_NODES = {"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_NODEID": "1"}
UNEVEN = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "3,1"}
AGENT = {
    **{"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
    **{"GROUP_RANK": "1", "GROUP_WORLD_SIZE": "2", "TORCHELASTIC_RESTART_COUNT": "2"},
}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, Launch("alone")),
        ({"SLURM_JOB_ID": "12", "SLURM_NTASKS": "4"}, Launch("alone")),
        (JOB, Launch("batch", node="n1", id="12")),
        (JOB | {"SLURM_RESTART_COUNT": "1"}, Launch("batch", node="n1", id="12", attempt=1)),
        (TASK, Launch("srun", 1, 2, 0, "n1", "12.1", nodes=1, per_node=2)),
        (TASK | TWO_NODES, Launch("srun", 1, 2, 0, "n1", "12.1", nodes=2, per_node=1, node_rank=1)),
        (TASK | TWO_NODES | UNEVEN, Launch("srun", 1, 4, 0, "n1", "12.1", nodes=2, per_node=0, node_rank=1)),
        (AGENT | {"TORCHELASTIC_RUN_ID": "none"}, Launch("torchrun", 3, 4, 1, "1", None, 2, 2, 2, 1)),
        (AGENT | {"TORCHELASTIC_RUN_ID": "mine"}, Launch("torchrun", 3, 4, 1, "1", "mine", 2, 2, 2, 1)),
        (AGENT | {"WORLD_SIZE": "3"}, Launch("torchrun", 3, 3, 1, "1", None, 2, 2, 0, 1)),
        (TASK | AGENT | {"RANK": "0", "SLURM_RESTART_COUNT": "1"}, Launch("torchrun", 0, 4, 1, "n1", None, 3, 2, 2, 1)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, Launch("torchrun", 1, 2, 0, "1", nodes=2, per_node=1, node_rank=1)),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, Launch("torchrun", 1, 2, 1, "0", nodes=1, per_node=2)),
    ],
)
def test_a_process_knows_who_started_it(variables: dict[str, str], expected: Launch) -> None:
    found = launch(variables)
    assert found == expected
    assert found.is_first == (expected.rank == 0)


def test_a_launch_has_one_name_in_all_its_processes() -> None:
    assert launch_name(TASK) == "12.1"
    assert launch_name(AGENT | {"TORCHELASTIC_RUN_ID": "mine"}) == "mine"
    one_machine = AGENT | {"TORCHELASTIC_RUN_ID": "none", "GROUP_WORLD_SIZE": "1"}
    assert launch_name(one_machine) == launch_name(one_machine | {"RANK": "0"})
    with pytest.raises(ValueError, match="give torchrun a --rdzv-id"):
        launch_name(one_machine | {"GROUP_WORLD_SIZE": "2"})


@pytest.mark.parametrize(
    ("names", "first"),
    [
        ("n2", "n2"),
        ("n3,n1", "n3"),
        ("gpu-a[007-009,12],cpu3", "gpu-a007"),
        ("n[5]", "n5"),
        ("rack[1-2]n[3,4]x", "rack1n3x"),
    ],
)
def test_a_step_meets_on_its_own_first_machine(names: str, first: str) -> None:
    assert rendezvous(TASK | {"SLURM_NODELIST": "n[1-4]", "SLURM_STEP_NODELIST": names})[0] == first


def test_steps_do_not_meet_each_other() -> None:
    def port(job: int, step: int, attempt: int = 0) -> int:
        named = {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step), "SLURM_RESTART_COUNT": str(attempt)}
        return rendezvous(TASK | {"SLURM_STEP_NODELIST": "n1"} | named)[1]

    ports = [port(job, step) for job in range(4321, 4329) for step in range(7)]
    ports += [port(4321, 0, attempt) for attempt in range(1, 4)]
    assert len(set(ports)) == len(ports)
    assert all(port in PORTS for port in [*ports, port(987654321, 12)])
    assert port(4321, 1) == port(4321, 1)


def test_what_the_user_sets_is_where_processes_meet() -> None:
    step = TASK | {"SLURM_STEP_NODELIST": "n1"}
    assert rendezvous(step | {"MASTER_PORT": "1234"}) == ("n1", 1234)
    assert rendezvous(step | {"MASTER_ADDR": "head"})[0] == "head"
    assert rendezvous({"MASTER_ADDR": "head", "MASTER_PORT": "1234"}) == ("head", 1234)
    with pytest.raises(ValueError, match="MASTER_ADDR and MASTER_PORT are not set, and no step of SLURM tells"):
        rendezvous(JOB)


def test_a_job_tells_its_tasks() -> None:
    assert tasks_of_job({}) == (1, 1)
    assert tasks_of_job(JOB) == (4, 1)
    assert tasks_of_job({"SLURM_JOB_ID": "12", "SLURM_JOB_NUM_NODES": "2"}) == (2, 2)


def test_the_end_of_a_job_is_told_or_asked_for(tmp_path: Path) -> None:
    squeue = tmp_path / "squeue"
    squeue.write_text('#!/bin/sh\n[ "$3" = 12 ] && echo 2026-11-26T10:00:00 || echo N/A\n')
    squeue.chmod(0o755)
    variables = JOB | {"PATH": f"{tmp_path}:/bin"}
    expected = datetime(2026, 11, 26, 10).timestamp()
    assert end_of_job({}) is None
    assert end_of_job(JOB | {"SLURM_JOB_END_TIME": "77"}) == 77
    assert end_of_job(variables) == expected
    assert end_of_job(variables | {"SLURM_JOB_ID": "13"}) is None  # without a limit
    squeue.unlink()
    assert end_of_job(variables) is None
