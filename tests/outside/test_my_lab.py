"""The package of docs/extending.md in a folder of its own: its contract tests, its recipe on one process and on two."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from lit_vlm.checkpoints.weights import by_slot, read_state
from tests.runs import environment, lit_vlm
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
    """What a command says in the folder that holds the package, which is found as the working folder."""
    return lit_vlm(lab, *words).stdout


def test_every_block_of_code_is_a_file_of_the_package() -> None:
    assert PAGE.count("\n```python") + PAGE.count("\n```yaml") == len(BLOCK.findall(PAGE))


@pytest.mark.slow
def test_its_own_contract_tests_pass(lab: Path) -> None:
    words = ["pytest", "-q", "-p", "no:cacheprovider", "my_lab/test_my_lab.py"]
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=lab, env=environment(lab) | {"PYTHONPATH": f"{ROOT}:{lab}"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert "4 passed" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.slow
def test_its_classes_go_by_their_paths_and_names_in_every_command(lab: Path) -> None:
    flags = ["--scale", "tiny", "--trainer.precision", "32-true", "--trainer.accelerator", "cpu"]
    recipe = ["run", "./my_lab/recipe", *flags]
    run(lab, *recipe, "--stages", "1_align", "--out", "first")
    run_folder = "first/1_align"
    # A family.
    state = by_slot(read_state(lab / run_folder))
    (lab / "old").mkdir()
    torch.save(
        {f"{s}/{name}": value for s, part in state.items() for name, value in part.items()}, lab / "old/weights.pt"
    )
    start = ["--stages", "2_tune", "--model.stage.start_from"]
    assert "weights of my_lab.families.Mine:old are there" in run(
        lab, *recipe, *start, "my_lab.families.Mine:old", "--dry-run"
    )
    run(lab, *recipe, *start, "mine:old", "--plugins", "my_lab.families", "--out", "second")
    # A command, a task, a form, a template and a projector.
    numbers = [run(lab, verb, run_folder, "--plugins", "my_lab.verbs")
               for verb in ("count-weights", "my_lab.verbs.CountWeights")]  # fmt: skip
    assert int(numbers[0]) == int(numbers[1]) == sum(v.numel() for v in read_state(lab / run_folder).values())
    (lab / "benchmarks" / "counting").mkdir(parents=True)
    entries = [{"id": str(n), "question": f"How many are {n} and 1?", "answer": str(n + 1)} for n in range(3)]
    (lab / "benchmarks" / "counting" / "test.json").write_text(json.dumps(entries))
    scored = run(lab, "evaluate", run_folder, "--task", "my_lab.tasks.Counting", "--workers", "0", "--no-mlflow")
    assert "counting" in scored
    Image.new("RGB", (32, 24), "red").save(lab / "red.png")
    (lab / "pairs.tsv").write_text("red.png\tall red\nred.png\tred again\n")
    made = run(lab, "data", "convert", "pairs.tsv", "set", "--form", "my_lab.forms.TabPairs", "--workers", "1")
    assert "TabPairs converted" in made
    listed = run(lab, "parts", "--plugins", "my_lab.verbs,my_lab.tasks,my_lab.families,my_lab.projectors")
    for name in ("count-weights", "counting", "mine", "RowMeans"):
        assert name in listed


@pytest.mark.slow
def test_its_recipe_gives_the_same_weights_on_one_process_and_sharded_on_two(lab: Path) -> None:
    flags = ["--scale", "tiny", "--trainer.precision", "32-true", "--trainer.accelerator", "cpu"]
    recipe = ["run", "./my_lab/recipe", *flags]
    assert "ready" in run(lab, *recipe, "--dry-run")
    run(lab, *recipe, "--out", "one")
    run(lab, *recipe, "--out", "two", "--strategy", "fsdp", "--trainer.devices", "2", "--data.batch_size", "4")
    for stage in ("1_align", "2_tune"):
        one, two = (read_state(lab / out / stage) for out in ("one", "two"))
        assert one.keys() == two.keys()
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, atol=2e-5, rtol=1e-3, msg=f"{stage} {name}")
