"""The package of docs/extending.md in a folder of its own: its contract tests, its recipe on one process and on two."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lit_vlm.checkpoints.weights import read_state
from tests.runs import environment
from tests.tiny import ROOT

PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^`(\S+)`:\n\n```\w+\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but the package."""
    folder = tmp_path_factory.mktemp("lab")
    for name, content in BLOCK.findall(PAGE):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content, encoding="utf-8")
    (folder / "my_lab" / "__init__.py").touch()
    return folder


def run(lab: Path, *words: str) -> str:
    found = environment(lab) | {"PYTHONPATH": f"{ROOT}:{lab}"}
    done = subprocess.run([sys.executable, "-m", *words], cwd=lab, env=found, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout


def test_every_block_of_code_is_a_file_of_the_package() -> None:
    assert PAGE.count("\n```python") + PAGE.count("\n```yaml") == len(BLOCK.findall(PAGE))


def test_its_own_contract_tests_pass(lab: Path) -> None:
    assert "4 passed" in run(lab, "pytest", "-q", "-p", "no:cacheprovider", "my_lab/test_my_lab.py")


@pytest.mark.slow
def test_its_recipe_gives_the_same_weights_on_one_process_and_sharded_on_two(lab: Path) -> None:
    flags = ["--scale", "tiny", "--trainer.precision", "32-true", "--trainer.accelerator", "cpu"]
    recipe = ["lit_vlm", "run", "./my_lab/recipe", *flags]
    assert "ready" in run(lab, *recipe, "--dry-run")
    run(lab, *recipe, "--out", "one")
    run(lab, *recipe, "--out", "two", "--strategy", "fsdp", "--trainer.devices", "2", "--data.batch_size", "4")
    for stage in ("1_align", "2_tune"):
        one, two = (read_state(lab / out / stage) for out in ("one", "two"))
        assert one.keys() == two.keys()
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, atol=2e-5, rtol=1e-3, msg=f"{stage} {name}")
