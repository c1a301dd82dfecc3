"""Files of hub models: asked for once, whoever asks at the same time, over a hub on loopback that counts."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lit_vlm.core.fetch import _wanted, fetched, hub_files
from lit_vlm.core.pretrained import find_weights
from lit_vlm.core.tokenizers import load_tokenizer
from lit_vlm.decoders import HFDecoder
from tests.tiny import ROOT

NAME = "some/model"
SHA = "0123456789abcdef0123456789abcdef01234567"
TOKENIZER = ROOT / "tests" / "fixtures" / "tiny_llama"


class Hub(ThreadingHTTPServer):
    """A hub with one model, another that is gated, and a list of what it was asked."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.files = files
        self.asked: list[str] = []
        self.pause = 0.0

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Answer(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        return

    def do_HEAD(self) -> None:
        self._answer(False)

    def do_GET(self) -> None:
        self._answer(True)

    def _answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        if path != "/api/agent-harnesses":  # of which the client asks, whatever it is used for
            self.server.asked.append(f"{self.command} {path}")
        time.sleep(self.server.pause)
        if path.startswith("/api/models/some/gated"):
            self._send(403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "no"})
        elif not path.removeprefix("/api/models").startswith(f"/{NAME}/"):
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "no"})
        elif path.startswith(f"/api/models/{NAME}/tree/"):
            listed = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in self.server.files.items()
            ]
            self._send(200, json.dumps(listed).encode())
        elif path.startswith("/api/"):
            siblings = [{"rfilename": name} for name in self.server.files]
            self._send(200, json.dumps({"id": NAME, "sha": SHA, "siblings": siblings}).encode())
        else:
            content = self.server.files[path.partition(f"/resolve/{SHA}/")[2]]
            tag = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": SHA}
            self._send(200, content, tag, body)

    def _send(self, code: int, content: bytes, headers: dict[str, str] | None = None, body: bool = True) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    config = AutoConfig.for_model(
        "llama", hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=400
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "published")
    files = {file.name: file.read_bytes() for place in (tmp_path / "published", TOKENIZER) for file in place.iterdir()}
    files["pytorch_model.bin"] = b"the same again"
    files["onnx/model.onnx"] = b"and again"
    server = Hub(files)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


CODE = """
import sys
from lit_vlm.core import cache
from lit_vlm.core.fetch import fetched
cache.SILENT = 0.1  # the fetch of the tests is over before a user would be told to wait
try:
    print(sorted(file.name for file in fetched(sys.argv[1], sys.argv[2] == "weights").iterdir()))
except ValueError as error:
    sys.exit(str(error))
"""


def ask(hub: Hub, cache: Path, name: str, *kinds: str, **variables: str) -> list[tuple[str, str]]:
    """What processes that ask at once print, and their errors."""
    outer = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "HF_"))}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CODE, name, kind],
            env=outer
            | {"HF_ENDPOINT": hub.address, "HF_HOME": str(cache), "RANK": str(rank), "WORLD_SIZE": str(len(kinds))}
            | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
            | variables,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, kind in enumerate(kinds)
    ]
    return [process.communicate(timeout=120) for process in processes]


def test_of_four_processes_one_fetches_each_file_once(hub: Hub, tmp_path: Path) -> None:
    hub.pause = 0.3
    # As under FSDP2: the first rank wants the weights, the others build without.
    said = ask(hub, tmp_path / "hf", NAME, "weights", "settings", "settings", "settings")
    assert all("config.json" in words for words, _ in said), said
    assert "'model.safetensors'" in said[0][0]
    assert sum("waiting for another process, which fetches some/model" in errors for _, errors in said) >= 2
    counts = Counter(hub.asked)
    bodies = {
        path.rpartition("/")[2]: count for path, count in counts.items() if path.startswith("GET /some/model/res")
    }
    assert bodies == dict.fromkeys(
        {name for name in hub.files if "." in name} - {"pytorch_model.bin", "onnx/model.onnx"}, 1
    )
    # Weights and settings are two questions; each was asked by one process.
    assert max(counts.values()) <= 3, counts
    hub.asked.clear()
    said = ask(hub, tmp_path / "hf", NAME, "weights", "weights", HF_HUB_OFFLINE="1")
    assert all("'model.safetensors'" in words for words, _ in said), said
    assert hub.asked == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("some/typo", "some/typo cannot be fetched from the hub: http://127.0.0.1"),
        ("some/gated", "some/gated cannot be fetched from the hub: its authors want an agreement first"),
    ],
)
def test_an_error_is_told_by_all_and_asked_for_once(name: str, expected: str, hub: Hub, tmp_path: Path) -> None:
    hub.pause = 0.3
    said = ask(hub, tmp_path / "hf", name, "weights", "weights", "weights")
    assert [errors.splitlines()[-1].startswith(expected) for _, errors in said] == [True] * 3, said
    assert len(hub.asked) == 1, hub.asked


