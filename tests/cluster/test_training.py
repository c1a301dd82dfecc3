"""Training in steps of a job: on several nodes, beside each other, and in many tasks on one store."""

from __future__ import annotations

from pathlib import Path

import torch
from mlflow import MlflowClient

from lit_vlm.checkpoints.weights import read_state
from lit_vlm.commands.recipe import find_recipe
from tests.cluster.slurm import Slurm
from tests.runs import tiny_fit

FLAGS = "--trainer.accelerator cpu --trainer.precision 32-true --trainer.max_steps 4 --data.batch_size 4"
REPORT = """
import os
from pathlib import Path
from lit_vlm.training.mlflow_run import MLflowRun
task = os.environ["SLURM_ARRAY_TASK_ID"]
run = MLflowRun(os.environ["MLFLOW_TRACKING_URI"], "lit-vlm", "task " + task, {}, Path("task-" + task))
for step in range(5):
    run.metrics({"a": float(step)}, step)
run.end("FINISHED")
"""


def fit(strategy: str) -> str:
    """The command that trains the tiny second stage for four steps."""
    files = find_recipe("llava15").configs("2_sft", "tiny", strategy)
    configs = " ".join(f"--config {file.resolve()}" for file in files)
    return f"python -m lit_vlm fit {configs} {FLAGS}"


def test_two_experiments_in_one_allocation_train_as_two_processes_do(slurm: Slurm, tmp_path: Path) -> None:
    """Both on the same two nodes at the same time, with no word of nodes, devices, ports or folders."""
    script = "\n".join(
        f"srun --nodes=2 --ntasks=2 --exact {fit(strategy)} >{strategy}.txt 2>&1 &" for strategy in ("ddp", "fsdp")
    )
    job = slurm.submit(tmp_path, f"{script}\nwait -n && wait -n", "--nodes=2", "--ntasks-per-node=2")
    state = slurm.wait(job, seconds=480)
    said = {strategy: (tmp_path / f"{strategy}.txt").read_text() for strategy in ("ddp", "fsdp")}
    assert state == "COMPLETED", "\n".join(text[-4000:] for text in said.values())
    assert slurm.processes(job) == []

    folders = sorted((tmp_path / "runs").iterdir())
    assert [folder.name for folder in folders] == [f"sft-{job}.0", f"sft-{job}.1"]
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("lit-vlm").experiment_id])
    assert {run.data.tags["strategy"] for run in runs} == {"ddp", "fsdp"}
    assert [run.info.status for run in runs] == ["FINISHED"] * 2

    ddp = next(folder for folder in folders if "strategy: ddp" in (folder / "config.yaml").read_text())
    trained = {"ddp": ddp, "fsdp": next(folder for folder in folders if folder != ddp)}
    for strategy, folder in trained.items():
        expected = tiny_fit(tmp_path, f"alone-{strategy}", "2_sft", "--data.batch_size", "4", "--trainer.devices", "2",
                            strategy=strategy)  # fmt: skip
        found = read_state(folder)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value), f"{strategy}: {name}"


def test_eight_tasks_of_an_array_on_a_fresh_store_all_report(slurm: Slurm, tmp_path: Path) -> None:
    (tmp_path / "report.py").write_text(REPORT)
    own = 'export LIT_VLM_CACHE=$PWD/cache-$SLURMD_NODENAME TMPDIR=/tmp\nexport PYTHONPATH="$PWD:$PYTHONPATH"'
    job = slurm.submit(tmp_path, f"{own}\nsrun python -m report", "--array=0-7", "--ntasks=1")
    assert slurm.wait(job, seconds=300) == "COMPLETED"
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("lit-vlm").experiment_id])
    assert {run.info.run_name for run in runs} == {f"task {number}" for number in range(8)}
    assert [(run.info.status, run.data.metrics) for run in runs] == [("FINISHED", {"a": 4.0})] * 8


def test_what_was_launched_otherwise_is_refused_at_once(slurm: Slurm, tmp_path: Path) -> None:
    script = f"srun --nodes=1 --ntasks=2 --exact {fit('ddp')} --trainer.devices 1 &\n{fit('ddp')} &\nwait -n; wait -n"
    job = slurm.submit(tmp_path, script, "--nodes=2", "--ntasks-per-node=2")
    assert slurm.wait(job, seconds=240) == "FAILED"
    said = slurm.output(job)
    assert said.count("error: srun started 2 processes on 1 node (2 on each), but trainer.num_nodes is auto and") == 2
    assert said.count("error: this job has 4 tasks on 2 nodes, but the command was started without srun, as one") == 1
    assert "Traceback" not in said
    assert not (tmp_path / "runs").exists()
