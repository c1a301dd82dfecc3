"""What earlier versions left goes on working: module paths, class paths in config files, and a whole run.

`fixtures/run_93c4961` is a run of `llava15 --scale tiny` that commit 93c4961 began and that was killed in its second
stage, at step 2 of 6.
"""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lit_vlm._moved import MOVED, new_name, old_name
from lit_vlm.checkpoints import find_checkpoint, read_state
from tests.runs import environment, lit_vlm
from tests.tiny import ROOT

OLD = ROOT / "tests" / "fixtures" / "run_93c4961"
CLASSES = {
    "lit_vlm.data": ["Scenes", "Shapes", "OpenMoji", "LlavaJson", "Packed", "Shuffled", "SquareCrop", "VicunaV1"],
    "lit_vlm.tracking": ["MLflow"],
    "lit_vlm.sharding": ["FSDP2"],
    "lit_vlm.tasks": ["VQAv2", "SceneQuestions"],
    "lit_vlm.data.templates": ["ChatML"],
    "lit_vlm.data.scenes": ["Scenes"],
}
"""Some that config files of that time name."""


@pytest.mark.parametrize("name", sorted(set(MOVED) - {"lmms_eval"}))
def test_an_earlier_path_gives_the_module_of_now(name: str) -> None:
    now = new_name(f"lit_vlm.{name}")
    assert now is not None
    module = importlib.import_module(f"lit_vlm.{name}")
    assert module is importlib.import_module(now)
    assert module.__name__ == now
    assert module.__spec__ is not None
    assert module.__spec__.name == now


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in CLASSES.items() for name in names])
def test_an_earlier_class_path_gives_the_class(module: str, name: str) -> None:
    found = getattr(importlib.import_module(module), name)
    assert found is getattr(importlib.import_module(found.__module__), name)


def test_identities_on_disk_keep_the_earlier_path() -> None:
    assert old_name("lit_vlm.data.sample.transforms") == "lit_vlm.data.transforms"
    assert old_name("lit_vlm.worlds.scenes.source") == "lit_vlm.data.scenes.source"
    assert old_name("lit_vlm.data.sources.base") == "lit_vlm.data.sources.base"
    assert old_name("my_lab.sources") == "my_lab.sources"


@pytest.mark.parametrize("module", ["lit_vlm.cli", "lit_vlm"])
def test_python_m_works_with_both_paths(module: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.startswith("lit-vlm "), done.stderr


@pytest.mark.slow
def test_an_earlier_run_is_resumed_compared_asked_and_scored(tmp_path: Path) -> None:
    shutil.copytree(OLD, tmp_path / "run")
    left = lit_vlm(tmp_path, "run", "--resume", "--out", "run", fresh=True)
    assert "Restored all states from the checkpoint at run/2_sft/checkpoints/step=00000002.ckpt" in left.stderr
    assert json.loads((tmp_path / "run" / "run.json").read_text())["done"] == ["1_align", "2_sft"]
    assert find_checkpoint(tmp_path / "run" / "2_sft").name == "step=00000006.ckpt"
    begun, ended = (read_state(folder / "2_sft") for folder in (OLD, tmp_path / "run"))
    moved = [name for name in begun if not torch.equal(begun[name], ended[name])]
    assert moved
    assert not any(name.startswith("encoder.") for name in moved)
    assert "2_sft" in lit_vlm(tmp_path, "compare", "run").stdout
    picture = tmp_path / "grey.png"
    from PIL import Image

    Image.new("RGB", (40, 30), "grey").save(picture)
    assert lit_vlm(tmp_path, "chat", "run/2_sft", "--image", str(picture), "--prompt", "What is it?").stdout.strip()
    words = ["--task", "scenes", "--limit", "4", "--workers", "0", "--no-mlflow"]
    assert "accuracy" in lit_vlm(tmp_path, "evaluate", "run/2_sft", *words).stdout


@pytest.mark.slow
@pytest.mark.parametrize("start", [["-m", "lit_vlm"], ["-c", "from lit_vlm.commands.cli import main; main()"]])
def test_folders_of_the_kit_s_names_do_not_shadow_it(start: list[str], tmp_path: Path) -> None:
    for name in ("callbacks", "recipes", "lightning", "rich"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('shadowed')\n")
    (tmp_path / "my_lab.py").write_text("from lit_vlm.projectors import Linear\n\n\nclass Mine(Linear):\n    pass\n")
    words = [
        "run",
        "llava15",
        "--scale",
        "tiny",
        "--stages",
        "1_align",
        "--dry-run",
        "--model.projector",
        "my_lab.Mine",
    ]
    done = subprocess.run(
        [sys.executable, *start, *words], cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
