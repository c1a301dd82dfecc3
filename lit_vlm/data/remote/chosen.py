"""Which files of a place are meant by an address."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from lit_vlm.data.remote.address import Address
from lit_vlm.data.remote.gcs import Gcs
from lit_vlm.data.remote.hub import Card, Hub, Parts
from lit_vlm.data.remote.s3 import S3
from lit_vlm.data.remote.store import Entry, Listing, Store, retried
from lit_vlm.data.remote.web import Web

STORES: dict[str, type[Store]] = {"hf": Hub, "s3": S3, "gs": Gcs, "https": Web, "http": Web}


def store_of(address: Address) -> Store:
    """The store that reads an address."""
    return STORES[address.scheme](address)


@dataclass(frozen=True)
class Chosen:
    """Files that an address means.

    Attributes:
        address: the address; of a data set of the hub, at a commit.
        revision: that commit; elsewhere a hash of the tags of the files.
        at: path of the file that is read, or of the folder.
        entries: the files.
    """

    address: Address
    revision: str
    at: str
    entries: tuple[Entry, ...]


def choose(address: Address, endings: Sequence[str] = (), whole: bool = False) -> Chosen:
    """Ask a place which files an address means.

    Args:
        address: a file, a folder, or a data set of the hub, of which one split is read.
        endings: of files in a folder, in small letters with the dot; none takes all files. A file that is named itself
            may have any.
        whole: whether a data set of the hub is a folder, and all of it is meant.

    Raises:
        ValueError: in one line, where there is nothing of the kind, or nothing that may be read.
    """
    listing = retried(store_of(address).listing, address)
    pinned = replace(address, revision=listing.revision) if listing.revision else address
    entries, at = listing.entries, address.path
    split = address.scheme == "hf" and not address.path and not whole
    if split:
        card = Card(store_of(pinned), listing)
        files = split_files(address, card.parts, card.default)
        entries = tuple(entry for entry in entries if files is None or entry.path in files)
        at = entries[0].path if files is not None and len(entries) == 1 else ""
    if not (len(entries) == 1 and entries[0].path == at) and endings:
        entries = tuple(entry for entry in entries if entry.path.lower().endswith(tuple(endings)))
        if not entries:
            raise ValueError(f"there is no {' or '.join(endings)} file in {address}")
    tags = repr([(entry.path, entry.size, entry.tag or entry.checksum) for entry in entries])
    return Chosen(pinned, listing.revision or hashlib.sha256(tags.encode()).hexdigest()[:16], at, entries)


def split_files(address: Address, parts: Parts, default: str | None) -> set[str] | None:
    """Paths of the files of the split that an address of a data set means; None where it has no splits, for all files.

    Raises:
        ValueError: where there is no such configuration or split, or several and none is named; names those there are.
    """
    if not parts and not address.config:
        return None
    root = address.root
    config = address.config or default
    if config is None:
        raise ValueError(f"{root} has {len(parts)} configurations; name one, as in {root}#{min(parts)}: {_some(parts)}")
    if config not in parts:
        raise ValueError(f"{root} has no configuration '{config}', only {_some(parts) or 'single files'}")
    splits = parts[config]
    if address.split is None and len(splits) > 1:
        raise ValueError(
            f"{root}#{config} has {len(splits)} splits; name one, as in {root}#{config}/{next(iter(splits))}: "
            f"{_some(splits)}"
        )
    split = address.split or next(iter(splits))
    if split not in splits:
        raise ValueError(f"{root}#{config} has no split '{split}', only {_some(splits)}")
    return set(splits[split])


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:12]) + (f" and {len(listed) - 12} more" if len(listed) > 12 else "")


def holds(address: Address, name: str) -> bool:
    """Whether a folder of a place has a file of this name.

    Raises:
        ValueError: in one line, where the place does not say.
    """
    path = f"{address.path}/{name}" if address.path else name
    if address.scheme == "s3":  # a single object may be asked for where none may be listed
        return retried(lambda: S3(address.below(path)).entry() is not None, address)
    if address.scheme in ("https", "http") or address.config:
        return False
    listing: Listing = retried(store_of(address).listing, address)
    return any(entry.path == path for entry in listing.entries)