def test_without_a_network_the_cache_or_one_line(near: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fetched(NAME, True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    near.asked.clear()
    assert fetched(NAME, True) == folder
    (folder / "model.safetensors").unlink()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)

    def refused(name: str) -> list[str]:
        raise OSError("Connection refused\nand much more")

    monkeypatch.setattr("lit_vlm.core.fetch._listed", refused)
    monkeypatch.setattr("lit_vlm.core.fetch._noted", lambda note: None)
    assert fetched(NAME, False) == folder
    with pytest.raises(ValueError, match="^the weights of some/model cannot be fetched .*: Connection refused$"):
        fetched(NAME, True)
    with pytest.raises(ValueError, match="^a/b cannot be fetched from the hub: Connection refused"):
        fetched("a/b", True)
    assert near.asked == []


def test_offline_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="some/model cannot be fetched from the hub: HF_HUB_OFFLINE is set"):
        fetched(NAME, True)


@pytest.fixture
def near(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The hub as that of this process."""
    for name, value in {"ENDPOINT": hub.address, "HF_HUB_CACHE": str(tmp_path / "hf"), "HF_HUB_OFFLINE": False}.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    template = f"{hub.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", hub.address)
    return hub


def test_a_decoder_reads_what_was_fetched(near: Hub) -> None:
    find_weights(NAME)
    decoder = HFDecoder(NAME)
    state = decoder.pretrained_state()
    assert state is not None
    assert torch.isfinite(state["lm.lm_head.weight"]).all()
    tokenizer = load_tokenizer(NAME)
    assert tokenizer.name_or_path == NAME  # what caches of lengths are named by is alike on all machines
    asked = list(near.asked)
    HFDecoder(NAME).pretrained_state()
    assert near.asked == asked  # the hub is asked once in the life of a process
    assert "pytorch_model.bin" not in " ".join(asked)


def test_a_gone_folder_is_fetched_again_and_a_read_only_cache_is_read(
    near: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fetched(NAME, False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "other"))
    assert fetched(NAME, False) != folder
    monkeypatch.setattr(os, "access", lambda *_: False)
    near.asked.clear()
    assert fetched(NAME, False).is_dir()
    assert near.asked  # without a lock each asks
    assert hub_files(NAME)


def test_an_own_error_is_asked_for_again(near: Hub) -> None:
    for count in (1, 2):
        with pytest.raises(ValueError, match="some/typo cannot be fetched from the hub: .* has no such name"):
            fetched("some/typo", False)
        assert len(near.asked) == count


def test_weights_in_one_form_and_of_the_named_folders_are_wanted() -> None:
    files = [
        "config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors", "tokenizer.model",
        "model-00002-of-00002.safetensors", "model.fp16.safetensors", "pytorch_model-00001-of-00002.bin", "README.md",
        "vae/config.json", "vae/diffusion.safetensors", "vae/diffusion.fp16.safetensors", "old/pytorch_model.bin",
    ]  # fmt: skip
    settings = ["config.json", "model.safetensors.index.json", "tokenizer.model"]
    assert _wanted(files, False, [""]) == settings
    assert _wanted(files, True, [""]) == [*settings, *files[2:5:2]]
    assert _wanted(files, True, ["vae"]) == files[8:11]
    assert _wanted(files, True, ["old", "none"]) == files[11:]
