from __future__ import annotations

import resource
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import lit_vlm
from lit_vlm.cluster import nodes


def test_facts_hold_versions_and_every_source_of_the_kit() -> None:
    found = nodes.facts(0)
    assert found.versions["lit-vlm"] == lit_vlm.__version__
    assert found.versions["torch"] in torch.__version__
    assert {"lit_vlm/cluster/nodes.py", "callbacks/__init__.py", "recipes/llava15/recipe.yaml"} <= found.sources.keys()
    assert found.cpus
    assert found.interfaces


def test_a_glimpse_tells_apart_what_differs_in_size_names_or_ends(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    content = bytearray(300_000)
    first.write_bytes(content)
    second.write_bytes(content)
    assert nodes.glimpse(first) == nodes.glimpse(second)
    assert nodes.glimpse(first).startswith("a file of 300,000 bytes (")
    for place in (0, 299_999):
        changed = content.copy()
        changed[place] = 1
        second.write_bytes(changed)
        assert nodes.glimpse(first) != nodes.glimpse(second)
    before = nodes.glimpse(tmp_path)
    assert before.startswith("a folder of 2 entries (")
    second.rename(tmp_path / "third")
    assert nodes.glimpse(tmp_path) != before
    assert nodes.glimpse(tmp_path / "absent") == "nothing"


@pytest.fixture
def small_files() -> Iterator[None]:
    """A limit on the size of files, which a write meets as it meets a quota."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_folder_is_tried_and_left_empty(tmp_path: Path) -> None:
    found = nodes.folder(tmp_path)
    assert found.problem is None
    assert found.free > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("small_files")
def test_a_folder_that_takes_no_more_is_told_and_left_empty(tmp_path: Path) -> None:
    assert nodes.folder(tmp_path).problem == "File too large"
    assert list(tmp_path.iterdir()) == []


def test_a_machine_whose_cache_cannot_be_made_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LIT_VLM_CACHE", str(tmp_path / "file" / "cache"))
    found = nodes.machine([], tmp_path)
    assert found.folders["cache"].problem == "Not a directory"
    assert found.folders["--out"].problem is None


def test_the_nearest_folder_is_tried_for_one_that_will_be_made(tmp_path: Path) -> None:
    assert nodes.existing(tmp_path / "runs" / "first") == tmp_path


def test_a_file_is_seen_as_soon_as_another_writes_it(tmp_path: Path) -> None:
    assert nodes.seen_after(tmp_path / "token", 0.1) is None
    writer = threading.Timer(0.2, (tmp_path / "token").touch)
    start = time.monotonic()
    writer.start()
    seconds = nodes.seen_after(tmp_path / "token", 60)
    writer.join()
    assert seconds is not None
    assert seconds <= time.monotonic() - start


def test_matrix_products_have_a_rate() -> None:
    assert nodes.matmul_rate(torch.device("cpu")) > 1e6
