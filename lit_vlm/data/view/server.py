"""The server of the page: it listens on this machine alone, answers GET alone, and changes nothing."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlsplit

from lit_vlm.data.records import RecordError
from lit_vlm.data.view.find import Found, draw, find, parse_query
from lit_vlm.data.view.left_out import LeftOuts
from lit_vlm.data.view.records import COUNTED, Records
from lit_vlm.data.view.shown import picture, seen, show_record

HOST = "127.0.0.1"
OWN_NAMES = ("127.0.0.1", "localhost")
"""Names by which a browser may call the server: a page elsewhere whose name is made to lead here gets no answers."""
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
PAGES = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.svg": ("page.svg", "image/svg+xml"),
}
JSON = "application/json; charset=utf-8"
MOST = 200
"""Most matches of an answer."""
SIDES = (16, 1024)
"""Least and most pixels of the longer side of a small copy of a picture."""

Given = Mapping[str, str]
"""The query of an address."""


class Answer(NamedTuple):
    """Content, type and status of an answer."""

    content: bytes
    kind: str = JSON
    status: HTTPStatus = HTTPStatus.OK


class Viewer:
    """What the page asks for, by path.

    Args:
        records: the records.
        left_out: what was left out of them.
        model: how records are written for the model, in words; "" without one.
    """

    def __init__(self, records: Records, left_out: LeftOuts, model: str = "") -> None:
        self.records, self.left_out, self.model = records, left_out, model
        self.paths: dict[str, Callable[[Given], Answer]] = {
            "/api/set": self._set,
            "/api/record": self._record,
            "/api/find": self._find,
            "/api/random": self._random,
            "/api/left_out": self._left_out,
            "/api/picture": self._picture,
            "/api/seen": self._seen,
        }

    def answer(self, path: str, given: Given) -> Answer:
        """The answer to a GET of a path; one with an error's status where there is none."""
        if path in PAGES:
            name, kind = PAGES[path]
            return Answer(files("lit_vlm.data.view").joinpath(name).read_bytes(), kind)
        if path not in self.paths:
            return _error(HTTPStatus.NOT_FOUND, "there is no such path")
        try:
            return self.paths[path](given)
        except RecordError as error:
            return _error(HTTPStatus.NOT_FOUND, str(error))
        except IndexError as error:
            return _error(HTTPStatus.NOT_FOUND, f"there is none of this number: {error}")
        except ValueError as error:
            return _error(HTTPStatus.BAD_REQUEST, str(error))
        except Exception as error:  # whatever a reader raises: the page says it, and goes on with other records
            return _error(HTTPStatus.INTERNAL_SERVER_ERROR, f"{type(error).__name__}: {error}")

    def _set(self, given: Given) -> Answer:
        records = self.records
        sources = [
            {
                "name": source.name,
                "kind": type(source).__name__,
                "records": len(source),
                "provenance": source.provenance.known(),
            }
            for source in records.sources
        ]
        counted = COUNTED if records.encode is not None else COUNTED[:2]
        return _json(
            {
                "records": len(records),
                "sources": sources,
                "measures": [*counted, *records.measures.names],
                "left_out": dict(self.left_out.reasons.most_common()),
                "model": self.model,
            }
        )

    def _record(self, given: Given) -> Answer:
        return _json(show_record(self.records, self._index(given)))

    def _find(self, given: Given) -> Answer:
        query = parse_query(given, self.records)
        limit = _number(given, "limit", 1, MOST, 50)
        backwards = given.get("backwards") == "1"
        start = _number(given, "start", -1, len(self.records), 0)
        return self._found(find(self.records, query, start, limit, backwards))

    def _random(self, given: Given) -> Answer:
        return self._found(draw(self.records, parse_query(given, self.records)))

    def _found(self, found: Found) -> Answer:
        return _json(
            {
                "matches": [asdict(match) for match in found.matches],
                "next": found.next,
                "reasons": sorted(self.records.reasons[1:]),
            }
        )

    def _left_out(self, given: Given) -> Answer:
        start = _number(given, "start", 0, len(self.left_out), 0)
        entries, after = self.left_out.find(given.get("reason", ""), given.get("text", ""), start, MOST)
        return _json({"entries": [entry._asdict() for entry in entries], "next": after})

    def _picture(self, given: Given) -> Answer:
        side = _number(given, "side", *SIDES, SIDES[1]) if "side" in given else None
        return Answer(*picture(self.records, self._index(given), _number(given, "number", 0, None, 0), side))

    def _seen(self, given: Given) -> Answer:
        sequence, number = (_number(given, key, 0, None, 0) for key in ("sequence", "number"))
        return Answer(*seen(self.records, self._index(given), sequence, number))

    def _index(self, given: Given) -> int:
        return _number(given, "index", 0, len(self.records) - 1, None)


def _number(given: Given, key: str, least: int, most: int | None, default: int | None) -> int:
    """A whole number of a query; raises ValueError for another one, or none where there is no default."""
    text = given.get(key, "" if default is None else str(default))
    found = int(text) if text.lstrip("-").isascii() and text.lstrip("-").isdigit() and len(text) < 12 else None
    if found is None or found < least or (most is not None and found > most):
        limits = f"from {least} to {most}" if most is not None else f"at least {least}"
        raise ValueError(f"{key} is a whole number {limits}, not {text[:40]!r}")
    return found


def _json(value: Any, status: HTTPStatus = HTTPStatus.OK) -> Answer:
    return Answer(json.dumps(_finite(value), allow_nan=False).encode(), JSON, status)


def _finite(value: Any) -> Any:
    """A value without numbers that JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list | tuple) else value


def _error(status: HTTPStatus, message: str) -> Answer:
    return _json({"error": message}, status)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, viewer: Viewer, port: int) -> None:
        self.viewer = viewer
        super().__init__((HOST, port), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Pass over browsers that have gone away."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    server_version = "lit-vlm"
    sys_version = ""
    timeout = 60

    def do_GET(self) -> None:
        """Answer the page's question."""
        if urlsplit(f"//{self.headers.get('Host', '')}").hostname not in OWN_NAMES:
            self._send(_error(HTTPStatus.FORBIDDEN, f"this page is called by one of {', '.join(OWN_NAMES)}"))
            return
        asked = urlsplit(self.path)
        self._send(self.server.viewer.answer(asked.path, dict(parse_qsl(asked.query, keep_blank_values=True))))

    def _send(self, answer: Answer) -> None:
        self.send_response(answer.status)
        for key, value in HEADERS.items():
            self.send_header(key, value)
        self.send_header("Content-Type", answer.kind)
        self.send_header("Content-Length", str(len(answer.content)))
        self.end_headers()
        self.wfile.write(answer.content)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is logged: a page asks for a hundred pictures at a time."""


def make_server(viewer: Viewer, port: int = 0) -> ThreadingHTTPServer:
    """A server for the page, on this machine alone; `serve_forever` lets it answer.

    Args:
        viewer: what it shows.
        port: that it listens on; 0 takes a free one, `server_port`.

    Raises:
        ValueError: for a port that cannot be used.
    """
    if port and not 1024 <= port <= 65535:
        raise ValueError(f"--port must be 0 or from 1024 to 65535, not {port}")
    try:
        return _Server(viewer, port)
    except OSError as error:
        raise ValueError(
            f"port {port} of {HOST} cannot be used: {error.strerror}; --port 0 takes a free one"
        ) from error
