"""What docs/clusters.md shows: settings are read, bash takes scripts, the manifest's script does as the page says."""

from __future__ import annotations

import ast
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_vlm.cluster.site import Site, read_site
from tests.tiny import ROOT

PAGE = (ROOT / "docs" / "clusters.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[str]:
    return [text for name, text in BLOCKS if name == language]


def manifest() -> dict[str, Any]:
    (found,) = [text for text in blocks("yaml") if text.startswith("apiVersion")]
    loaded: dict[str, Any] = yaml.safe_load(found)
    return loaded


def test_the_site_file_has_every_key(tmp_path: Path) -> None:
    (found,) = [text for text in blocks("yaml") if not text.startswith("apiVersion")]
    file = tmp_path / "cluster.yaml"
    file.write_text(found)
    site = read_site(file)
    assert list(yaml.safe_load(found)) == list(Site.model_fields)
    assert (site.time, site.mem, site.signal_before) == ("24:00:00", "0", 300)


def test_scripts_and_programs_can_be_read() -> None:
    for text in blocks("bash"):
        assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    for text in blocks("python"):
        ast.parse(text)
    assert (len(blocks("bash")), len(blocks("python"))) == (1, 1)


def test_the_manifest_asks_for_as_many_machines_as_its_command() -> None:
    replicas = manifest()["spec"]["pytorchReplicaSpecs"]
    for kind in ("Master", "Worker"):
        assert replicas[kind]["restartPolicy"] == "ExitCode"
        (container,) = replicas[kind]["template"]["spec"]["containers"]
        machines = sum(one["replicas"] for one in replicas.values())
        gpus = container["resources"]["limits"]["nvidia.com/gpu"]
        (script,) = container["args"]
        assert f"--nnodes {machines} --nproc-per-node {gpus} " in script
        assert f"--trainer.devices {gpus} --trainer.num_nodes {machines} " in script


STATE = """mkdir -p "$RUN/1_align"; echo '{{"state": "{}"}}' >"$RUN/1_align/progress.json"; exit {}"""


@pytest.mark.parametrize(
    ("torchrun", "code"),
    [
        ("exit 0", 0),
        ("exit 1", 1),
        (STATE.format("failed", 1), 1),
        (STATE.format("preempted", 1), 143),
        (STATE.format("finished", 0), 0),
    ],
)
def test_the_manifest_s_script_is_started_anew_only_after_it_saved(tmp_path: Path, torchrun: str, code: int) -> None:
    assert run_script(tmp_path, torchrun).wait(30) == code


def test_a_file_of_an_earlier_attempt_does_not_count(tmp_path: Path) -> None:
    assert run_script(tmp_path, STATE.format("preempted", 1)).wait(30) == 143
    old = tmp_path / "run" / "1_align" / "progress.json"
    os.utime(old, (1, 1))
    assert run_script(tmp_path, "exit 1").wait(30) == 1


def test_an_evicted_pod_asks_the_processes_of_the_run(tmp_path: Path) -> None:
    process = (
        """bash -c 'trap "sleep 0.2; mkdir -p \\"$RUN/s\\"; echo \\"\\\\\\"state\\\\\\": \\\\\\"preempted\\\\\\"\\" """
        """>\\"$RUN/s/progress.json\\"; exit 75" TERM; echo ready; while :; do sleep 0.05; done'; exit 1"""
    )
    started = run_script(tmp_path, process)
    assert started.stdout is not None
    assert started.stdout.readline() == "ready\n"
    started.terminate()
    assert started.wait(30) == 143


def run_script(folder: Path, torchrun: str) -> subprocess.Popen[str]:
    """Start the manifest's script with another program in the place of torchrun."""
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "run").mkdir(exist_ok=True)
    program = folder / "bin" / "torchrun"
    program.write_text(f"#!/bin/bash\n{torchrun}\n")
    program.chmod(0o755)
    (container,) = manifest()["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"]
    variables = {"PATH": f"{folder / 'bin'}:/usr/bin:/bin", "RUN": str(folder / "run"), "RANK": "1"}
    return subprocess.Popen(
        [*container["command"], *container["args"]], env=os.environ | variables, stdout=subprocess.PIPE, text=True
    )
