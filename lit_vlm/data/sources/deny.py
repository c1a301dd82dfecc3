"""Deny-lists: addresses, and hashes of pictures, that no record may have."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import numpy as np
from numpy.typing import NDArray

SHA256 = re.compile(rb"[0-9A-Fa-f]{64}")
ADDRESS = re.compile(rb"[A-Za-z][A-Za-z0-9+.-]*://\S+")
WIDTH = 16
"""Bytes of a digest that are kept: two of 10⁹ others agree with a probability of 10⁻²¹."""


class DenyList:
    """A text file with an address, or the SHA-256 of a picture's file in 64 hex digits, on each line.

    Blank lines and those that begin with `#` are passed over. Addresses are compared without their fragment, and
    without regard to the case of scheme and host (RFC 3986, section 6.2.2.1).

    Args:
        path: the file.

    Attributes:
        has_hashes: whether any line is a hash, so that pictures have to be hashed.
        has_addresses: whether any line is an address.

    Raises:
        ValueError: for a file that is not there, and for a line that is neither; names file and line.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path).expanduser()
        if not self.path.is_file():
            raise ValueError(f"there is no deny-list {self.path}")
        hashes, addresses = [], []
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                text = line.removeprefix(b"\xef\xbb\xbf").strip()
                if SHA256.fullmatch(text):
                    hashes.append(bytes.fromhex(text.decode())[:WIDTH])
                elif ADDRESS.fullmatch(text):
                    addresses.append(_address_key(text.decode("utf-8", "surrogateescape")))
                elif text and not text.startswith(b"#"):
                    shown = text[:80].decode("utf-8", "replace")
                    raise ValueError(
                        f"{self.path}, line {number}: {shown!r} is neither an address (https://...) nor the SHA-256 of "
                        "a picture (64 hex digits)"
                    )
        self._hashes, self._addresses = _sorted(hashes), _sorted(addresses)
        self.has_hashes, self.has_addresses = bool(hashes), bool(addresses)

    def has_hash(self, digest: bytes) -> bool:
        """Whether the SHA-256 of a picture is listed."""
        return _contains(self._hashes, digest[:WIDTH])

    def has_address(self, url: str) -> bool:
        """Whether an address is listed."""
        return _contains(self._addresses, _address_key(url))

    def fingerprint(self) -> str:
        """A hash of all entries, whatever their order."""
        both = hashlib.sha256(self._hashes.tobytes())
        both.update(b" " + self._addresses.tobytes())
        return both.hexdigest()[:16]


def _address_key(url: str) -> bytes:
    try:
        parts = urlsplit(url)
        url = urlunsplit(parts._replace(netloc=parts.netloc.lower(), fragment=""))
    except ValueError:  # such as a bracket in the host; then it is compared as it stands
        pass
    return hashlib.blake2b(url.encode("utf-8", "surrogateescape"), digest_size=WIDTH).digest()


def _sorted(digests: Sequence[bytes]) -> NDArray[np.uint64]:
    """Different digests as pairs of numbers, sorted: `[n, 2]`; a set of objects is copied into each loader worker."""
    table = np.frombuffer(b"".join(digests), ">u8").astype(np.uint64).reshape(-1, 2)
    table = table[np.lexsort((table[:, 1], table[:, 0]))]
    repeated = (table[1:] == table[:-1]).all(axis=1)
    return np.delete(table, np.flatnonzero(repeated) + 1, axis=0)


def _contains(table: NDArray[np.uint64], digest: bytes) -> bool:
    high, low = np.frombuffer(digest, ">u8").astype(np.uint64)
    start, end = (int(np.searchsorted(table[:, 0], high, side)) for side in ("left", "right"))
    return bool((table[start:end, 1] == low).any())
