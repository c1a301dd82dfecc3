"""Places on loopback: data sets as the hub serves them, files of a web server, and what stands in front of a bucket."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar
from urllib.parse import unquote

import pytest
import requests

TOKEN = "hf_right"

Answer = tuple[int, dict[str, str], bytes]


class Server(ThreadingHTTPServer):
    """Answers GET and HEAD, with faults that are told beforehand.

    Attributes:
        faults: end of a path → what befalls the next requests for it: the number of bytes after which the connection is
            cut, or None for status 503.
        asked: method, path and range of each request.
        ranges: whether ranges are known.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.faults: dict[str, list[int | None]] = defaultdict(list)
        self.asked: list[tuple[str, str, str | None]] = []
        self.ranges = True

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def answer(self, method: str, path: str, headers: dict[str, str]) -> Answer:
        raise NotImplementedError

    def bodies(self) -> list[tuple[str, str | None]]:
        """Paths and ranges of what was read."""
        return [(path, span) for method, path, span in self.asked if method == "GET"]


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self._do("HEAD")

    def do_GET(self) -> None:
        self._do("GET")

    def _do(self, method: str) -> None:
        self.server.asked.append((method, unquote(self.path), self.headers.get("Range")))
        fault: int | None = -1
        for end, faults in self.server.faults.items():
            if method == "GET" and unquote(self.path).partition("?")[0].endswith(end) and faults:
                fault = faults.pop(0)
        if fault is None:
            status, headers, body = 503, {}, b"busy"
        else:
            status, headers, body = self.server.answer(
                method, self.path, {k.title(): v for k, v in self.headers.items()}
            )
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if method == "GET":
            self.wfile.write(body if fault in (-1, None) else body[:fault])


def ranged(server: Server, content: bytes, headers: dict[str, str], more: dict[str, str]) -> Answer:
    """The answer for a file, or for a range of it."""
    found = re.fullmatch(r"bytes=(\d+)-(\d*)", headers.get("Range", ""))
    if found is None or not server.ranges:
        return 200, more, content
    start, end = int(found[1]), int(found[2] or len(content) - 1) + 1
    span = {"Content-Range": f"bytes {start}-{min(end, len(content)) - 1}/{len(content)}"}
    return 206, {**more, **span}, content[start:end]


class Web(Server):
    """Files with tags: path → content."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__()
        self.files = files

    def answer(self, method: str, path: str, headers: dict[str, str]) -> Answer:
        content = self.files.get(unquote(path).partition("?")[0].lstrip("/"))
        if content is None:
            return 404, {}, b""
        return ranged(self, content, headers, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"'})


class DataHub(Server):
    """The hub's API of files, for data sets.

    Attributes:
        sets: name → the files at each of its commits; the last one is `main`.
        gated: names that need `TOKEN`.
        wrong: paths whose checksum is told wrong.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sets: dict[str, list[dict[str, bytes]]] = {}
        self.gated: set[str] = set()
        self.wrong: set[str] = set()

    def commit(self, name: str, files: dict[str, bytes]) -> str:
        """Publish a further commit; returns its id."""
        self.sets.setdefault(name, []).append(files)
        return self.sha(name, len(self.sets[name]) - 1)

    def sha(self, name: str, number: int) -> str:
        return hashlib.sha1(f"{name} {number}".encode()).hexdigest()

    def answer(self, method: str, path: str, headers: dict[str, str]) -> Answer:
        path = unquote(path).partition("?")[0]
        found = re.fullmatch(r"/(?:api/)?datasets/([^/]+/[^/]+)(?:/(revision|tree|resolve)/([^/]+)(?:/(.*))?)?", path)
        token = headers.get("Authorization")
        if token and token != f"Bearer {TOKEN}":
            return 401, {"X-Error-Message": "Invalid credentials in Authorization header"}, b"{}"
        if found is None or found[1] not in self.sets:
            return 404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "no"}, b"{}"
        name, what, revision, inside = found.groups()
        if name in self.gated and not token:
            return 401, {"X-Error-Code": "GatedRepo", "X-Error-Message": "no"}, b"{}"
        shas = [self.sha(name, number) for number in range(len(self.sets[name]))]
        named = {"main": shas[-1], None: shas[-1], **{sha: sha for sha in shas}}
        if revision not in named:
            return 404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "no"}, b"{}"
        sha = named[revision]
        files = self.sets[name][shas.index(sha)]
        if what == "resolve":
            if inside not in files:
                return 404, {"X-Error-Code": "EntryNotFound", "X-Error-Message": "no"}, b""
            return ranged(self, files[inside], headers, {"X-Repo-Commit": sha})
        if what == "tree":
            return 200, {}, json.dumps([self._entry(file, content) for file, content in files.items()]).encode()
        return 200, {}, json.dumps({"id": name, "sha": sha, "siblings": []}).encode()

    def _entry(self, path: str, content: bytes) -> dict[str, Any]:
        told = content + b"?" if path in self.wrong else content
        blob = hashlib.sha1(f"blob {len(content)}\0".encode() + told).hexdigest()
        entry = {"type": "file", "path": path, "size": len(content), "oid": blob}
        if path.endswith((".parquet", ".tar", ".png")):
            entry["lfs"] = {"oid": hashlib.sha256(told).hexdigest(), "size": len(content), "pointerSize": 130}
        return entry


class Before(Server):
    """Stands in front of another server, and passes on what is asked."""

    def __init__(self, upstream: str) -> None:
        super().__init__()
        self.upstream = upstream

    def answer(self, method: str, path: str, headers: dict[str, str]) -> Answer:
        found = requests.request(method, f"{self.upstream}{path}", headers=headers, timeout=30)
        more = {
            key: value for key, value in found.headers.items() if key.lower() not in ("connection", "server", "date")
        }
        return found.status_code, more, found.content


S = TypeVar("S", bound=Server)


@contextmanager
def running(server: S) -> Iterator[S]:
    """A server that answers."""
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def ask_this_hub(hub: DataHub, patch: pytest.MonkeyPatch) -> None:
    """Make a server the hub of this process, which has no token."""
    patch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
    template = f"{hub.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    patch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    patch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nowhere")
    patch.delenv("HF_TOKEN", raising=False)
