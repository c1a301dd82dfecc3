"""`lit-vlm doctor --nodes` on nodes that are slowed, have another version, or from which nobody comes."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import lit_vlm
from tests.cluster.slurm import Slurm
from tests.forkserver import ROOT

PYTHON = sys.executable


def check(slurm: Slurm, folder: Path, flags: str, ill: dict[str, str], *srun: str) -> str:
    """What `doctor --nodes` prints under srun, where nodes of `ill` run another program than `lit-vlm`."""
    cases = "".join(f"{node}) exec {program.format(flags=flags)};; " for node, program in ill.items())
    script = f"case $SLURMD_NODENAME in {cases}*) exec {PYTHON} -m lit_vlm doctor --nodes {flags};; esac"
    variables = {"LIT_VLM_CACHE": str(folder / "cache")}
    said = slurm.run("srun", "--ntasks-per-node=1", *srun, "bash", "-c", script, variables=variables, check=False)
    return re.sub(r" +", " ", said)


def test_a_slowed_node_and_one_with_another_version_are_named(slurm: Slurm, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "lit_vlm", tmp_path / "lit_vlm", ignore=shutil.ignore_patterns("__pycache__"))
    start = tmp_path / "lit_vlm" / "__init__.py"
    start.write_text(start.read_text().replace(f'"{lit_vlm.__version__}"', '"0.0.9"'))
    ill = {
        "n2": f"{PYTHON} -m tests.machines.slowed 0.1 doctor --nodes {{flags}}",
        "n3": f"env PYTHONPATH={tmp_path}:{ROOT} {PYTHON} -m lit_vlm doctor --nodes {{flags}}",
    }
    said = check(slurm, tmp_path, f"--size 4MiB --out {tmp_path}/runs --data {ROOT}/README.md", ill, "-N4")
    assert "4 processes, started by srun" in said
    assert f"error versions lit-vlm: 0.0.9 on n3 (rank 2), {lit_vlm.__version__} on the 3 others" in said
    assert "error versions the code of n3 (rank 2) differs from the others' in lit_vlm/__init__.py" in said
    slow = [line for line in said.splitlines() if " matrix products " in line]
    assert "of n2 (rank 1) multiplies matrices" in slow[0], said  # the slowest comes first
    assert slow[0].startswith(("error", "warning"))
    assert "well --out all nodes see what rank 0 wrote" in said
    assert "well all-gather 4 MiB among 4 processes" in said
    assert "do not start the job" in said
    assert "task 0: Exited with exit code 1" in said  # and no other


def test_a_node_from_which_nobody_comes_is_named(slurm: Slurm, tmp_path: Path) -> None:
    said = check(slurm, tmp_path, "--timeout 5", {"n2": "sleep 600"}, "-N2", "-K1", "-w", "n1,n2")
    assert (
        "error processes rank 1 of 2 processes did not come within 5 s; nobody came from n2; there are n1 (rank 0)"
    ) in said
    assert "do not start the job: 1 error" in said
