"""Classes of other packages, by path and by name."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from lit_vlm.core.plugins import GROUP, VARIABLE, find_class, load_plugins, named_plugins, use_plugins
from lit_vlm.evaluation.tasks import TASKS, Task, find_task

LAB = """
from lit_vlm.evaluation.tasks import Task


class Counting(Task):
    name = "counting"
    about = "how many there are"
    files = "none"

    def read(self, split):
        return []

    def score(self, outcomes):
        return {"accuracy": 0.0}


class Unfinished(Task):
    name = "unfinished"


NOT_A_CLASS = 3
"""


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module that lies in the working folder."""
    name = f"lab_{abs(hash(tmp_path)) % 10**8}"
    (tmp_path / f"{name}.py").write_text(LAB.replace("counting", f"counting_{name}"))
    (tmp_path / f"{name}_broken.py").write_text("import no_such_library\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv(VARIABLE, "")
    return name


def test_a_class_goes_by_its_path(lab: str) -> None:
    assert find_task(f"{lab}.Counting") is sys.modules[lab].Counting


def test_a_class_goes_by_its_name_once_its_plugin_is_named(lab: str) -> None:
    with pytest.raises(ValueError, match=f"--task: there is no 'counting_{lab}'"):
        find_task(f"counting_{lab}")
    use_plugins([lab, " "])
    assert named_plugins() == os.environ[VARIABLE].split(",") == [lab]
    load_plugins()
    assert find_task(f"counting_{lab}") is sys.modules[lab].Counting


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("vqa2", r"--task: there is no 'vqa2' \(did you mean 'vqav2"),
        ("no_lab.tasks.Counting", "--task no_lab.tasks.Counting: there is no module 'no_lab'"),
        ("LAB.Countin", r"has no 'Countin' \(did you mean 'Counting"),
        ("LAB.Unfinished", "the class lacks read, score"),
        ("LAB.NOT_A_CLASS", "this is no subclass of lit_vlm.evaluation.tasks.base.Task"),
        ("LAB_broken.Counting", "importing LAB_broken fails: No module named 'no_such_library'"),
    ],
)
def test_what_leads_nowhere_is_said_with_the_way_out(lab: str, path: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("LAB", lab)):
        find_class(path.replace("LAB", lab), Task, TASKS, "--task")


def test_a_plugin_that_cannot_be_imported_is_named(lab: str) -> None:
    use_plugins([f"{lab}_broken"])
    with pytest.raises(ValueError, match=f"the plugin '{lab}_broken' cannot be imported.*no_such_library.*--plugins"):
        load_plugins()


def test_an_installed_package_names_its_plugin_by_an_entry_point(lab: str, tmp_path: Path) -> None:
    info = tmp_path / f"{lab}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {lab}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\nlab = {lab}\n")
    load_plugins()
    assert find_task(f"counting_{lab}").__module__ == lab
    (info / "entry_points.txt").write_text(f"[{GROUP}]\nlab = {lab}_broken\n")
    with pytest.raises(
        ValueError, match=f"the plugin '{lab}_broken' of the installed package {lab} cannot be imported"
    ):
        load_plugins()
