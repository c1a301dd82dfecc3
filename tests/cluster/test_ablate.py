"""`lit-vlm ablate --on slurm` on a real SLURM: jobs that share the stages, one of which is taken away."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import yaml

from lit_vlm.cluster.queue import Submitted
from lit_vlm.experiments.plan import Plan
from tests.cluster.slurm import Slurm, until

FILE = {
    "recipe": "llava15",
    "scale": "tiny",
    "strategy": "single",
    "stages": ["1_align"],
    "seeds": 2,
    "base": {"trainer.max_steps": 150, "trainer.precision": "32-true", "trainer.limit_val_batches": 0},
    "variants": {"linear": {"model.projector": "Linear"}},
}


def test_jobs_share_the_stages_and_one_that_is_taken_away_goes_on(slurm: Slurm, tmp_path: Path) -> None:
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(FILE | {"base": FILE["base"] | {"trainer.max_epochs": -1}}))  # type: ignore[operator]
    words = ["ablate", "two.yaml", "--on", "slurm", "--jobs", "2", "--gpus", "0", "--time", "10"]
    environment = slurm.environment | {"XDG_CONFIG_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "lit_vlm", *words]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "runs" / "two"
    submitted = Submitted.load(folder)
    assert submitted is not None

    def report() -> str:
        return "\n".join(file.read_text()[-3000:] for file in folder.glob("logs/*.out"))

    until(lambda: len(list(folder.glob("stages/*/progress.json"))) >= 2, 240, "no stage trains", report)
    slurm.run("scancel", "--signal=USR1", f"{submitted.job}_0")
    until(lambda: (folder / "report.html").is_file(), 400, "there is no report", report)
    plan = Plan.load(folder)
    assert len(plan.nodes) == 4
    assert all((folder / "stages" / node / "done.json").is_file() for node in plan.nodes)
    assert "left, as SIGUSR1 asked it to" in report()
    assert "started again 1 times" in report()
