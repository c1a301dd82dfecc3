"""Data sets of the Hugging Face hub: their files, and what their cards say."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from lit_vlm.data.remote.address import HUB_FORM
from lit_vlm.data.remote.store import Entry, Interrupted, Listing, Store, Unreachable, read
from lit_vlm.data.remote.web import BUSY, reason, stream

CARD = "README.md"
DATA = (".parquet", ".jsonl", ".json", ".csv", ".tsv", ".tar")
"""Endings of files that a split is made of, where the card does not say."""
WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Words in names of files and folders, and the splits that they stand for, as the hub reads them."""
SHARD = re.compile(r"(?:^|/)([^/]+)-\d{5}-of-\d{5}[^/]*$")

Parts = dict[str, dict[str, list[str]]]
"""Configuration → split → paths of its files."""


class Hub(Store):
    """A data set of the hub at one commit; the token is that of `HF_TOKEN` or of `hf auth login`."""

    @property
    def home(self) -> str:
        """What tells this data set from others: the hub and its name."""
        from huggingface_hub import constants

        return f"{constants.ENDPOINT} {self.address.place}"

    def listing(self) -> Listing:
        """The files at the commit that the revision is now; a configuration or split is not looked at.

        Raises:
            ValueError: where there is no such data set, revision or file, or none that may be read.
            Interrupted: where asking again may help.
        """
        from huggingface_hub import HfApi
        from huggingface_hub.hf_api import RepoFile

        name, path = self.address.place, self.address.path
        try:
            api = HfApi()
            commit = api.dataset_info(name, revision=self.address.revision).sha
            tree = api.list_repo_tree(name, recursive=True, revision=commit, repo_type="dataset")
            entries = [_entry(found) for found in tree if isinstance(found, RepoFile)]
        except Exception as error:
            raise self._told(error) from error
        below = [one for one in entries if not path or one.path == path or one.path.startswith(f"{path}/")]
        if not below:
            raise ValueError(f"there is no {self.address}: {self.address.root} has no such file or folder")
        return Listing(str(commit), tuple(sorted(below, key=lambda one: one.path)))

    def stream(self, entry: Entry, start: int) -> Iterator[bytes]:
        """Yield the content of a file from a byte on; see `Store.stream`."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        url = hf_hub_url(self.address.place, entry.path, repo_type="dataset", revision=self.address.revision)
        where = f"{self.address.root}/{entry.path}"
        try:
            # A commit does not change, and the checksum is that of the listing: no tag is needed.
            yield from stream(url, build_hf_headers(), "", start, where)
        except ValueError as error:
            raise ValueError(f"{error}; {_login()}" if "without a login" in str(error) else str(error)) from error

    def _told(self, error: Exception) -> Exception:
        """An error of the client as one line, or as `Interrupted`."""
        from huggingface_hub import constants
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            OfflineModeIsEnabled,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        root = f"hf://datasets/{self.address.place}"
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
        if isinstance(error, OfflineModeIsEnabled):
            return Unreachable(f"{root} cannot be asked for: HF_HUB_OFFLINE is set")
        if isinstance(error, GatedRepoError):  # a kind of RepositoryNotFoundError
            return ValueError(f"{root}: its authors want an agreement first: accept it on its page; {_login()}")
        if isinstance(error, RevisionNotFoundError):
            return ValueError(f"{root} has no revision '{self.address.revision}'")
        if status == 401 and _token():
            return ValueError(f"{root}: {constants.ENDPOINT} refuses the token, which is wrong or expired; {_login()}")
        if isinstance(error, RepositoryNotFoundError) or status in (401, 403):
            return ValueError(
                f"there is no {root} at {constants.ENDPOINT}, or none that you may see: check the spelling; {_login()}"
            )
        if isinstance(error, ValueError) and not status:
            return ValueError(f"{self.address}: {next(iter(str(error).splitlines()), repr(error))}: write {HUB_FORM}")
        if status and status not in BUSY:
            return ValueError(f"{root}: the hub answers with status {status}")
        # Clients of the network have errors of their own, whatever the version.
        return Interrupted(f"the hub answers with status {status}" if status else reason(error))


def _entry(found: Any) -> Entry:
    checksum = f"sha256:{found.lfs.sha256}" if found.lfs else f"git:{found.blob_id}"
    return Entry(found.path, found.size, checksum, checksum)


def _token() -> str | None:
    from huggingface_hub import get_token

    return get_token()


def _login() -> str:
    return "a token comes from HF_TOKEN" if _token() else "log in with `hf auth login`, or set HF_TOKEN"


class Card:
    """What the card of a data set says, and its files by configuration and split.

    Args:
        store: the data set.
        listing: all of its files.
    """

    def __init__(self, store: Store, listing: Listing) -> None:
        self.files = [entry.path for entry in listing.entries]
        card = next((entry for entry in listing.entries if entry.path == CARD), None)
        self._text = read(store, card).decode(errors="replace") if card else ""

    @cached_property
    def data(self) -> dict[str, Any]:
        """The YAML at the top of the card; empty where there is none that can be read."""
        import yaml

        found = re.match(r"---\s*\n(.*?)\n---", self._text, re.DOTALL)
        try:
            data = yaml.safe_load(found[1]) if found else {}
        except yaml.YAMLError:
            return {}
        return data if isinstance(data, dict) else {}

    @property
    def licence(self) -> str | None:
        """The licence, as the card names it."""
        given = self.data.get("license_name") or self.data.get("license")
        return ", ".join(map(str, given)) if isinstance(given, list) else given and str(given)

    @cached_property
    def parts(self) -> Parts:
        """The files of each split of each configuration; empty where no file is data in a form that splits have."""
        given = self.data.get("configs")
        listed = [one for one in given if isinstance(one, dict)] if isinstance(given, list) else []
        if not listed:
            data = [file for file in self.files if file.endswith(DATA)]
            return {"default": splits_of(data)} if data else {}
        found: Parts = {}
        for one in listed:
            folder = str(one.get("data_dir") or "").strip("/")
            files = [file for file in self.files if not folder or file.startswith(f"{folder}/")]
            splits = _given_splits(one.get("data_files"), files, folder)
            found[str(one.get("config_name", "default"))] = splits
        return {config: splits for config, splits in found.items() if splits}

    @property
    def default(self) -> str | None:
        """The configuration that is meant where none is named; None where there are several and none is the first."""
        given = self.data.get("configs")
        listed = [one for one in given if isinstance(one, dict)] if isinstance(given, list) else []
        marked = [str(one.get("config_name")) for one in listed if one.get("default") is True]
        return next((name for name in [*marked, "default"] if name in self.parts), None) or (
            next(iter(self.parts)) if len(self.parts) == 1 else None
        )

    def rows(self, config: str) -> dict[str, int]:
        """Split → number of rows, as the card says; empty where it does not."""
        given = self.data.get("dataset_info")
        for one in given if isinstance(given, list) else [given]:
            if isinstance(one, dict) and str(one.get("config_name", "default")) == config:
                splits = one.get("splits")
                listed = [split for split in splits if isinstance(split, dict)] if isinstance(splits, list) else []
                return {str(split.get("name")): split["num_examples"] for split in listed if "num_examples" in split}
        return {}


def _given_splits(given: Any, files: Sequence[str], folder: str) -> dict[str, list[str]]:
    """Split → files, from the `data_files` of a card: a pattern, a list of them, or such by split."""
    if given is None:
        return splits_of([file for file in files if file.endswith(DATA)])
    if isinstance(given, str) or (isinstance(given, list) and all(isinstance(one, str) for one in given)):
        return {split: found for split, found in {"train": _matching(given, files, folder)}.items() if found}
    if isinstance(given, dict):
        by_split = {str(split): patterns for split, patterns in given.items()}
    else:
        by_split = {str(one.get("split", "train")): one.get("path") for one in given if isinstance(one, dict)}
    found = {split: _matching(patterns, files, folder) for split, patterns in by_split.items()}
    return {split: files for split, files in found.items() if files}


def _matching(patterns: Any, files: Sequence[str], folder: str) -> list[str]:
    """Files that fit a pattern, or one of a list: `*` stays within a folder, `**` does not."""
    from fsspec.utils import glob_translate

    listed = [patterns] if isinstance(patterns, str) else patterns if isinstance(patterns, list) else []
    below = [f"{folder}/{pattern}" if folder else str(pattern) for pattern in listed]
    shapes = [re.compile(glob_translate(one + "**" if one.endswith("/") else one)) for one in below]
    return [file for file in files if any(shape.match(file) for shape in shapes)]


def splits_of(files: Sequence[str]) -> dict[str, list[str]]:
    """Split → files, by their names, where the card does not say: as `SPLIT-00000-of-00001`, or by `WORDS`.

    A word in a file's own name counts before one in its folders; files that say nothing are `train`.
    """
    found: dict[str, list[str]] = {}
    for file in files:
        folder, _, name = file.rpartition("/")
        shard = SHARD.search(file)
        split = (shard and shard[1]) or _word(name) or _word(folder) or "train"
        found.setdefault(next((kind for kind, words in WORDS.items() if split in words), split), []).append(file)
    return found


def _word(text: str) -> str | None:
    words = re.split(r"[^a-z]+", text.lower())
    return next((split for split, known in WORDS.items() if any(word in known for word in words)), None)
