"""Addresses of data: `hf://datasets/ORG/NAME`, `s3://`, `gs://` and `https://`."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from urllib.parse import quote, unquote, urlsplit

SCHEME = re.compile(r"([a-z][a-z0-9+.-]+)://", re.IGNORECASE)
SCHEMES = ("hf", "s3", "gs", "gcs", "https", "http")
KNOWN = "hf://datasets/ORG/NAME, s3://BUCKET/PATH, gs://BUCKET/PATH and https://HOST/FILE"
HUB_FORM = "hf://datasets/ORG/NAME[@REVISION], then /PATH of a file or folder, or #CONFIG or #CONFIG/SPLIT"
PART = r"[\w.-]+"
HUB = re.compile(rf"datasets/({PART}/{PART})(?:@([^/#]+))?((?:/[^#]*)?)(?:#([^/]+)(?:/(.+))?)?")


@dataclass(frozen=True)
class Address:
    """Where files lie that are not on this machine.

    Attributes:
        scheme: `hf`, `s3`, `gs`, `https` or `http`.
        place: name of the data set, the bucket, or the host with its scheme.
        path: file or folder in the place, without slashes around it; "" is all of it.
        revision: branch, tag or commit of a data set of the hub; None is its main branch.
        config: the configuration of a data set of the hub that is meant; None where the path says what is meant, or
            where there is one only.
        split: its split.
        query: what stands behind `?` in an address of the web.
    """

    scheme: str
    place: str
    path: str
    revision: str | None = None
    config: str | None = None
    split: str | None = None
    query: str = ""

    def __str__(self) -> str:
        """The address without its query, which may hold a secret."""
        if self.scheme in ("https", "http"):
            return f"{self.place}/{self.path}"
        if self.scheme != "hf":
            return f"{self.scheme}://{self.place}/{self.path}"
        part = "".join([f"#{self.config}" if self.config else "", f"/{self.split}" if self.split else ""])
        return f"{self.root}{f'/{self.path}' if self.path else ''}{part}"

    @property
    def root(self) -> str:
        """The data set with its revision, or the bucket or host."""
        if self.scheme in ("https", "http"):
            return self.place
        if self.scheme != "hf":
            return f"{self.scheme}://{self.place}"
        return f"hf://datasets/{self.place}" + (f"@{quote(self.revision, '')}" if self.revision else "")

    @property
    def name(self) -> str:
        """A name for the data: of the file or folder without its ending, or of the data set with its configuration."""
        if self.path:
            return PurePosixPath(self.path).stem
        words = [self.place.rpartition("/")[2], self.config, self.split]
        return "-".join(word for word in words if word and word not in ("default", "train"))

    def below(self, path: str) -> Address:
        """The address of a file or folder of the same place."""
        return replace(self, path=path, config=None, split=None, query="")


def is_address(text: str | Path) -> bool:
    """Whether a text is an address, and no path of this machine."""
    return isinstance(text, str) and SCHEME.match(text) is not None


def parse_address(text: str) -> Address:
    """Take an address apart.

    Raises:
        ValueError: for a scheme that is not known, or an address that names no place.
    """
    scheme, _, rest = text.partition("://")
    scheme = {"gcs": "gs"}.get(scheme.lower(), scheme.lower())
    if scheme == "hf":
        return _of_hub(text, rest)
    if scheme not in SCHEMES:
        raise ValueError(f"{text}: addresses begin with {KNOWN}; '{scheme}://' is not read")
    if scheme in ("s3", "gs"):
        place, _, path = rest.partition("/")
        query = ""
    else:
        parts = urlsplit(text)
        place, path, query = f"{scheme}://{parts.netloc}" if parts.netloc else "", unquote(parts.path), parts.query
    if not place:
        raise ValueError(f"{text} names no {'bucket' if scheme in ('s3', 'gs') else 'host'}: write one of {KNOWN}")
    return Address(scheme, place, _checked(path, text), query=query)


def _of_hub(text: str, rest: str) -> Address:
    found = HUB.fullmatch(rest)
    if found is None:
        raise ValueError(f"{text} is no address of a data set of the hub: write {HUB_FORM}")
    name, revision, path, config, split = found.groups()
    path = _checked(path, text)
    if path and config:
        raise ValueError(f"{text} names a path and a configuration: write {HUB_FORM}")
    return Address("hf", name, path, revision and unquote(revision), config, split)


def _checked(path: str, text: str) -> str:
    """A path without slashes around it; raises ValueError for one that would leave its folder."""
    path = path.strip("/")
    if any(part in ("", ".", "..") for part in path.split("/")) and path:
        raise ValueError(f"{text}: a path has no empty parts, no '.' and no '..'")
    return path
