"""Running tasks: prompts, scores at any batch size, resuming, files, processes, the callback."""

from __future__ import annotations

import json
import math
import os
import subprocess
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from PIL import Image as PILImage

from callbacks import Evaluate
from lit_vlm.commands.cli import main
from lit_vlm.data import ChatML, Plain, SquareCrop, VLMData
from lit_vlm.data.records import Image, Text
from lit_vlm.data.sample.format import SampleFormat
from lit_vlm.decoders import HFDecoder
from lit_vlm.embedders import Splice
from lit_vlm.encoders import HFEncoder
from lit_vlm.evaluation.asker import Asker
from lit_vlm.evaluation.tasks import (
    LetterNamings,
    Perplexity,
    Prompts,
    RecordFile,
    SceneQuestions,
    SceneText,
    Shots,
    TaskSettings,
    run_task,
)
from lit_vlm.projectors import MLP
from lit_vlm.training.module import LitVLM
from lit_vlm.training.stage import Stage
from lit_vlm.worlds import Shapes
from tests.forkserver import interpreter
from tests.runs import environment, one_step
from tests.tiny import CLIP, LLAMA


def lit() -> LitVLM:
    torch.manual_seed(0)
    decoder = partial(HFDecoder, config=LLAMA, tokenizer="bytes")
    return LitVLM(partial(HFEncoder, config=CLIP), MLP, Splice, decoder, Stage(train={"projector": 1e-3}))


@pytest.fixture(scope="module")
def asker() -> Asker:
    module = lit()
    module.model = module.build()
    module.model.eval()
    return Asker(module, SampleFormat(ChatML(), SquareCrop(), 2048, fast_jpeg=True))


def scenes(count: int = 2) -> SceneQuestions:
    return SceneQuestions(count=count)


class Lettered(SceneQuestions):
    """With options by letter."""

    lists_options = True


def lines(out: Path) -> dict[str, dict[str, Any]]:
    return {line["id"]: line for line in map(json.loads, (out / "answers.jsonl").read_text().splitlines())}


@pytest.mark.parametrize("choosing", ["option", "letter", "generate"])
@pytest.mark.parametrize("shots", [0, 2])
def test_answers_do_not_depend_on_the_batch_size(choosing: Any, shots: int, asker: Asker, tmp_path: Path) -> None:
    found = []
    for size in (1, 4):
        settings = TaskSettings(Shots(shots), choosing, batch_size=size, max_new_tokens=4)
        result = run_task(asker, Lettered(count=2), settings, tmp_path / str(size))
        answers = lines(tmp_path / str(size))
        found.append((result, {key: line["answer"] for key, line in answers.items()}))
        assert list(answers) == [example.id for example in scenes().examples]
    assert found[0] == found[1]
    assert found[0][0].count == 10
    saved = json.loads((tmp_path / "4" / "scores.json").read_text())
    assert saved["scores"] == found[1][0].scores
    assert saved["settings"]["prompt"]["shots"] == shots


def test_demonstrations_are_earlier_turns_of_another_split_and_always_the_same() -> None:
    task = scenes()
    prompts = Prompts(task, Shots(2, text_shots=1, system=""))
    example = task.examples[3]
    record = prompts.record(example)
    assert [message.role for message in record.messages] == ["system"] + ["user", "assistant"] * 4
    pictures = [sum(isinstance(part, Image) for part in message.content) for message in record.messages[1::2]]
    assert pictures == [0, 1, 1, 1]
    shown = prompts.demonstrations(example)
    assert shown == Prompts(task, Shots(2, text_shots=1)).demonstrations(example)
    assert {other.group for other in shown} == {example.group}
    assert not {other.id for other in shown} & {other.id for other in task.examples}
    assert Prompts(task, Shots(3, seed=1)).demonstrations(example) != shown
    assert record.messages[-1].text == example.references[0]
    assert record.options == example.options


def test_too_many_demonstrations_are_refused() -> None:
    with pytest.raises(ValueError, match="99 demonstrations were asked for, and there are 64 of group"):
        Prompts(scenes(), Shots(99)).demonstrations(scenes().examples[0])


