"""`lit-vlm plan`, end to end and refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from lit_vlm.checkpoints.folder import PLAN_FILE
from lit_vlm.commands import foretell as told
from lit_vlm.commands.fit import Checked
from lit_vlm.commands.plan import main
from lit_vlm.commands.runs import RunState
from tests.planning.simulated import needs_simulation


@pytest.mark.slow
@needs_simulation
def test_a_stage_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    main(["llava15", "--stages", "1_align", "--device", "a100-40", "--devices", "8", "--price", "2", "--json"])
    (plan,) = json.loads(capsys.readouterr().out)
    assert plan["stage"] == "1_align"
    assert plan["fits"]
    assert plan["memory_gib"]["weights"] == pytest.approx(1.65, abs=0.05)  # 7 B in bf16, an eighth
    assert plan["steps"] == 2181  # 558,128 records, 256 a step
    assert plan["cost"] == pytest.approx(2 * plan["device_hours"])
    assert not plan["own_data"]


@pytest.mark.slow
@needs_simulation
def test_what_does_not_fit_fits_with_a_change(capsys: pytest.CaptureFixture[str]) -> None:
    main(["llava15", "--stages", "2_sft", "--device", "24"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "2_sft: does not fit: needs" in shown
    assert "fits with micro-batches of" in shown
    assert "--data.batch_size" in shown


@pytest.mark.slow
@needs_simulation
def test_the_largest_micro_batch(capsys: pytest.CaptureFixture[str]) -> None:
    main(["hovle", "--stages", "2_align", "--device", "a100-40", "--devices", "32", "--search", "--json"])
    (plan,) = json.loads(capsys.readouterr().out)
    batch = plan["batch"]
    assert batch["batch_size"] > 4
    assert batch["batch_size"] * batch["accumulate"] == 16


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name a recipe, as the first argument, or all: eve"),
        (["llava"], "llava"),
        (["llava15", "--device", "a100"], "--device a100 is no GPU that is known.*no number of GiB; known: a100-40"),
        (["llava15", "--device", "0.1"], "--device takes at least 1 GiB"),
        (["llava15", "--devices", "12"], "--devices 12 does not divide into machines of --per-node 8"),
        (["llava15", "--devices", "0"], "--devices and --per-node are at least 1"),
        (["llava15", "--stages", "3_sft"], "recipe 'llava15' has no stage '3_sft'"),
        (["llava15", "2_sft"], "'2_sft' is neither a flag nor the value of one"),
        (["all", "--stages", "1_align"], "lit-vlm plan all takes --device"),
    ],
)
def test_what_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        main(words)


def test_a_file_that_is_no_benchmark(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    file.write_text("[]")
    with pytest.raises(ValueError, match="is no file of lit-vlm bench --json: it has no 'assumptions'"):
        main(["llava15", "--measured", str(file)])


@needs_simulation
def test_data_that_a_flag_names_must_be_there() -> None:
    with pytest.raises(ValueError, match="1_align: .*nothing.json"):
        main(["llava15", "--stages", "1_align", "--data.train", "nothing.json"])


@pytest.mark.slow
@needs_simulation
def test_a_wrong_flag_is_named_with_the_stage() -> None:
    with pytest.raises(ValueError, match=r"1_align: .*model\.projektor"):
        main(["llava15", "--stages", "1_align", "--model.projektor", "MLP"])


def test_without_a_simulation_states_are_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    main(["llava15", "--stages", "2_sft"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "No step can run: simulated GPUs need a C compiler" in shown
    assert "arithmetic of states alone" in shown
    assert "total 12.7" in shown
    assert "not known" in shown


STATE = RunState("llava15", None, "fsdp", ["1_align"], [])


@pytest.mark.slow
@needs_simulation
def test_a_run_on_several_gpus_says_its_plan_and_keeps_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checked = Checked(None, 8, 8, "NVIDIA A100-SXM4-80GB", int(79.2 * 2**30))
    told.foretell(STATE, "1_align", tmp_path / "1_align", checked, Console())
    assert "planned: peak" in capsys.readouterr().out
    plan = json.loads((tmp_path / "1_align" / PLAN_FILE).read_text())
    assert plan["devices"] == 8
    assert plan["device"] == "A100 SXM 80 GB"


def test_a_run_on_an_unknown_gpu_goes_on_without(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told.foretell(STATE, "1_align", tmp_path, Checked(None, 8, 8, "Graphics 9000", 1 << 35), Console())
    assert "no plan: Graphics 9000 is no GPU that lit-vlm plan knows" in capsys.readouterr().out
    assert not (tmp_path / PLAN_FILE).exists()


@pytest.mark.slow
@needs_simulation
def test_a_plan_that_fails_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checked = Checked(None, 8, 8, "NVIDIA A100-SXM4-80GB", int(79.2 * 2**30))
    state = RunState("llava15", None, "fsdp", ["1_align"], ["--model.projektor", "MLP"])
    told.foretell(state, "1_align", tmp_path, checked, Console(width=300))
    assert "no plan: 1_align: " in capsys.readouterr().out
