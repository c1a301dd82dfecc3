"""A model hub on loopback: the few calls that an upload makes."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_right"


class Hub(ThreadingHTTPServer):
    """Takes models from whoever has `TOKEN`.

    Attributes:
        models: name → path → content.
        private: names of models that were made private.
        full: whether uploads are refused.
    """

    def __init__(self) -> None:
        self.models: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.full = False
        super().__init__(("127.0.0.1", 0), _Calls)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Calls(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        name = self.path.removeprefix("/api/models/")
        if self.path == "/api/whoami-v2":
            if self.headers.get("Authorization") == f"Bearer {TOKEN}":
                return self._answer({"type": "user", "name": "me", "orgs": []})
            return self._answer({"error": "Invalid username or password."}, 401)
        if name in self.server.models:
            return self._answer({"id": name, "sha": "0"})
        return self._answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            self.server.models.setdefault(name, {})
            if asked.get("private") or asked.get("visibility") == "private":  # by version of the client
                self.server.private.add(name)
            return self._answer({"url": f"{self.server.address}/{name}"})
        if self.path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        name = "/".join(self.path.removeprefix("/api/models/").split("/")[:2])
        if "/preupload/" in self.path:
            files = [
                {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                for one in json.loads(body)["files"]
            ]
            return self._answer({"files": files})
        if self.server.full:
            return self._answer({"error": "storage quota exceeded"}, 403)
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                self.server.models[name][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        return self._answer({"commitUrl": f"{self.server.address}/{name}/commit/1", "commitOid": "1"})

    def _answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        for key, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            **(headers or {}),
        }.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@contextmanager
def hub() -> Iterator[Hub]:
    """A running hub."""
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