def test_answers_of_other_demonstrations_are_not_taken(asker: Asker, tmp_path: Path) -> None:
    def write(name: str, *pairs: tuple[str, str]) -> str:
        rows = [{"messages": [{"role": "user", "content": one}], "answers": [answer]} for one, answer in pairs]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    asked = write("mine.jsonl", ("One?", "1"), ("Two?", "2"))
    first, other = write("first.jsonl", ("Three?", "3")), write("other.jsonl", ("Three?", "4"))
    for shots in (0, 1):
        settings = TaskSettings(Shots(text_shots=shots), max_new_tokens=2)
        run_task(asker, RecordFile(asked, demonstrations=first), settings, tmp_path / str(shots))
        run_task(asker, RecordFile(asked, demonstrations=first), settings, tmp_path / str(shots))
    with pytest.raises(ValueError, match="holds answers of another checkpoint, of other questions or settings"):
        run_task(asker, RecordFile(asked, demonstrations=other), settings, tmp_path / "1")
    settings = TaskSettings(Shots(), max_new_tokens=2)
    run_task(asker, RecordFile(asked, demonstrations=other), settings, tmp_path / "0")  # it has none to show


def test_a_question_with_demonstrations_of_its_own_is_asked_with_them(asker: Asker, tmp_path: Path) -> None:
    for shots in (0, 4):
        result = run_task(asker, LetterNamings(count=2), TaskSettings(Shots(shots)), tmp_path / str(shots))
        assert result.count == 2
        assert not result.left_out
        assert result.scores.keys() >= {"accuracy", "attribute/colour", "attribute/shape"}


def test_answers_that_cannot_be_written_are_told_and_scored(asker: Asker, tmp_path: Path, caplog) -> None:
    (tmp_path / "out").write_text("in the place of a folder")
    result = run_task(asker, Lettered(count=2), TaskSettings(limit=4), tmp_path / "out")
    assert result.count == 4
    assert "Not a directory" in str(result.unwritten) or "File exists" in str(result.unwritten)
    warned = [record.getMessage() for record in caplog.records]
    assert len(warned) == 2  # not for each answer
    assert "answers.0.partial.jsonl cannot be written: " in warned[0]
    assert "answers and scores could not be written: " in warned[1]
    assert run_task(asker, Lettered(count=2), TaskSettings(limit=4), tmp_path / "other").unwritten is None


def test_a_run_goes_on_where_it_stopped(asker: Asker, tmp_path: Path) -> None:
    out, checkpoint = tmp_path / "out", tmp_path / "weights"
    checkpoint.write_text("1")
    run_task(asker, Lettered(count=2), TaskSettings(limit=4), out, str(checkpoint))
    first = lines(out)
    assert len(first) == 4
    # What is there is not asked again: an answer that was changed by hand stays, and a line cut short is asked for.
    changed = dict.fromkeys(first, "Z")
    text = [json.dumps(line | {"answer": changed[key]}) for key, line in first.items()]
    (out / "answers.jsonl").write_text("\n".join(text[:3]) + "\n" + text[3][:20])
    result = run_task(asker, Lettered(count=2), TaskSettings(), out, str(checkpoint))
    answers = lines(out)
    assert result.count == len(answers) == 10
    assert sum(line["answer"] == "Z" for line in answers.values()) == 3
    assert not list(out.glob("*.partial.jsonl"))
    # A limit loses nothing of what was answered without.
    assert run_task(asker, Lettered(count=2), TaskSettings(limit=2), out, str(checkpoint)).count == 2
    assert lines(out) == answers
    for other in (TaskSettings(Shots(1)), TaskSettings(choosing="letter")):
        with pytest.raises(ValueError, match="of another checkpoint, of other questions or settings: --overwrite"):
            run_task(asker, Lettered(count=2), other, out, str(checkpoint))
    for other_task in (Lettered(count=3), scenes()):
        with pytest.raises(ValueError, match="of another checkpoint, of other questions or settings: --overwrite"):
            run_task(asker, other_task, TaskSettings(max_new_tokens=3), out, str(checkpoint))
    os.utime(checkpoint, ns=(1, 1))  # other weights in the same place
    with pytest.raises(ValueError, match="another checkpoint"):
        run_task(asker, Lettered(count=2), TaskSettings(), out, str(checkpoint))
    run_task(asker, Lettered(count=2), TaskSettings(), out, str(checkpoint), resume=False)
    assert not any(line["answer"] == "Z" for line in lines(out).values())


def test_training_s_random_numbers_stay_as_they_are(asker: Asker) -> None:
    before = torch.get_rng_state()
    run_task(asker, scenes(1), TaskSettings())
    assert torch.equal(before, torch.get_rng_state())


