"""`lit-vlm data caption` with a tiny run that has learned one caption."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lit_vlm.commands.cli import main
from lit_vlm.core.sampling import Sampling
from lit_vlm.data.records import Record
from lit_vlm.data.sets.convert import convert
from lit_vlm.data.sources import Converted
from lit_vlm.evaluation.asker import load_run
from lit_vlm.evaluation.captioning.captioner import RunCaptioner
from lit_vlm.worlds import Shapes
from tests.runs import one_step

LEARNED = "it is a shape"
COUNT = 8


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of pictures, all with the same caption."""
    folder = tmp_path_factory.mktemp("pictures")
    shapes = Shapes(COUNT, text_only=False)
    rows = []
    for index in range(COUNT):
        (folder / f"{index}.png").write_bytes(shapes.record(index).images[0].data or b"")
        rows.append(json.dumps({"image": f"{index}.png", "caption": LEARNED}))
    (folder / "table.jsonl").write_text("\n".join(rows))
    return folder / "table.jsonl"


@pytest.fixture(scope="module")
def run(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return one_step(
        tmp_path_factory.mktemp("captioner") / "run", "llava15", "2_sft", "--data.train", str(pictures),
        "--data.batch_size", "4", "--trainer.max_steps", "100", "--trainer.max_epochs", "100",
        "--trainer.precision", "32-true", "--model.stage.train.decoder", "5e-3",
        "--trainer.enable_progress_bar", "false",
    )  # fmt: skip


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    convert(Shapes(COUNT, text_only=False), tmp_path / "shapes")
    return tmp_path / "shapes"


def caption(*words: object) -> None:
    main(["data", "caption", *map(str, words), "--workers", "0"])


def test_a_run_captions_a_set_and_the_old_text_is_shown_beside(
    run: Path, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (shapes, tmp_path / "out", "--model", run, "--max-tokens", "24", "--dtype", "float32")
    caption(*words)
    said = capsys.readouterr().out
    old, new = Converted(str(shapes)), Converted(str(tmp_path / "out"))
    assert [new.record(index).messages[1].text for index in range(COUNT)] == [LEARNED] * COUNT
    assert f"old: {old.record(0).messages[1].text}\n  new: {LEARNED}" in said
    assert f"captioning shapes: 0 of {COUNT}" in said
    captions = new.info.captions
    assert captions["model"]["name"] == str(run)
    assert captions["model"]["kind"] == "run"
    assert captions["decoding"]["batch_size"] == 16
    caption(*words)  # a finished set tells the same, and loads nothing
    assert f"new: {LEARNED}" in capsys.readouterr().out


def test_what_a_run_draws_does_not_depend_on_the_company(run: Path) -> None:
    captioner = RunCaptioner(load_run(run))
    turns = [Record("a", "a", (Shapes(6, text_only=False).record(index).messages[0],)) for index in range(6)]
    inputs = [captioner.inputs.one(turn) for turn in turns]
    sampling = [Sampling(16, 1.5, 0.95, seed) for seed in range(6)]
    together = captioner.write(captioner.inputs.join(inputs), sampling)
    alone = [captioner.write([one], [own])[0] for one, own in zip(inputs, sampling, strict=True)]
    assert together == alone
    assert len({answer.text for answer in together}) > 3
    greedy = captioner.write(inputs, [Sampling(24, seed=seed) for seed in range(6)])
    assert [answer.text for answer in greedy] == captioner.asker.answer(inputs, 24)
    assert not any(answer.cut for answer in greedy)
    assert all(answer.cut for answer in captioner.write(inputs, [Sampling(3)] * 6))


def llama(folder: Path) -> list[object]:
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text('{"model_type": "llama"}')
    return ["--model", folder / "model"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (lambda folder: ["--model", folder / "none"], "there is no such run or folder"),
        (lambda folder: ["--model", folder], "there is no complete checkpoint in"),
        (llama, "is a 'llama', which AutoModelForImageTextToText of transformers does not open"),
        (lambda folder: ["--model", "x", "--batch-size", "0"], "--batch-size must be at least 1, not 0"),
        (lambda folder: ["--model", "x", "--refuse", "("], "--refuse (: is no regular expression"),
        (lambda folder: ["--model", "x", "--workers", "-1"], "--workers must be at least 0, not -1"),
        (lambda folder: ["--model", "x", "--set", "sauce=1"], "sauce"),
        (lambda folder: ["--model", "x", "--on", "ray"], "--on ray: name --dtype, too"),
    ],
)
def test_bad_arguments_are_told_in_one_line(
    words: Callable[[Path], list[object]],
    message: str,
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["data", "caption", str(pictures), str(tmp_path / "out"), *map(str, words(tmp_path))])
    assert ended.value.code == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert [line for line in said if line.startswith("error: ")] == said[-2:-1]
    assert message in said[-2]
    assert not (tmp_path / "out").exists()


def test_a_set_without_pictures_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "texts.txt").write_text("one\ntwo\n")
    with pytest.raises(SystemExit):
        caption(tmp_path / "texts.txt", tmp_path / "out", "--model", run)
    assert "texts has 2 records and no picture in them" in capsys.readouterr().err
