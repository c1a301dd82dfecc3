"""`lit-vlm export` as a command: the card of what it writes, and its way to a hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForImageTextToText

from lit_vlm.commands.cli import main
from lit_vlm.hf.adapters import load_adapted
from tests.hub import TOKEN, hub
from tests.runs import lit_vlm, one_step


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return one_step(tmp_path_factory.mktemp("exported") / "llava15" / "2_sft", "llava15", "2_sft")


@pytest.fixture
def ask(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the command with a hub at an address; returns its exit code, output and errors."""

    def export(out: str, *flags: str, address: str, token: str = TOKEN) -> tuple[int, str, str]:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", token)
        code = 0
        try:
            main(["export", str(run), str(tmp_path / out), *flags])
        except SystemExit as ended:
            code = int(ended.code or 0)
        return code, *capsys.readouterr()

    return export


def test_an_exported_folder_has_a_card(run: Path, tmp_path: Path) -> None:
    said = lit_vlm(tmp_path, "export", str(run), "out", "--format", "hf").stdout
    assert "its model card is out/README.md" in said
    head, _, text = (tmp_path / "out" / "README.md").read_text().removeprefix("---\n").partition("\n---\n")
    assert yaml.safe_load(head)["pipeline_tag"] == "image-text-to-text"
    assert f"lit-vlm export {run} out --format hf" in text
    assert "| decoder | `HFDecoder` |" in text
    assert "## Scores\n\nNone were kept" in text


@pytest.mark.parametrize("format_name", ["hf", "llava-hf"])
def test_weights_are_rounded_on_request(format_name: str, ask: Any, tmp_path: Path) -> None:
    code, said, error = ask("out", "--format", format_name, "--dtype", "bfloat16", address="")
    assert code == 0, error
    assert "; then rounded to bfloat16" in said
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", trust_remote_code=True, dtype="auto")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert all(value.isfinite().all() for value in loaded.parameters())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--quantise", "q8_0"], "--quantise is of --format hf and gguf"),
        (["--format", "gguf", "--dtype", "float16"], "use --quantise, not --dtype"),
        (["--format", "gguf", "--quantise", "q9"], "there is no kind 'q9' of GGUF files here, only f32, f16, q8_0"),
    ],
)
def test_flags_of_another_format_are_refused(flags: list[str], message: str, ask: Any, tmp_path: Path) -> None:
    code, _, error = ask("out", *flags, address="")
    assert code == 1
    assert message in error
    assert not (tmp_path / "out").exists()


def test_a_folder_is_uploaded_with_all_that_is_in_it(ask: Any, tmp_path: Path) -> None:
    with hub() as server:
        code, said, error = ask("out", "--format", "hf", "--push", "lab/small", address=server.address)
        assert code == 0, error
        assert f"uploaded to {server.address}/lab/small" in said
        files = {str(file.relative_to(tmp_path / "out")): file.read_bytes() for file in (tmp_path / "out").rglob("*")}
        assert server.models == {"lab/small": files}
        assert server.private == {"lab/small"}
        server.full = True
        code, _, error = ask("again", "--push", "lab/small", address=server.address)
    assert code == 1
    assert "again was written, and not uploaded to lab/small" in error
    assert (tmp_path / "again" / "README.md").is_file()


@pytest.mark.parametrize(
    ("name", "token", "message"),
    [
        ("small", TOKEN, "expected ORGANISATION/NAME or USER/NAME"),
        ("lab/sm--all..x", TOKEN, "--push lab/sm--all..x: "),
        ("lab/small", "hf_wrong", "not logged in"),
    ],
)
def test_what_no_hub_takes_is_said_before_anything_is_written(
    name: str, token: str, message: str, ask: Any, tmp_path: Path
) -> None:
    with hub() as server:
        code, _, error = ask("out", "--push", name, address=server.address, token=token)
    assert code == 1
    assert message in error
    assert not (tmp_path / "out").exists()


def test_a_hub_that_does_not_answer_is_said_before_anything_is_written(ask: Any, tmp_path: Path) -> None:
    code, _, error = ask("out", "--push", "lab/small", address="http://127.0.0.1:9")
    assert code == 1
    assert "--push lab/small: the hub does not answer" in error
    assert not (tmp_path / "out").exists()


def test_adapters_go_out_alone_or_merged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lora = ["--model.lora.decoder", "{rank: 2}", "--model.stage.warmup_ratio", "0"]
    first = one_step(tmp_path / "llava15" / "1_align", "llava15", "1_align")
    later = one_step(tmp_path / "llava15" / "2_sft", "llava15", "2_sft", *lora, "--model.stage.start_from", str(first))
    export(first, tmp_path / "base", "hf")
    capsys.readouterr()
    export(later, tmp_path / "adapters", "peft", "--base", str(tmp_path / "base"))
    assert "adapters: adapters and the whole projector, " in capsys.readouterr().out
    assert not (tmp_path / "adapters" / "base").exists()
    assert "library_name: peft" in (tmp_path / "adapters" / "README.md").read_text()
    export(later, tmp_path / "merged", "hf")
    export(later, tmp_path / "rounded", "hf", "--quantise", "int8")
    assert capsys.readouterr().out.count("its blocks are in int8") == 1
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "rounded", trust_remote_code=True).config.quantise
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", trust_remote_code=True).state_dict()
    found = load_adapted(tmp_path / "adapters").merge_and_unload().state_dict()
    assert found.keys() == merged.keys()
    for key, value in merged.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-6)


def export(run: Path, out: Path, format_name: str, *flags: str) -> None:
    main(["export", str(run), str(out), "--format", format_name, *flags])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--format", "hf", "--base", "b"), "--base is of --format peft"),
        (("--format", "peft", "--base", "./none"), "there are no weights at none"),
        (("--format", "peft", "--dtype", "bfloat16"), "adapters are written in float32: round their base"),
        (("--format", "peft"), "this run has no adapters"),
        (("--format", "hf", "--quantise", "q8_0"), "--quantise of --format hf is one of nf4, int8, fp8, not q8_0"),
    ],
)
def test_flags_that_do_not_fit_are_refused(
    flags: tuple[str, ...], said: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["export", str(run), str(tmp_path / "out"), *flags])
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