def test_settings_that_make_no_sense_are_refused(asker: Asker) -> None:
    for make, message in (
        (lambda: Shots(-1), "cannot be fewer than 0: -1 with"),
        (lambda: Shots(2, text_shots=-1), "cannot be fewer than 0"),
        (lambda: TaskSettings(limit=0), "limit must be at least 1, not 0"),
        (lambda: TaskSettings(max_new_tokens=-1), "max_new_tokens must be at least 1"),
        (lambda: Prompts(scenes(1), Shots(), "letter"), "shows no letters in its questions"),
        (lambda: Prompts(scenes(1), Shots(100)), "100 demonstrations were asked for, and there are 64 of group"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_an_example_that_cannot_be_asked_counts_as_wrong_and_is_named(asker: Asker, tmp_path: Path) -> None:
    task = scenes()
    task.folder = tmp_path
    broken = task.examples[0].__class__(**(vars(task.examples[0]) | {"images": (Image(path="nothing.png"),)}))
    task.examples = [broken, *task.examples[1:]]  # type: ignore[misc]
    result = run_task(asker, task, TaskSettings(batch_size=3), tmp_path / "out")
    assert result.left_out == {"missing_image": 1}
    assert result.count == 10
    assert lines(tmp_path / "out")[broken.id]["left_out"] == "missing_image"
    PILImage.new("RGB", (40, 40)).save(tmp_path / "nothing.png")
    result = run_task(asker, task, TaskSettings(batch_size=3), tmp_path / "out")  # it is asked when it is there
    assert (result.left_out, result.count) == ({}, 10)


def test_no_score_is_given_where_nothing_could_be_asked(asker: Asker, tmp_path: Path) -> None:
    silent = Asker(asker.module, replace(asker.format, template=Plain()))
    task = SceneText(count=1)
    with pytest.raises(ValueError, match=r"none of 5 examples could be asked: .*the template Plain writes nothing"):
        run_task(silent, task, TaskSettings(), tmp_path / "out")


def test_perplexity_is_that_of_the_logits(asker: Asker, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a red cube\nsomething longer than that\n")
    task = Perplexity(str(tmp_path))
    with pytest.raises(ValueError, match="perplexity has no split to take demonstrations from"):
        run_task(asker, task, TaskSettings(Shots(4)))
    found = run_task(asker, task, TaskSettings(batch_size=2)).scores
    tokenizer = asker.module.input_spec.tokenizer
    total, count = 0.0, 0
    for text in ("a red cube", "something longer than that"):
        ids = torch.tensor([[*tokenizer(text).input_ids, tokenizer.eos_token_id]])
        decoder = asker.module.vlm.decoder
        assert isinstance(decoder, HFDecoder)
        logits = decoder.lm(input_ids=ids).logits[0, :-1].log_softmax(-1)
        total -= float(logits.gather(1, ids[0, 1:, None]).sum())
        count += ids.shape[1] - 1
    assert found["loss"] == pytest.approx(total / count, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)


def test_steps_come_before_the_answer(asker: Asker, tmp_path: Path) -> None:
    settings = TaskSettings(choosing="option", think=True, limit=2)
    run_task(asker, scenes(), settings, tmp_path / "out")
    for line in lines(tmp_path / "out").values():
        assert "thought" in line
        assert "Let's think step by step." in line["prompt"]
    task = scenes()
    messages = Prompts(task, Shots()).record(task.examples[0], think=True, thought="hm").messages
    assert [message.role for message in messages] == ["user", "assistant", "user", "assistant"]
    assert messages[1].content == (Text("hm"),)


def test_text_questions_have_no_picture() -> None:
    examples = SceneText(count=3).examples
    assert len(examples) == 15
    assert not any(example.images for example in examples)
    assert all(example.references[0] in example.options for example in examples)


def test_the_callback_scores_on_a_schedule_and_at_the_end(tmp_path: Path) -> None:
    data = VLMData([Shapes(24)], ChatML(), SquareCrop(), batch_size=4, max_length=256)
    logger = CSVLogger(tmp_path)
    trainer = L.Trainer(
        accelerator="cpu", devices=1, default_root_dir=tmp_path, max_steps=3, logger=logger, log_every_n_steps=1,
        callbacks=[Evaluate("scenes", every_n_steps=2, limit=3), Evaluate("scenes", limit=1, shots=1)],
        enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(lit(), data)
    logged = (Path(logger.log_dir) / "metrics.csv").read_text()
    assert {"task/scenes/0-shot/accuracy", "task/scenes/1-shot/accuracy"} <= set(logged.splitlines()[0].split(","))
    assert sorted(path.name for path in (tmp_path / "tasks" / "scenes" / "0-shot").iterdir()) == ["2", "3"]
    assert [path.name for path in (tmp_path / "tasks" / "scenes" / "1-shot").iterdir()] == ["3"]
    with pytest.raises(ValueError, match="task: there is no 'none'; there are .*scenes"):
        Evaluate("none")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return one_step(tmp_path_factory.mktemp("evaluate") / "run", "llava15", "2_sft")


@pytest.mark.filterwarnings("ignore:LightningCLI.s args parameter")
def test_from_a_run_to_files_a_table_and_mlflow(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    flags = [
        "--task",
        "scenes",
        "--limit",
        "6",
        "--max-length",
        "2048",
        "--workers",
        "0",
        "--out",
        str(tmp_path / "out"),
    ]
    main(["evaluate", str(run), *flags, "--shots", "0,1"])
    printed = capsys.readouterr().out
    assert "scenes, 1 shots: accuracy" in printed
    assert "kind/relation" in printed
    assert {path.name for path in (tmp_path / "out" / "scenes").iterdir()} == {"0-shot", "1-shot"}
    for name, message in (("none", "--task: there is no 'none'"), ("gqa", "there is no folder benchmarks/gqa")):
        with pytest.raises(SystemExit):
            main(["evaluate", str(run), "--task", name])
        assert message in capsys.readouterr().err
    for more, message in (
        (["--shots", "four"], "write numbers from 0 on"),
        (["--shots", "4", "--text-shots", "2"], "--text-shots belongs to prompts of 0 shots, and --shots is 4"),
        (["--shots", "0,90"], "90 demonstrations were asked for"),
        (["--device", "gpu"], "there is no device 'gpu' here"),
    ):
        with pytest.raises(SystemExit):
            main(["evaluate", str(run), "--task", "scenes", *more])
        assert message in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:LightningCLI.s args parameter")
def test_text_shots_go_into_prompts_of_no_others_and_into_their_name(run: Path, tmp_path: Path) -> None:
    flags = ["--task", "scenes", "--limit", "2", "--max-length", "2048", "--workers", "0", "--no-mlflow"]
    main(["evaluate", str(run), *flags, "--shots", "0,1", "--text-shots", "2", "--out", str(tmp_path)])
    for name, turns in (("0-shot-2-text", 3), ("1-shot", 2)):
        for line in lines(tmp_path / "scenes" / name).values():
            assert line["prompt"].count("USER:") == turns


@pytest.mark.slow
def test_two_processes_give_the_scores_of_one(run: Path, tmp_path: Path) -> None:
    flags = ["evaluate", str(run), "--task", "scenes", "--limit", "5", "--batch-size", "2", "--max-length", "2048",
             "--workers", "0", "--no-mlflow", "--device", "cpu", "--out"]  # fmt: skip
    main([*flags, str(tmp_path / "one")])
    command = [interpreter(), "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0",
               "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "lit_vlm"]  # fmt: skip
    result = subprocess.run(
        [*command, *flags, str(tmp_path / "two")], env=environment(tmp_path) | {"PATH": os.environ["PATH"]},
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    one, two = (json.loads((tmp_path / name / "scenes/0-shot/scores.json").read_text()) for name in ("one", "two"))
    assert one["scores"] == two["scores"]
    first, second = (lines(tmp_path / name / "scenes/0-shot") for name in ("one", "two"))
    assert {key: line["answer"] for key, line in first.items()} == {key: line["answer"] for key, line in second.items()}


@pytest.mark.filterwarnings("ignore:LightningCLI.s args parameter")
def test_chat_takes_demonstrations_and_pictures_in_place(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shapes = Shapes(2, text_only=False)
    for index in range(2):
        data = shapes.record(index).images[0].data
        assert data is not None
        (tmp_path / f"{index}.png").write_bytes(data)
    turns = [
        {"role": "user", "content": [{"type": "image", "image": "0.png"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "Box."},
    ]
    (tmp_path / "demos.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    images = ["--image", str(tmp_path / "0.png"), "--image", str(tmp_path / "1.png")]
    chat = ["chat", str(run), *images, "--max-new-tokens", "2", "--device", "cpu"]
    main([*chat, "--demos", str(tmp_path / "demos.jsonl"), "--prompt", "<image> or <image>?"])
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main([*chat, "--prompt", "only <image>?"])
    assert "1 <image> marks, and there are 2 pictures" in capsys.readouterr().err
    (tmp_path / "demos.jsonl").write_text(json.dumps({"messages": turns[:1]}) + "\n")
    with pytest.raises(SystemExit):
        main([*chat, "--demos", str(tmp_path / "demos.jsonl"), "--prompt", "?"])
    assert "line 1: its turns must be user, assistant" in capsys.readouterr().err
