"""Probing: scores by hand, and the command from a run to its curves."""

from __future__ import annotations

import json
from pathlib import Path

import mlflow
import pytest
import torch
from PIL import Image as PILImage

from lit_vlm.commands.cli import main
from lit_vlm.evaluation.probe import _overlaps, _right_orders
from tests.runs import one_step


def test_depth_orders_are_counted_over_pairs_of_cells_on_things() -> None:
    targets = torch.tensor([[0.0, 1.0, 1.1, 9.0]])
    things = torch.tensor([[True, True, True, False]])
    found = torch.tensor([[[0.0, 1.0, 0.9, -5.0]], [[2.0, 1.0, 3.0, 0.0]]])
    # Pairs: (0, 1) and (0, 2); 1 and 2 are too close, 3 is background.
    assert _right_orders(found, targets, things).tolist() == [[[2, 2]], [[1, 2]]]


def test_overlaps_are_counted_for_each_class() -> None:
    targets = torch.tensor([[0, 0, 1, 2]])
    found = torch.tensor([[[0, 1, 1, 0]]])
    counted = _overlaps(found, targets)[0].tolist()
    assert counted == [[1, 3], [1, 2], [0, 1], [0, 0], [0, 0]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return one_step(tmp_path_factory.mktemp("probe") / "run", "ola_vlm", "1_pretrain")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:LightningCLI.s args parameter")
@pytest.mark.parametrize("flags", [["depth"], ["gen"], ["seg", "--exact"], ["depth", "--exact"]], ids=" ".join)
def test_from_a_run_to_curves_a_table_and_mlflow(
    run: Path, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    score = "--exact" in flags
    few = ["--steps", "12", "--held-out", "16", "--size", "64", "--cells", "4", "--batch-size", "8"]
    main(["probe", str(run), *few, "--out", str(tmp_path / "out"), "--target", *flags])
    saved = json.loads((tmp_path / "out" / "probe.json").read_text())
    (result,) = saved["results"].values()
    assert len(result["cosine"]) == 4
    assert len(result["score"]) == (4 if score else 0)
    assert all(-1 <= value <= 1 for value in result["cosine"])
    assert (tmp_path / "out" / "probe.png").read_bytes().startswith(b"\x89PNG")
    assert "by decoder layer" in capsys.readouterr().out
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    found = mlflow.MlflowClient().search_runs(["1"])
    assert len(found) == 1
    history = mlflow.MlflowClient().get_metric_history(found[0].info.run_id, "probe/cosine")
    assert [metric.step for metric in history] == [1, 2, 3, 4]


def test_files_that_are_no_pictures_are_passed_over(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "pictures").mkdir()
    for number in range(8):
        (tmp_path / "pictures" / f"a{number}.png").write_bytes(b"no picture")
    for number in range(24):
        PILImage.new("RGB", (40, 40), (10 * number, 90, 200)).save(tmp_path / "pictures" / f"b{number}.png")
    flags = ["--steps", "2", "--batch-size", "4", "--target", "gen", "--images", str(tmp_path / "pictures")]
    main(["probe", str(run), *flags, "--no-mlflow", "--out", str(tmp_path / "out")])
    assert "by decoder layer" in capsys.readouterr().out


def test_what_cannot_be_probed_says_so(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for flags, message in (
        (["--target", "pose"], "--target pose: none of these runs has a head of that name"),
        (["--target", "depth", "--steps", "0"], "must be at least 1"),
    ):
        with pytest.raises(SystemExit):
            main(["probe", str(run), *flags, "--out", str(tmp_path)])
        assert message in capsys.readouterr().err
