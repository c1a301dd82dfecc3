"""The page of `lit-vlm chat --web`: by HTTP, and in a browser."""

from __future__ import annotations

import base64
import io
import json
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PILImage

from lit_vlm.commands.cli import main
from lit_vlm.data.records import Image, Message, Record, Text
from lit_vlm.evaluation.asker import load_run
from tests.runs import one_step
from tests.served import serving, uri

pytest.importorskip("lit_vlm.serving.endpoint")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return one_step(tmp_path_factory.mktemp("page") / "run", "llava15", "2_sft")


@pytest.fixture(scope="module")
def address(run: Path) -> Iterator[str]:
    """A page with two runs side by side."""
    shutil.copytree(run, run.parent / "other")
    flags = ["--web", "--device", "cpu", "--max-new-tokens", "8", "--quantise", "int8"]
    with serving(run.parent, "chat", "run", "other", *flags) as (_, found):
        yield found


def question(text: str) -> dict[str, Any]:
    content = [{"type": "image_url", "image_url": {"url": uri()}}, {"type": "text", "text": text}]
    return {"model": "run", "messages": [{"role": "user", "content": content}]}


def post(address: str, asked: dict[str, Any]) -> Any:
    request = urllib.request.Request(address, json.dumps(asked).encode(), {"Content-Type": "application/json"})
    return json.loads(urllib.request.urlopen(request, timeout=120).read())


@pytest.mark.slow
def test_the_page_loads_nothing_from_elsewhere(address: str) -> None:
    answer = urllib.request.urlopen(f"{address}/chat?temperature=0.5")
    text = answer.read().decode()
    assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'")
    assert "http" not in text.replace("http-equiv", "")
    models = json.loads(urllib.request.urlopen(f"{address}/v1/models").read())["data"]
    assert [model["id"] for model in models] == ["run", "other"]


@pytest.mark.slow
def test_a_name_that_is_made_to_lead_here_gets_no_answer(address: str) -> None:
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(urllib.request.Request(f"{address}/chat", headers={"Host": "evil.example"}))


@pytest.mark.slow
def test_answers_are_those_of_the_model_in_fewer_bits(address: str, run: Path) -> None:
    content = (Image(data=base64.b64decode(uri().partition(",")[2])), Text("What is this?"))
    asker = load_run(run, quantise="int8")
    (expected,) = asker.answer(asker.encode([Record("0", "asked", (Message("user", content),))]), 8)
    found = post(f"{address}/v1/chat/completions", question("What is this?") | {"max_tokens": 8})
    assert found["choices"][0]["message"]["content"] == expected


@pytest.mark.slow
def test_what_the_model_sees_is_shown(address: str, run: Path) -> None:
    seen = post(f"{address}/v1/seen", question("What is <image> this?"))
    content = (Image(data=base64.b64decode(uri().partition(",")[2])), Text("What is <image> this?"))
    (sample,) = load_run(run).encode([Record("0", "asked", (Message("user", content),))])
    place = seen["prompt"].index({"picture": 0})
    assert "".join(piece["text"] for piece in seen["prompt"][place + 1 :]).startswith("What is <image> this?")
    (picture,) = seen["pictures"]
    shown = PILImage.open(io.BytesIO(base64.b64decode(picture["png"].partition(",")[2])))
    assert np.array_equal(np.asarray(shown), sample.images[0].permute(1, 2, 0).numpy())
    assert (picture["width"], picture["height"]) == shown.size
    assert (picture["tokens"], seen["positions"]) == (sample.grids[0].num_tokens, len(sample))
    with pytest.raises(urllib.error.HTTPError) as refused:
        post(f"{address}/v1/seen", question("word " * 3000))
    assert "too_long" in json.loads(refused.value.read())["error"]["message"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["run", "other"], "several checkpoints are asked side by side on a page: add --web"),
        (["run", "--port", "8001"], "--port is that of a page: add --web"),
        (["run", "--web", "--prompt", "Name it."], "--prompt is for a terminal: with --web, the page asks for it"),
        (["run", "run", "--web"], "a checkpoint is named twice"),
        (["run", "--web", "--temperature", "5"], "with --web, --temperature must be from 0 to 2 and --top-p above 0"),
        (["run", "--web", "--port", "80"], "--port must be from 1024 to 65535, not 80"),
    ],
)
def test_flags_that_make_no_sense_are_refused(
    flags: list[str], message: str, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(run.parent)
    with pytest.raises(SystemExit):
        main(["chat", *flags])
    assert message in capsys.readouterr().err


@pytest.mark.browser
def test_in_a_browser(address: str, tmp_path: Path) -> None:
    """Pictures, answers side by side, a second turn, a demonstration, a refusal, and a new conversation."""
    from playwright.sync_api import sync_playwright

    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert browser, "no Chromium is installed"
    PILImage.new("RGB", (30, 20), "red").save(tmp_path / "red.png")
    with sync_playwright() as started:
        page = started.chromium.launch(executable_path=browser, args=["--no-sandbox"]).new_page()
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(f"{address}/chat?max_tokens=8&newline=1")
        page.set_input_files("#files", tmp_path / "red.png")
        page.wait_for_selector("#waiting img")
        page.fill("#question", "What is this?")
        page.click("#seen")
        page.wait_for_selector(".seen figcaption")
        assert page.locator(".seen pre").count() == 2
        shown = page.locator(".seen pre").first
        assert "picture 1:" in shown.locator(".place").inner_text()
        assert "What is this?" in shown.inner_text()
        page.click("#ask")
        page.wait_for_selector("#ask:not([disabled])")
        assert page.locator(".user img").count() == 2
        answers = page.locator(".turn:last-child .answer").all_inner_texts()
        assert len(answers) == 2
        assert answers[0] == answers[1]  # the two are copies
        page.fill("#question", "Two and two?")
        page.fill("#answer", "Four.")
        page.click("#demonstrate")
        assert "Four." in page.locator(".turn:last-child .answer").first.inner_text()
        page.fill("#question", "word " * 3000)
        page.click("#ask")
        page.wait_for_selector(".error")
        assert "too_long" in page.locator(".error").first.inner_text()
        page.click("#fresh")
        assert page.locator(".turn").count() == 0
        assert problems == []
