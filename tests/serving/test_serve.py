"""A real server, asked by the official client."""

from __future__ import annotations

import asyncio
import base64
import http.server
import json
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_vlm.core.precision import choose
from lit_vlm.core.sampling import Sampling
from lit_vlm.data.records import Message, Record, Text
from lit_vlm.evaluation.asker import load_run
from lit_vlm.serving.requests import Refused
from tests.runs import one_step
from tests.served import serving, uri

openai = pytest.importorskip("openai")
endpoint = pytest.importorskip("lit_vlm.serving.endpoint")


def pictured(text: str, *urls: str) -> list[Any]:
    parts: list[Any] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return one_step(tmp_path_factory.mktemp("served") / "run", "llava15", "2_sft")


class Pictures(http.server.BaseHTTPRequestHandler):
    """A web server with one picture and an address that leads elsewhere."""

    def do_GET(self) -> None:
        if self.path == "/moved.png":
            self.send_response(302)
            self.send_header("Location", "/red.png")
            self.end_headers()
            return
        self.send_response(200)
        self.end_headers()
        if self.path == "/drops.png":
            with suppress(OSError):  # until the other side has enough of it
                while True:
                    self.wfile.write(b"-")
                    time.sleep(0.05)
        self.wfile.write(base64.b64decode(uri().partition(",")[2]))

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def web() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pictures)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


def serve(run: Path, web: str) -> AbstractContextManager[tuple[subprocess.Popen[str], str]]:
    """A server of its own: its process and its address."""
    flags = ["--device", "cpu", "--max-new-tokens", "16", "--max-megabytes", "1", "--allow-url", web]
    return serving(run.parent, "serve", "run", *flags)


@pytest.fixture(scope="module")
def served(run: Path, web: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    with serve(run, web) as server:
        yield server


@pytest.fixture
def client(served: tuple[subprocess.Popen[str], str]) -> Any:
    return openai.OpenAI(base_url=f"{served[1]}/v1", api_key="none", max_retries=0, timeout=120)


@pytest.mark.slow
def test_answers_are_those_of_the_run(client: Any, run: Path) -> None:
    assert [model.id for model in client.models.list()] == ["run"]
    asker = load_run(run)
    (sample,) = asker.encode([Record("0", "asked", (Message("user", (Text("What is this?"),)),))])
    (expected,) = asker.answer([sample], 16)
    answer = client.chat.completions.create(model="run", messages=[{"role": "user", "content": "What is this?"}])
    assert answer.choices[0].message.content == expected
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.prompt_tokens == len(sample)
    assert answer.usage.total_tokens == len(sample) + answer.usage.completion_tokens


@pytest.mark.slow
def test_a_stream_has_the_same_text_in_pieces(client: Any) -> None:
    asked = {"model": "run", "messages": pictured("Name it.", uri(), uri("blue"))}
    whole = client.chat.completions.create(**asked)
    events = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    text = "".join(event.choices[0].delta.content or "" for event in events if event.choices)
    assert text == whole.choices[0].message.content
    assert [event.choices[0].finish_reason for event in events if event.choices][-1] == whole.choices[0].finish_reason
    assert events[-1].usage == whole.usage


@pytest.mark.slow
def test_32_clients_at_once_get_the_answers_that_each_gets_alone(client: Any) -> None:
    def ask(index: int) -> tuple[str, int]:
        colours = [uri(("red", "green", "blue", "white")[index % 4], (10 + index, 20))] * (index % 3)
        answer = client.chat.completions.create(
            model="run", messages=pictured(f"Thing {index}?" * (1 + index % 5), *colours), max_tokens=1 + index % 16
        )
        return answer.choices[0].message.content, answer.usage.completion_tokens

    alone = [ask(index) for index in range(32)]
    with ThreadPoolExecutor(32) as pool:
        together = list(pool.map(ask, range(32)))
    assert len({text for text, _ in alone}) > 4
    if choose("cpu", scaled=False).dtype == torch.float32:
        assert together == alone
    else:  # in bf16 rounding depends on the size of a batch, and random weights have near ties
        assert sum(a == b for a, b in zip(together, alone, strict=True)) >= 28
        assert all(a[1] > 0 for a in together)


@pytest.mark.slow
def test_two_workers_share_the_clients_and_say_what_one_does(client: Any, run: Path) -> None:
    def ask(index: int, client: Any) -> str:
        asked = pictured(f"Thing {index}?", uri("red", (10 + index, 20)))
        return client.chat.completions.create(model="run", messages=asked, max_tokens=8).choices[0].message.content

    with serving(run.parent, "serve", "run", "--batch-size", "1", "--device", "cpu", "--device", "cpu") as (
        process,
        address,
    ):
        assert process.stdout
        assert process.stdout.readline() == "ready on cpu\n"  # the second of them
        both = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120)
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(lambda index: ask(index, both), range(8)))
        process.terminate()
        rest = process.stdout.read()
        assert process.wait(timeout=60) == 0
        assert "Traceback" not in rest
    assert together == [ask(index, client) for index in range(8)]


