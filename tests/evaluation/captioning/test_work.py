"""A captioned set by a tiny LLaVA of transformers: what it holds, what is left out, and that nobody's death matters."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from lit_vlm.checkpoints.published import export_published
from lit_vlm.core.sampling import Sampling
from lit_vlm.data import ChatML, SquareCrop
from lit_vlm.data.records import Image, Message, Record, Text
from lit_vlm.data.sample.format import SampleFormat
from lit_vlm.data.sets import engine as engines
from lit_vlm.data.sets import shared
from lit_vlm.data.sets.check import check_set
from lit_vlm.data.sets.convert import TooManyBad, convert
from lit_vlm.data.sets.engine import ALONE, Local, Place
from lit_vlm.data.sources import ChatJsonl, Converted, Grouped, Source, Texts, Vetted
from lit_vlm.data.sources.base import describe
from lit_vlm.data.sources.converted import INFO, SetInfo
from lit_vlm.evaluation.captioning.captioner import Answer
from lit_vlm.evaluation.captioning.checks import Checks
from lit_vlm.evaluation.captioning.hf import HFCaptioner
from lit_vlm.evaluation.captioning.models import CaptionModel
from lit_vlm.evaluation.captioning.work import CaptionBlock, CaptionSettings, caption
from lit_vlm.worlds import Shapes
from tests.exports import exported
from tests.tiny import tiny_vlm

RECORDS = 18
SETTINGS = CaptionSettings(("What is this?", "Describe it."), max_tokens=24, temperature=1.0, batch_size=4)
ANY = Checks(min_words=1, max_repeated=1.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> CaptionModel:
    """Random weights; a part of all tokens ends an answer, so that some captions end in time and some do not."""
    folder = tmp_path_factory.mktemp("llava") / "model"
    torch.manual_seed(0)
    export_published("llava-hf", tiny_vlm(), folder, SampleFormat(ChatML(), SquareCrop(), 512, True))
    GenerationConfig(eos_token_id=[2, *range(4, 259, 9)], pad_token_id=0).save_pretrained(folder)
    return CaptionModel.of_transformers(str(folder), "float32")


@pytest.fixture(scope="module")
def expected(model: CaptionModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process writes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    caption(work(model), out, 1.0)
    return out


def work(model: CaptionModel, source: Source | None = None, **changes: Any) -> CaptionBlock:
    return CaptionBlock(source or Shapes(RECORDS, text_only=False), model, replace(SETTINGS, **changes), ANY)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def listed(out: Path) -> dict[str, str]:
    lines = [json.loads(line) for line in (out / "bad_samples.jsonl").read_text().splitlines()]
    return {line["id"]: line["reason"] for line in lines}


# ----- what a set holds -----


def test_each_picture_has_a_new_caption_and_keeps_its_old_text(expected: Path) -> None:
    source, captioned = Shapes(RECORDS, text_only=False), Converted(str(expected))
    old = {record.id: record for record in map(source.record, range(RECORDS))}
    assert len(captioned) + len(listed(expected)) == RECORDS
    assert len(captioned) > RECORDS / 2
    prompts = set()
    for index in range(len(captioned)):
        record = captioned.record(index)
        question, answer = record.messages
        assert (question.role, answer.role) == ("user", "assistant")
        picture, prompt = question.content
        assert isinstance(picture, Image)
        assert isinstance(prompt, Text)
        assert picture.data == old[record.id].images[0].data
        prompts.add(prompt.text)
        before = [Message(m.role, (Text(m.text),)) for m in old[record.id].messages]
        assert list(record.earlier) == before
        assert answer.text.strip()
        assert answer.text != before[1].text
    assert prompts == {"\nWhat is this?", "\nDescribe it."}
    assert check_set(str(expected), decode=True) == []


def test_the_set_says_what_wrote_it(expected: Path, model: CaptionModel) -> None:
    said = Converted(str(expected)).info.captions
    assert said["model"] == {"name": model.name, **model.identity()}
    assert len(said["model"]["fingerprint"]) == 16
    assert said["prompts"] == list(SETTINGS.prompts)
    assert said["decoding"] == {"max_tokens": 24, "temperature": 1.0, "top_p": 1.0, "seed": 0, "batch_size": 4}
    assert said["checks"]["min_words"] == 1
    assert said["libraries"]["torch"] == torch.__version__


def test_a_captioned_set_keeps_all_when_it_is_converted_or_captioned_again(
    expected: Path, model: CaptionModel, tmp_path: Path
) -> None:
    first = Converted(str(expected))
    info = convert(first, tmp_path / "copy")
    copy = Converted(str(tmp_path / "copy"))
    assert [copy.record(i).earlier for i in range(len(copy))] == [first.record(i).earlier for i in range(len(first))]
    assert info.captions == first.info.captions
    again = caption(work(model, first, seed=7), tmp_path / "again", 1.0)
    assert again.captions["earlier"] == first.info.captions
    answers = {one.id: one for one in map(first.record, range(len(first)))}
    second = Converted(str(tmp_path / "again"))
    for record in map(second.record, range(len(second))):
        before = answers[record.id]
        assert [turn.text for turn in record.earlier[-2:]] == [turn.text for turn in before.messages]
        assert record.earlier[:-2] == before.earlier


def test_what_is_known_of_a_picture_goes_on(expected: Path, model: CaptionModel, tmp_path: Path) -> None:
    captioned = Converted(str(expected))
    first, second = captioned.record(0), captioned.record(1)
    assert Grouped(captioned, 2).record(0).earlier == (*first.earlier, *second.earlier)
    vetted = Vetted(captioned, licence="MIT")
    again = caption(work(model, vetted), tmp_path / "again", 1.0)
    assert again.captions["earlier"] == captioned.info.captions
    assert again.provenance.licence == "MIT"
    source = mixed(tmp_path, url="https://example.org/page")
    caption(work(model, source), tmp_path / "urls", 1.0)
    made = Converted(str(tmp_path / "urls"))
    assert {made.record(index).urls for index in range(len(made))} == {("https://example.org/page",)}


def test_caches_of_a_captioned_set_are_found_by_its_settings(expected: Path) -> None:
    captioned = Converted(str(expected))
    assert captioned.captions
    assert set(json.loads(describe(captioned).split(" ", 1)[1])) == {
        "chunked", "image_folder", "name", "named", "path", "remote", "storage_options"
    }  # fmt: skip


def test_a_set_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    convert(Shapes(4), tmp_path / "out")
    file = tmp_path / "out" / INFO
    file.write_text(
        json.dumps({key: value for key, value in json.loads(file.read_text()).items() if key != "captions"})
    )
    source = Converted(str(tmp_path / "out"))
    assert source.info.captions == {}
    assert source.record(0).earlier == ()


# ----- the same bytes -----


def test_loader_processes_change_nothing(expected: Path, model: CaptionModel, tmp_path: Path) -> None:
    with_loaders = work(model)
    with_loaders.workers = 2
    caption(with_loaders, tmp_path / "out", 1.0)
    assert tree(tmp_path / "out") == tree(expected)


def _caption(model: CaptionModel, out: Path, place: Place, pause: float) -> None:
    shared.PATIENCE, shared.POLL = 3.0, 0.1
    torch.set_num_threads(1)  # a fork has none of the threads that this process may have started
    job = work(model)
    if pause:
        job._loaded = Slow(model.load("cpu"), pause, out.with_suffix(f".{place.number}.log"))
    caption(job, out, 1.0, Local(0, place))


class Slow:
    """A captioner that takes its time, and writes down how many pictures it was asked."""

    def __init__(self, captioner: Any, pause: float, log: Path) -> None:
        self.captioner, self.pause, self.log = captioner, pause, log
        self.inputs = captioner.inputs

    def write(self, batch: Any, sampling: Any) -> list[Answer]:
        time.sleep(self.pause)
        with self.log.open("a") as file:
            file.write(f"{len(sampling)}\n")
        return self.captioner.write(batch, sampling)


def task(model: CaptionModel, out: Path, place: Place = ALONE, pause: float = 0.0) -> ForkProcess:
    process = get_context("fork").Process(target=_caption, args=(model, out, place, pause))
    process.start()
    return process


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_two_tasks_share_the_blocks_and_write_what_one_writes(
    expected: Path, model: CaptionModel, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    tasks = [task(model, out, Place(number, 2), pause=0.3) for number in range(2)]
    for process in tasks:
        process.join(120)
    assert [process.exitcode for process in tasks] == [0, 0]
    asked = [sum(map(int, out.with_suffix(f".{number}.log").read_text().split())) for number in range(2)]
    assert sum(asked) == RECORDS
    assert min(asked) > 0
    assert tree(out) == tree(expected)


def test_a_killed_task_goes_on_and_ends_the_same(expected: Path, model: CaptionModel, tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed = task(model, out, pause=0.4)
    wait_for((out / "parts" / "000001" / "part.json").exists)
    killed.kill()
    killed.join()
    assert not (out / INFO).exists()
    again = task(model, out, pause=0.01)
    again.join(120)
    assert again.exitcode == 0
    before, after = (RECORDS, sum(map(int, out.with_suffix(".0.log").read_text().split())))
    assert before <= after <= before + 4  # no picture but those of the block that was lost was asked twice
    assert tree(out) == tree(expected)


@pytest.mark.slow
def test_each_device_has_a_process_and_a_model(
    expected: Path, model: CaptionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "own_devices", lambda started: ["cpu", "cpu"])
    caption(work(model), tmp_path / "out", 1.0)
    assert tree(tmp_path / "out") == tree(expected)


def test_other_settings_are_not_mixed_into_unfinished_work(expected: Path, model: CaptionModel) -> None:
    with pytest.raises(ValueError, match=r"holds the result of something else \(captions .*'seed': 0.*'seed': 1"):
        caption(work(model, seed=1), expected, 1.0)


def test_what_is_drawn_does_not_depend_on_the_company(model: CaptionModel) -> None:
    captioner, source = model.load("cpu"), Shapes(6, text_only=False)
    assert isinstance(captioner, HFCaptioner)
    turns = [Record("a", "a", (source.record(index).messages[0],)) for index in range(6)]
    inputs = [captioner.inputs.one(turn) for turn in turns]
    sampling = [Sampling(12, 1.0, 0.9, seed) for seed in range(6)]
    together = captioner.write(captioner.inputs.join(inputs), sampling)
    alone = [captioner.write(captioner.inputs.join([one]), [own])[0] for one, own in zip(inputs, sampling, strict=True)]
    assert together == alone
    assert len({answer.text for answer in together}) > 3
    others = [replace(one, seed=(one.seed or 0) + 100) for one in sampling]
    assert captioner.write(captioner.inputs.join(inputs), others) != together


# ----- what is left out -----


def mixed(folder: Path, **more: str) -> Source:
    """Records with one picture, two, none, and one that is damaged."""
    shapes = Shapes(8, text_only=False)
    rows: list[dict[str, Any]] = []
    for index in range(8):
        (folder / f"{index}.png").write_bytes(shapes.record(index).images[0].data or b"")
        names = [f"{index}.png", f"{(index + 1) % 8}.png"] if index == 3 else [f"{index}.png"]
        question = [*({"type": "image", "image": name} for name in names), {"type": "text", "text": "?"}]
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": f"old {index}"}]
        rows.append({"id": f"r{index}", "messages": turns, **more})
    (folder / "5.png").write_bytes(b"no picture")
    rows.append({"id": "text", "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]})
    (folder / "mixed.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return ChatJsonl(str(folder / "mixed.jsonl"))


def test_what_cannot_be_captioned_is_listed_and_a_larger_share_finishes_at_once(
    model: CaptionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = work(model, mixed(tmp_path))
    with pytest.raises(TooManyBad, match=r"no_image 1.*more than --max-bad-share 0\.05"):
        caption(job, tmp_path / "out")
    monkeypatch.setattr(CaptionModel, "load", lambda *_: pytest.fail("all captions are there"))
    info = caption(job, tmp_path / "out", 0.9)
    left_out = listed(tmp_path / "out")
    assert left_out["text"] == "no_image"
    assert left_out["r5"] == "corrupt_image"
    assert info.bad["corrupt_image"] == 1
    kept = {record.id: record for record in map(Converted(str(tmp_path / "out")).record, range(info.records))}
    assert set(kept) | set(left_out) == {"r0", "r1", "r2", "r3/0", "r3/1", "r4", "r5", "r6", "r7", "text"}
    assert set(kept) & set(left_out) == set()
    assert all([turn.text for turn in record.earlier] == ["?", f"old {name[1]}"] for name, record in kept.items())
    assert all(len(record.images) == 1 for record in kept.values())


def test_captions_that_fail_a_check_are_counted_by_reason(model: CaptionModel, tmp_path: Path) -> None:
    job = work(model, max_tokens=2)
    info: SetInfo = caption(job, tmp_path / "cut", 0.99)
    assert info.bad["cut_caption"] > 0
    assert info.records + sum(info.bad.values()) == RECORDS
    job.checks = Checks(min_words=30)
    job.settings = SETTINGS
    with pytest.raises(TooManyBad, match=r"none of the 18 records can be used \(.*short_caption"):
        caption(job, tmp_path / "short", 1.0)


def test_a_set_without_pictures_is_refused_before_anything_is_loaded(
    model: CaptionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "texts.txt").write_text("one\ntwo\n")
    monkeypatch.setattr(CaptionModel, "load", lambda *_: pytest.fail("there is nothing to do"))
    with pytest.raises(ValueError, match="texts has 2 records and no picture in them"):
        caption(work(model, Texts(str(tmp_path / "texts.txt"))), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_tokens": 0}, "--max-tokens must be at least 1, not 0"),
        ({"batch_size": 0}, "--batch-size must be at least 1"),
        ({"temperature": -1.0}, "--temperature must be from 0 to 2"),
        ({"top_p": 0.0}, "--top-p above 0"),
        ({"prompts": ("<image> what?",)}, "the picture stands before it"),
        ({"prompts": (" ",)}, "it needs words"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SETTINGS, **changes)


# ----- models -----


def test_a_folder_that_is_no_such_model_is_told_in_one_line(model: CaptionModel, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="is a 'llama', which AutoModelForImageTextToText of transformers does not"):
        CaptionModel.of_transformers(str(folder), "float32")
    (folder / "config.json").write_text('{"model_type": "nothing"}')
    with pytest.raises(ValueError, match=r"^\S+: [^\n]*nothing[^\n]*$"):
        CaptionModel.of_transformers(str(folder), "float32")
    for file in Path(model.source).iterdir():
        if file.name.startswith("tokenizer"):
            (folder / file.name).write_bytes(file.read_bytes())
    (folder / "config.json").write_bytes((Path(model.source) / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"^\S+ has no processor of pictures and text|^the processor of"):
        CaptionModel.of_transformers(str(folder), "float32")
    for file in Path(model.source).iterdir():
        if file.name != "chat_template.jinja":
            (folder / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="has no chat template"):
        CaptionModel.of_transformers(str(folder), "float32")
    (folder / "chat_template.jinja").write_bytes((Path(model.source) / "chat_template.jinja").read_bytes())
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match=r"^the weights of \S+ cannot be read: [^\n]+$"):
        CaptionModel.of_transformers(str(folder), "float32").load("cpu")


def test_an_export_of_the_kit_needs_its_code_to_be_trusted(tmp_path: Path) -> None:
    exported(tmp_path / "model", "llava15")
    with pytest.raises(ValueError, match=r"code of its own, as exports of this kit do: --trust-remote-code runs it$"):
        CaptionModel.of_transformers(str(tmp_path / "model"), "float32")
    captioner = CaptionModel.of_transformers(str(tmp_path / "model"), "float32", trust=True).load("cpu")
    question = Record("a", "a", (Shapes(1).record(0).messages[0],))
    (answer,) = captioner.write(captioner.inputs.join([captioner.inputs.one(question)]), [Sampling(4)])
    assert answer.cut
    assert answer.text


def test_another_model_has_another_identity(model: CaptionModel, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in Path(model.source).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    moved = CaptionModel.of_transformers(str(folder), "float32")
    assert moved.identity() == model.identity()
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    assert moved.identity() != model.identity()
