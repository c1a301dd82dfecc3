"""Curations on Ray: the same bytes as here, with a model and without."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from lit_vlm.data.curation import STEPS, curate, read_curation
from lit_vlm.data.sets.on_ray import on_ray
from tests.data.curation.dual import save_clip
from tests.data.curation.planted import encoded
from tests.data.curation.test_recipes import write_tar
from tests.forkserver import FIXED

FILE = """
sources:
  pairs: {{path: {folder}/pairs, form: WebDataset}}
steps:
  - {{class_path: Size, init_args: {{min_side: 8}}}}
  - {{class_path: ExactDuplicates}}
{more}
seed: 1
"""


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    for name, value in FIXED.items():
        monkeypatch.setenv(name, value)
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    monkeypatch.setenv("RAY_ADDRESS", nodes.address)
    yield
    nodes.shutdown()


def tree(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.slow
def test_a_curation_is_the_same_as_one_made_here(cluster: None, tmp_path: Path) -> None:
    pictures = [encoded(seed=number % 60) for number in range(80)]
    write_tar(tmp_path / "pairs", pictures)
    encoder = save_clip(tmp_path / "clip")
    similar = f"  - {{class_path: Similarity, init_args: {{encoder: {encoder}, top: 20}}}}"
    for name, more in (("plain", ""), ("similar", similar)):
        file = tmp_path / f"{name}.yaml"
        file.write_text(FILE.format(folder=tmp_path, more=more))
        report = curate(read_curation(file, STEPS), tmp_path / f"{name}-own", tmp_path / f"{name}-own.m")
        with on_ray(2) as engine:
            curate(read_curation(file, STEPS), tmp_path / f"{name}-ray", tmp_path / f"{name}-ray.m", engine)
        assert report["kept"] == (20 if more else 60)
        assert tree(tmp_path / f"{name}-ray") == tree(tmp_path / f"{name}-own")
        assert tree(tmp_path / f"{name}-ray.m") == tree(tmp_path / f"{name}-own.m")