@pytest.mark.slow
def test_clients_that_go_leave_the_server_as_it_was(client: Any, served: tuple[subprocess.Popen[str], str]) -> None:
    host, port = served[1].removeprefix("http://").split(":")
    body = json.dumps({"model": "run", "messages": pictured("What?", uri()), "stream": True}).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}"
    for sent in (body, body[: len(body) // 2]):
        for _ in range(8):
            with socket.create_connection((host, int(port))) as gone:
                gone.sendall(f"{head}\r\n\r\n".encode() + sent)
    answer = client.chat.completions.create(model="run", messages=pictured("And now?", uri()))
    assert answer.usage.completion_tokens


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "status", "message"),
    [
        ({"model": "other"}, 404, "there is no model 'other', only run"),
        ({"temperature": 3}, 400, "temperature: "),
        ({"messages": []}, 400, "messages: "),
        ({"messages": pictured("What?", "/etc/passwd")}, 400, "send the picture itself"),
        ({"messages": pictured("What?", "data:image/png;base64,AAAA")}, 400, "corrupt_image"),
        ({"messages": pictured("What? " * 5000)}, 400, "too_long"),
        ({"messages": pictured("What?", uri("white", (30000, 30000)))}, 400, "too_large"),
        ({"messages": pictured("What? " * 300_000)}, 413, "too large"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_cannot_be_answered_says_why(client: Any, changes: dict[str, Any], status: int, message: str) -> None:
    with pytest.raises(openai.APIStatusError) as refused:
        client.chat.completions.create(**{"model": "run", "messages": pictured("What?", uri()), **changes})
    assert refused.value.status_code == status
    assert message in refused.value.body["message"]


@pytest.mark.slow
def test_pictures_are_fetched_where_it_is_allowed(client: Any, web: str) -> None:
    sent = client.chat.completions.create(model="run", messages=pictured("What?", uri()))
    fetched = client.chat.completions.create(model="run", messages=pictured("What?", f"{web}red.png"))
    assert fetched.choices[0].message.content == sent.choices[0].message.content
    with pytest.raises(openai.BadRequestError, match="status 302"):
        client.chat.completions.create(model="run", messages=pictured("What?", f"{web}moved.png"))


@pytest.mark.slow
def test_sigterm_ends_it_without_a_traceback(run: Path, web: str) -> None:
    with serve(run, web) as (process, _):
        process.terminate()
        said, _ = process.communicate(timeout=60)
    assert "Traceback" not in said
    assert process.returncode == 0


def test_a_picture_that_comes_in_drops_is_given_up(web: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "FETCH_S", 0.5)
    with pytest.raises(Refused, match="drops.png takes over"):
        asyncio.run(endpoint._fetch(f"{web}drops.png"))


def test_rows_of_a_batch_are_answered_each_in_its_own_way(run: Path) -> None:
    asker = load_run(run)
    records = [Record("0", "asked", (Message("user", (Text(f"Thing {i}?" * (1 + i)),)),)) for i in range(3)]
    samples = asker.encode(records)
    alone = [asker.answer([sample], 3 + 4 * i)[0] for i, sample in enumerate(samples)]
    texts = [""] * 3
    ended: dict[int, tuple[str | None, int]] = {}
    settings = [Sampling(3 + 4 * i, temperature=0.0) for i in range(3)]
    for pieces in asker.stream(samples, settings):
        for row, piece in enumerate(pieces):
            assert (piece is None) == (row in ended)
            if piece is not None:
                texts[row] += piece.text
                if piece.ended:
                    ended[row] = (piece.ended, piece.num_tokens)
    assert texts == alone
    assert all(tokens == 3 + 4 * row for row, (why, tokens) in ended.items() if why == "length")
    assert len(ended) == 3
