"""A server of the kit as a process of its own, and pictures to send it."""

from __future__ import annotations

import base64
import io
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image as PILImage

from tests.runs import environment


def uri(colour: str = "red", size: tuple[int, int] = (30, 20)) -> str:
    """A picture of one colour as an address that holds it."""
    buffer = io.BytesIO()
    PILImage.new("RGB" if max(size) < 1000 else "1", size, colour).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


@contextmanager
def serving(folder: Path, *words: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run a command that serves, with a free port; its process and its address, once it answers.

    Args:
        folder: where it runs.
        words: those behind `lit-vlm`, without the port.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "lit_vlm", *words, "--port", str(port)],
        cwd=folder, env=environment(folder), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        assert process.stdout
        said: list[str] = []
        for line in process.stdout:
            said.append(line)
            if line.startswith("ready"):
                break
        assert said[-1:] == ["ready on cpu\n"], "".join(said)
        address = f"http://127.0.0.1:{port}"
        while True:
            try:
                urllib.request.urlopen(f"{address}/v1/models")
                break
            except urllib.error.URLError:
                time.sleep(0.1)
        yield process, address
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
