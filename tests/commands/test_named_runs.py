"""Every command that loads a trained model takes a checkpoint, the folder of a stage, or that of a whole run."""

from __future__ import annotations

from pathlib import Path

import pytest

from lit_vlm.commands.cli import main
from lit_vlm.commands.runs import RunState
from tests.runs import one_step

COMMANDS = {
    "chat": ["--prompt", "?"],
    "evaluate": ["--task", "scenes"],
    "export": ["out"],
    "probe": ["--target", "depth", "--no-mlflow", "--out", "probed"],
    "serve": [],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_run_without_a_finished_stage_is_refused(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    RunState("llava15", "tiny", "single", ["1_align", "2_sft"], []).save(tmp_path / "mine")
    with pytest.raises(SystemExit):
        main([command, "mine", *COMMANDS[command]])
    assert "no stage of the run mine has ended (1_align, 2_sft): train it first" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_says_what_a_run_is(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert "(its last finished stage)" in " ".join(capsys.readouterr().out.split())


def test_the_last_finished_stage_of_a_run_is_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    one_step(tmp_path / "mine" / "2_sft", "llava15", "2_sft")
    RunState("llava15", "tiny", "single", ["2_sft"], [], ["2_sft"]).save(tmp_path / "mine")
    main(["export", "mine", "out", "--format", "hf"])
    captured = capsys.readouterr()
    assert "mine: its last finished stage, 2_sft (" in captured.err
    assert "wrote out: read back" in captured.out
