"""Files of the network in the cache folder: each fetched once and whole, checked, and of one revision.

Layout of a place below `remote/` of the cache folder, like that of the hub's own cache:

- `blobs/`: contents, by checksum or by path and tag; `.partial` is what came before a connection was cut;
- `snapshots/DIGEST/`: the files of one choice at one revision under their own paths, as links to the blobs;
- `origins/DIGEST.json`: the address and revision that a snapshot is of;
- `listed/`: which files an address means, asked once by all processes of a launch.
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from lit_vlm.core.cache import cache_dir, held
from lit_vlm.core.fetch import once
from lit_vlm.core.progress import progress
from lit_vlm.core.written import whole_folder, write_whole
from lit_vlm.data.remote.address import Address, parse_address
from lit_vlm.data.remote.chosen import Chosen, choose, store_of
from lit_vlm.data.remote.store import ATTEMPTS, Changed, Entry, Interrupted, Store, Unreachable, pause

STREAMS = 8
"""Files that are fetched at a time."""
BATCH = 512
"""Files that are handed to those streams at a time."""
RELISTED = 3
"""How often files are listed that change while they are fetched."""
SHOWN = 1 << 24
"""Bytes from which on progress is shown."""
MIB = 1 << 20


@dataclass(frozen=True)
class Fetched:
    """Files that were fetched.

    Attributes:
        path: the file or folder on this machine.
        name: a name for the data.
        folder: address of the folder that the file lies in, of the same revision; of a folder, its own.
    """

    path: Path
    name: str
    folder: str


def fetch(
    text: str, endings: Sequence[str] = (), named: Callable[[], Iterable[str]] | None = None, whole: bool = False
) -> Fetched:
    """Fetch the files that an address means, where the cache folder lacks them.

    Args:
        text: the address.
        endings: as for `choose`.
        named: gives paths relative to the folder, of whose files only those are fetched; other texts among them do not
            matter.
        whole: as for `choose`.

    Raises:
        ValueError: in one line, where they cannot be fetched.
    """
    address = parse_address(text)
    home = cache_dir() / "remote" / f"{address.scheme}-{_digest(store_of(address).home)}"
    for _ in range(RELISTED):
        note = home / "listed" / f"{_digest(repr((str(address), address.query, list(endings), whole)))}.json"
        chosen = _listed(note, address, endings, whole)
        if named is not None:
            chosen = _only(chosen, named())
        try:
            folder = _snapshot(home, chosen, address)
        except Changed:
            note.unlink(missing_ok=True)
            continue
        above = chosen.at if not chosen.entries or chosen.at != chosen.entries[0].path else posixpath.dirname(chosen.at)
        return Fetched(folder / chosen.at, address.name, str(chosen.address.below(above)))
    raise ValueError(f"{address} changes while it is fetched: the same command fetches it when nobody writes there")


def _listed(note: Path, address: Address, endings: Sequence[str], whole: bool) -> Chosen:
    """Which files an address means; where its place cannot be reached, what it meant when it last could."""
    last = note.with_suffix(".last")

    def ask() -> Any:
        try:
            found = choose(address, endings, whole)
        except Unreachable as error:
            if not last.is_file():
                raise
            sys.stderr.write(f"{error}; what was fetched of it before is read\n")
            return json.loads(last.read_text())
        answer = asdict(replace(found, address=replace(found.address, query="")))  # which may hold a secret
        write_whole(last, json.dumps(answer))
        return answer

    note.parent.mkdir(parents=True, exist_ok=True)
    found = once(note, f"lists {address}", ask)
    entries = tuple(Entry(**entry) for entry in found["entries"])
    pinned = replace(Address(**found["address"]), query=address.query)
    return Chosen(pinned, found["revision"], found["at"], entries)


def _only(chosen: Chosen, wanted: Iterable[str]) -> Chosen:
    prefix = f"{chosen.at}/" if chosen.at else ""
    below = {entry.path.removeprefix(prefix): entry for entry in chosen.entries}
    found = {name for text in wanted if (name := posixpath.normpath(text)) in below}
    entries = tuple(below[name] for name in sorted(found))
    tags = repr([(entry.path, entry.size, entry.tag) for entry in entries])
    hub = chosen.address.revision == chosen.revision
    return replace(chosen, entries=entries, revision=chosen.revision if hub else _digest(tags))


def _snapshot(home: Path, chosen: Chosen, address: Address) -> Path:
    """The folder with the files of a choice; they are fetched if it is not there.

    Raises:
        ValueError: where they cannot be fetched.
        Changed: where they are not what was listed.
    """
    tags = [(entry.path, entry.tag or entry.checksum) for entry in chosen.entries]
    digest = _digest(repr((chosen.revision, chosen.at, tags)))
    folder = home / "snapshots" / digest
    if folder.is_dir():
        return folder
    blobs = home / "blobs"
    blobs.mkdir(parents=True, exist_ok=True)
    with held(home / "fetch.lease", f"fetches {address}"):
        if folder.is_dir():
            return folder
        _download(store_of(chosen.address), chosen.entries, blobs, str(address))
        note = {"root": chosen.address.root, "given": str(address), "revision": chosen.revision}
        write_whole(home / "origins" / f"{digest}.json", json.dumps(note))
        with whole_folder(folder) as scratch:
            (scratch / chosen.at).parent.mkdir(parents=True, exist_ok=True)
            for entry in chosen.entries:
                link = scratch / entry.path
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(os.path.relpath(blobs / _blob(entry), link.parent))
            if not (scratch / chosen.at).exists():  # a folder of which nothing is wanted
                (scratch / chosen.at).mkdir()
    return folder


def _download(store: Store, entries: Sequence[Entry], blobs: Path, shown: str) -> None:
    missing = list({_blob(entry): entry for entry in entries if not (blobs / _blob(entry)).is_file()}.values())
    need = sum(max(0, entry.size) for entry in missing)
    free = shutil.disk_usage(blobs).free
    if need > free:
        raise ValueError(
            f"{shown} takes {need / 2**30:.1f} GiB more, and {blobs} has {free / 2**30:.1f} GiB left: LIT_VLM_CACHE "
            "names another cache folder"
        )
    with _meter(f"fetching {shown}, MiB", need) as count, ThreadPoolExecutor(STREAMS) as pool:
        for start in range(0, len(missing), BATCH):
            batch = missing[start : start + BATCH]
            jobs = [pool.submit(_fetch_one, store, entry, blobs / _blob(entry), count) for entry in batch]
            try:
                for job in jobs:
                    job.result()
            except BaseException:
                for job in jobs:
                    job.cancel()
                raise


@contextmanager
def _meter(title: str, total: int) -> Iterator[Any]:
    """Progress in MiB, as a context manager that gives a function to call with numbers of bytes, from any thread."""
    lock, done = threading.Lock(), 0
    with progress(title, -(-total // MIB), shown=total >= SHOWN) as advance:

        def count(size: int) -> None:
            nonlocal done
            with lock:
                whole = (done + size) // MIB - done // MIB
                done += size
                if whole:
                    advance(whole)

        yield count


def _fetch_one(store: Store, entry: Entry, blob: Path, count: Any) -> None:
    """Fetch one file, from where an earlier attempt ended.

    Raises:
        ValueError: where that cannot be, or the content is not what the server says that it is.
        Changed: where it is another one than was listed.
    """
    partial = blob.with_name(f"{blob.name}.partial")
    where = f"{store.address.root}/{entry.path}"
    failures = 0
    while True:
        before = _begin(partial, entry)
        try:
            _append(store, entry, partial, before, count)
            problem: str | None = _problem(store, entry, partial)
        except Interrupted as error:
            problem = str(error)
            if partial.stat().st_size > before:
                failures = 0
        else:
            if problem is None:
                partial.replace(blob)
                return
            partial.unlink()
        failures += 1
        if failures >= (ATTEMPTS if partial.is_file() else 2):
            raise Unreachable(f"{where} cannot be fetched: {problem}")
        pause(failures - 1)


def _begin(partial: Path, entry: Entry) -> int:
    """Bytes that are there already and are kept; a file that cannot be gone on with is begun anew."""
    size = partial.stat().st_size if partial.is_file() else 0
    # Without a tag, or a checksum, nothing says that what is there is of the same version.
    known = entry.tag or not entry.checksum.startswith("once:")
    if size and (entry.size < 0 or size > entry.size or not known):
        partial.unlink()
        size = 0
    return size


def _append(store: Store, entry: Entry, partial: Path, start: int, count: Any) -> None:
    with partial.open("ab") as file:
        if 0 <= entry.size == start:
            return
        for piece in store.stream(entry, start):
            file.write(piece)
            count(len(piece))


def _problem(store: Store, entry: Entry, file: Path) -> str | None:
    """What is wrong with a fetched file; None where its size and checksum are those that were listed.

    Raises:
        Interrupted: where a part of it lacks.
    """
    size = file.stat().st_size
    if 0 <= size < entry.size:
        raise Interrupted(f"the connection ended after {size:,} of {entry.size:,} bytes")
    if 0 <= entry.size < size:
        return f"{size:,} bytes came, not {entry.size:,}"
    kind, _, expected = entry.checksum.partition(":")
    if kind not in ("sha256", "md5", "git"):
        return None
    digest = hashlib.new("sha1" if kind == "git" else kind, f"blob {size}\0".encode() if kind == "git" else b"")
    with file.open("rb") as stream:
        while piece := stream.read(MIB):
            digest.update(piece)
    if digest.hexdigest() == expected or store.is_sound(entry):
        return None
    name = "SHA-1" if kind == "git" else kind.upper()
    return f"its content has the {name} {digest.hexdigest()[:12]}..., not {expected[:12]}... as the server says"


def _blob(entry: Entry) -> str:
    return _digest(entry.checksum or f"{entry.path} {entry.size} {entry.tag}", 32)


def _digest(text: str, letters: int = 16) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:letters]


def _origin(path: Path | str) -> tuple[dict[str, str], str] | None:
    """The note of the snapshot that a path lies in, and the path in it; None for a path of any other kind."""
    parts = Path(path).parts
    if "snapshots" not in parts:
        return None
    for place in reversed([i for i, part in enumerate(parts[:-1]) if part == "snapshots"]):
        note = Path(*parts[:place], "origins", f"{parts[place + 1]}.json")
        if note.is_file():
            return json.loads(note.read_text()), PurePosixPath(*parts[place + 2 :]).as_posix()
    return None


def origin_of(path: Path | str) -> str | None:
    """The address, with its revision, that a path of the cache folder is of; None for a path of any other kind."""
    found = _origin(path)
    if found is None:
        return None
    note, inside = found
    address = note["root"] if inside == "." else f"{note['root']}/{inside}"
    return address if note["root"].startswith("hf:") else f"{address} (revision {note['revision']})"


def revision_of(path: Path | str) -> str | None:
    """The revision that a path of the cache folder is of; None for a path of any other kind."""
    found = _origin(path)
    return None if found is None else found[0]["revision"]


def place_of(path: Path | str) -> Path:
    """The path by which a source is told from others: its own, or its address written as a path."""
    found = _origin(path)
    if found is None:
        return Path(path)
    address = found[0]["given"].split("://", 1)[1].replace("#", "/")
    return Path("/", *address.split("/"))
