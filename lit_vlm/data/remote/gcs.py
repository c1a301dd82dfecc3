"""Buckets of Google Cloud Storage, by its JSON API: each object is read at the generation that was listed."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, urlencode

import requests

from lit_vlm.data.remote.store import TIMEOUT, Changed, Entry, Interrupted, Listing, Store
from lit_vlm.data.remote.web import BUSY, Absent, Refused, reason, stream

ADVICE = (
    "log in with `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS; both need "
    "pip install 'lit-vlm[gcs]'"
)
FIELDS = "nextPageToken,items(name,size,md5Hash,generation)"
SCOPE = "https://www.googleapis.com/auth/devstorage.read_only"


class Gcs(Store):
    """Objects below a key, with the credentials that Google's own tools find; without any, public ones."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._credentials: Any = None

    @property
    def home(self) -> str:
        """What tells this place from others: endpoint and bucket."""
        return f"{_server()} {self.address.place}"

    def listing(self) -> Listing:
        """The object at the key, or all below it.

        Raises:
            ValueError: where there is none, or none that may be read.
            Interrupted: where asking again may help.
        """
        key = self.address.path
        found: list[Entry] = []
        asked = {"prefix": key, "fields": FIELDS}
        while True:
            page = self._ask(asked)
            found += [_entry(one) for one in page.get("items", [])]
            if not page.get("nextPageToken"):
                break
            asked["pageToken"] = page["nextPageToken"]
        entries = [one for one in found if one.path == key] or [
            one for one in found if (not key or one.path.startswith(f"{key}/")) and not one.path.endswith("/")
        ]
        if not entries:
            raise ValueError(f"there is no {self.address}: no object has that key, and none lies below it")
        return Listing("", tuple(sorted(entries, key=lambda one: one.path)))

    def stream(self, entry: Entry, start: int) -> Iterator[bytes]:
        """Yield the content of an object from a byte on; see `Store.stream`."""
        query = urlencode({"alt": "media", "generation": entry.tag})
        url = f"{_server()}/download/storage/v1/b/{self.address.place}/o/{quote(entry.path, '')}?{query}"
        where = f"{self.address.root}/{entry.path}"
        try:
            yield from stream(url, self._headers(), "", start, where)
        except Absent as error:
            raise Changed(f"{where} has changed") from error
        except Refused as error:
            raise ValueError(f"{error}; {ADVICE}") from error

    def _ask(self, query: dict[str, str]) -> Any:
        """A page of the list of objects."""
        url = f"{_server()}/storage/v1/b/{self.address.place}/o"
        try:
            answer = requests.get(url, query, headers=self._headers(), timeout=TIMEOUT)
        except requests.RequestException as error:
            raise Interrupted(reason(error)) from error
        if answer.status_code in (400, 401, 403):
            raise ValueError(f"{self.address} may not be read (status {answer.status_code}): {ADVICE}")
        if answer.status_code == 404:
            raise ValueError(f"{self.address}: there is no bucket {self.address.place}")
        if answer.status_code in BUSY:
            raise Interrupted(f"the storage answers with status {answer.status_code}")
        if answer.status_code != 200:
            raise ValueError(f"{self.address}: the storage answers with status {answer.status_code}")
        return answer.json()

    def _headers(self) -> dict[str, str]:
        """What says who asks; nothing for a stand-in on another server, and where no credentials are found."""
        if os.environ.get("STORAGE_EMULATOR_HOST"):
            return {}
        try:
            import google.auth
            from google.auth.exceptions import DefaultCredentialsError, RefreshError, TransportError
            from google.auth.transport.requests import Request
        except ImportError:
            return {}
        try:
            if self._credentials is None:
                self._credentials = google.auth.default(scopes=[SCOPE])[0]
            if not self._credentials.valid:
                self._credentials.refresh(Request())
        except DefaultCredentialsError:
            return {}
        except TransportError as error:
            raise Interrupted(reason(error)) from error
        except RefreshError as error:
            raise ValueError(f"{self.address}: the login has expired ({reason(error)}): {ADVICE}") from error
        return {"Authorization": f"Bearer {self._credentials.token}"}


def _server() -> str:
    """The server to ask; a stand-in is known to all of Google's clients by the same variable."""
    given = os.environ.get("STORAGE_EMULATOR_HOST", "https://storage.googleapis.com").rstrip("/")
    return given if "://" in given else f"http://{given}"


def _entry(found: dict[str, str]) -> Entry:
    # Objects that were composed of others have no such checksum.
    checksum = f"md5:{base64.b64decode(found['md5Hash']).hex()}" if "md5Hash" in found else ""
    return Entry(found["name"], int(found["size"]), found["generation"], checksum)
