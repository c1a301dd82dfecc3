"""Exported models behind transformers' own server."""

from __future__ import annotations

import base64
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from lit_vlm.checkpoints.published import export_published
from lit_vlm.data.records import Image, Message, Record, Text
from lit_vlm.evaluation.asker import Asker
from tests.exports import read
from tests.runs import environment
from tests.served import uri

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")


@pytest.mark.slow
def test_transformers_serve_answers_as_the_kit(tmp_path: Path) -> None:
    module, _, written = read("llava15")
    export_published("llava-hf", module.vlm, tmp_path / "out", written)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["serve", str(tmp_path / "out"), "--device", "cpu", "--dtype", "float32", "--port", str(port)]
    code = "from transformers.cli.transformers import main; main()"
    server = subprocess.Popen(
        [sys.executable, "-c", code, *words], cwd=tmp_path, env=environment(tmp_path), start_new_session=True
    )
    try:
        while True:
            assert server.poll() is None
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health")
                break
            except urllib.error.URLError:
                time.sleep(0.3)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=120)
        picture = {"type": "image_url", "image_url": {"url": uri()}}
        messages = [{"role": "user", "content": [picture, {"type": "text", "text": "What is this?"}]}]
        answer = client.chat.completions.create(
            model=str(tmp_path / "out"), messages=messages, max_tokens=12, temperature=0
        )
    finally:
        os.killpg(server.pid, signal.SIGKILL)
    shown = (Image(data=base64.b64decode(uri().partition(",")[2])), Text("What is this?"))
    asker = Asker(module, written)
    (expected,) = asker.answer(asker.encode([Record("0", "asked", (Message("user", shown),))]), 12)
    assert answer.choices[0].message.content == expected
