"""`lit-vlm data curate` from the command line: its table, its help, and errors of one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from lit_vlm.commands.cli import main
from lit_vlm.data.curation import STEPS, read_curation
from lit_vlm.data.sources import Converted
from tests.data.curation.planted import CAPTION, encoded, write


def file_of(folder: Path, step: str) -> str:
    write(folder / "a", [(encoded((20 + 2 * index, 40)), CAPTION) for index in range(10)])
    file = folder / "mix.yaml"
    file.write_text(f"sources: {{a: {folder}/a/captions.jsonl, b: {folder}/a/captions.jsonl}}\nsteps: [{step}]\n")
    return str(file)


def test_a_table_says_what_each_step_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = file_of(tmp_path, "{class_path: Size, init_args: {min_side: 30}}")
    main(["data", "curate", file, str(tmp_path / "out"), "--workers", "0"])
    told = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in told.splitlines() if line.startswith("│")]
    assert rows == [
        ["read", "20", "–", "20", "100.0 %"],
        ["1 Size", "20", "min_side 10", "10", "50.0 %"],
        ["a", "10", "", "5", "50.0 %"],
        ["b", "10", "", "5", "50.0 %"],
    ]
    assert f"{tmp_path}/out/dropped.parquet" in told.replace("\n", "")
    assert len(Converted(str(tmp_path / "out"))) == 10
    assert (tmp_path / "out.measures").is_dir()
    main(
        ["data", "curate", file, str(tmp_path / "two"), "--workers", "0", "--measures", str(tmp_path / "out.measures")]
    )
    again = capsys.readouterr().out
    assert "measuring" not in again
    assert not (tmp_path / "two.measures").exists()


def test_errors_are_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for step, told in (
        ("Sise", "there is no 'Sise'"),
        ("{class_path: Size, init_args: {min_side: 99}}", "drops all 20"),
    ):
        with pytest.raises(SystemExit):
            main(["data", "curate", file_of(tmp_path, step), str(tmp_path / "out"), "--workers", "0"])
        said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(said) == 1
        assert told in said[0]
    assert not (tmp_path / "out").exists()


def test_the_help_shows_an_example_that_can_be_read(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit):
        main(["data", "curate", "--help"])
    text = capsys.readouterr().out
    example = text[text.index("  sources:") :]
    monkeypatch.chdir(tmp_path)
    for folder in ("laion", "sa1b"):
        write(tmp_path / "data" / folder, [(encoded((500, 500), seed=index), CAPTION) for index in range(3)])
    example = example.replace("data/laion, form: WebDataset", "data/laion/captions.jsonl, form: Captions")
    for file in (tmp_path / "data" / "sa1b").glob("*.img"):
        file.rename(file.with_suffix(".png"))
    Path("mix.yaml").write_text(example)
    curation = read_curation(Path("mix.yaml"), STEPS)
    assert [type(step).__name__ for step in curation.steps] == ["Size", "Text", "Sample"]


def test_the_help_fits_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main(["data", "curate", "--help"])
    said = capsys.readouterr().out
    assert "goes on with" in said
    assert max(map(len, said.splitlines())) <= 80
