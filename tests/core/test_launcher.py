from __future__ import annotations

import pytest

from lit_vlm.core.launcher import Launch, launch

JOB = {"SLURM_JOB_ID": "12", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURMD_NODENAME": "n1"}
TASK = JOB | {"SLURM_STEP_ID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
AGENT = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "GROUP_RANK": "1", "TORCHELASTIC_RESTART_COUNT": "2"}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, Launch("alone")),
        ({"SLURM_JOB_ID": "12", "SLURM_NTASKS": "4"}, Launch("alone")),
        (JOB, Launch("batch", node="n1", id="12")),
        (JOB | {"SLURM_RESTART_COUNT": "1"}, Launch("batch", node="n1", id="12", attempt=1)),
        (TASK, Launch("srun", 1, 2, 0, "n1", "12.1")),
        (
            TASK | {"SLURM_STEP_TASKS_PER_NODE": "2(x3),1", "SLURM_NODEID": "2"},
            Launch("srun", 1, 2, 0, "n1", "12.1", local_world_size=2),
        ),
        (
            TASK | {"SLURM_STEP_TASKS_PER_NODE": "3,1(x2),4", "SLURM_NODEID": "3"},
            Launch("srun", 1, 2, 0, "n1", "12.1", local_world_size=4),
        ),
        (AGENT | {"LOCAL_WORLD_SIZE": "8"}, Launch("torchrun", 3, 4, 1, "1", None, 2, 8)),
        (AGENT | {"TORCHELASTIC_RUN_ID": "none"}, Launch("torchrun", 3, 4, 1, "1", None, 2)),
        (AGENT | {"TORCHELASTIC_RUN_ID": "mine"}, Launch("torchrun", 3, 4, 1, "1", "mine", 2)),
        (TASK | AGENT | {"RANK": "0", "SLURM_RESTART_COUNT": "1"}, Launch("torchrun", 0, 4, 1, "n1", None, 3)),
    ],
)
def test_a_process_knows_who_started_it(variables: dict[str, str], expected: Launch) -> None:
    found = launch(variables)
    assert found == expected
    assert found.is_first == (expected.rank == 0)
