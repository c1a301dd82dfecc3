"""Files of the web, by plain HTTP."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from urllib.parse import quote
from uuid import uuid4

import requests

from lit_vlm.data.remote.store import PIECE, TIMEOUT, Changed, Entry, Interrupted, Listing, Store

BUSY = (408, 425, 429, 500, 502, 503, 504)
"""Answers of servers that may have another one soon."""


class Web(Store):
    """One file of the web: a server has no list of the files below an address."""

    def listing(self) -> Listing:
        """The file at the address.

        Raises:
            ValueError: where there is none, or none that may be read.
            Interrupted: where asking again may help.
        """
        if not self.address.path:
            raise ValueError(f"{self.address} names no file: https:// reads single files, whose names stand at the end")
        with get(self._url(self.address.path), {}, self.address) as answer:
            tag = tag_of(answer)
            # What no server tells from a later version is fetched anew by every run.
            return Listing("", (Entry(self.address.path, _length(answer), tag, "" if tag else f"once:{uuid4().hex}"),))

    def stream(self, entry: Entry, start: int) -> Iterator[bytes]:
        """Yield the content of a file from a byte on; see `Store.stream`."""
        yield from stream(self._url(entry.path), {}, entry.tag, start, self.address)

    def _url(self, path: str) -> str:
        return f"{self.address.place}/{quote(path)}{f'?{self.address.query}' if self.address.query else ''}"


def stream(url: str, headers: Mapping[str, str], tag: str, start: int, shown: object) -> Iterator[bytes]:
    """Yield the content of a file from a byte on.

    Args:
        url: where it is.
        headers: sent along, for those who must log in.
        tag: the version that is wanted, as `tag_of` says it; "" takes any.
        start: the first byte.
        shown: what the file is called in errors.

    Raises:
        ValueError: where it may not be read.
        Changed: where it has another tag.
        Interrupted: where asking again may help.
    """
    with get(url, {**headers, **({"Range": f"bytes={start}-"} if start else {})}, shown) as answer:
        if answer.status_code == 416 or (tag and (tag_of(answer) or tag) != tag):
            raise Changed(f"{shown} has changed")
        skip = start if answer.status_code == 200 else 0  # a server that knows no ranges sends all of it
        found = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range", ""))
        if answer.status_code == 206 and (found is None or int(found[1]) != start):
            raise ValueError(f"{shown}: the server sent another part of the file than was asked for")
        for piece in answer.iter_content(PIECE):
            yield piece[skip:]
            skip = max(0, skip - len(piece))


class Absent(ValueError):
    """The server has no such file."""


class Refused(ValueError):
    """The server does not give the file to whoever asks."""


@contextmanager
def get(url: str, headers: Mapping[str, str], shown: object) -> Iterator[requests.Response]:
    """A running answer, as a context manager; errors of the connection become the kit's, inside the context too.

    Args:
        url: what is asked for.
        headers: sent along.
        shown: what the file is called in errors.

    Raises:
        ValueError: where there is no such file, or none that may be read.
        Interrupted: where asking again may help.
    """
    try:
        with requests.get(
            url, headers={"Accept-Encoding": "identity", **headers}, stream=True, timeout=TIMEOUT
        ) as answer:
            _check(answer, shown)
            yield answer
    except (requests.exceptions.MissingSchema, requests.exceptions.InvalidURL) as error:
        raise ValueError(f"{shown} is no address: {error}") from error
    except requests.RequestException as error:
        raise Interrupted(reason(error)) from error


def _check(answer: requests.Response, shown: object) -> None:
    code = answer.status_code
    if code in (401, 403):
        raise Refused(f"{shown}: the server does not give it without a login (status {code})")
    if code in (404, 410):
        raise Absent(f"there is no {shown} (status {code})")
    if code in BUSY:
        raise Interrupted(f"the server answers with status {code}")
    if code not in (200, 206, 416):
        raise ValueError(f"{shown}: the server answers with status {code}")


def tag_of(answer: requests.Response) -> str:
    """What tells versions of a file apart: its ETag, or when it was changed; "" where the server says neither."""
    return str(answer.headers.get("ETag") or answer.headers.get("Last-Modified") or "")


def _length(answer: requests.Response) -> int:
    return int(answer.headers.get("Content-Length", -1))


def reason(error: Exception) -> str:
    """Why a request failed, in a few words: the innermost reason that libraries of the network have wrapped."""
    text = str(error)
    if known := re.search(
        r"Name or service not known|Temporary failure in name resolution|nodename nor servname", text
    ):
        return f"its host has no address in the network ({known[0]})"
    if known := re.search(
        r"Connection refused|Connection reset by peer|timed out|IncompleteRead|certificate \w+", text
    ):
        return known[0]
    return next(iter(text.strip().splitlines()), repr(error))[:200]
