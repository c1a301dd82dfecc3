"""What an address or path holds, found without fetching it: splits, rows, columns, size, and the reader that fits."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from lit_vlm.data.records.files import walk
from lit_vlm.data.remote import Address, is_address, parse_address, store_of
from lit_vlm.data.remote.hub import Card
from lit_vlm.data.remote.store import PIECE, Changed, Entry, Listing, RemoteFile, Store, read, retried
from lit_vlm.data.sets.forms import HEAD, caption_settings, first_row, form_of_files, recognise
from lit_vlm.data.sources.converted import INFO

READ_ROWS = 64
"""Most tables of a split that are asked for their number of rows."""
COLUMNS = ("messages", "texts", "query", "conversations", "question", "caption", "text")
"""Columns of which `Parquet` needs one."""


@dataclass(frozen=True)
class Held:
    """One split, or what an address names.

    Attributes:
        address: what to write for it.
        config: its configuration; "" where there is none.
        split: its name; "" where there is none.
        files: number of files.
        size: bytes of all files.
        rows: number of rows; None where only reading all of it would tell.
        columns: columns of its tables, or keys of its first row.
        form: class name of the reader that fits; None where none does.
        settings: arguments of the reader that its defaults do not fit, each as `key=value`.
    """

    address: str
    config: str
    split: str
    files: int
    size: int
    rows: int | None
    columns: tuple[str, ...]
    form: str | None
    settings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Shown:
    """What an address or path holds.

    Attributes:
        revision: the commit of a data set of the hub; "" elsewhere.
        licence: as the card of the data set says; None where it does not.
        held: its splits; one of no name where it has none.
    """

    revision: str
    licence: str | None
    held: tuple[Held, ...]


class OwnFiles(Store):
    """Files of this machine, below the folder or file that the address has as its path."""

    def listing(self) -> Listing:
        """The file, or all below the folder."""
        path = Path(self.address.path)
        files = [path] if path.is_file() else sorted(walk(path))
        return Listing("", tuple(Entry(str(file), file.stat().st_size, "", "") for file in files))

    def stream(self, entry: Entry, start: int) -> Iterator[bytes]:
        """Yield the content of a file from a byte on."""
        with Path(entry.path).open("rb") as file:
            file.seek(start)
            while piece := file.read(PIECE):
                yield piece


def look(text: str) -> Shown:
    """Find out what an address or path holds; of files of the network, first and last bytes are read.

    Raises:
        ValueError: in one line, where there is nothing of the kind, or nothing that may be read.
    """
    try:
        return _look(text)
    except Changed as error:
        raise ValueError(f"{text} changes while it is looked at: try again when nobody writes there") from error


def _look(text: str) -> Shown:
    if not is_address(text):
        if not Path(text).expanduser().exists():
            raise ValueError(f"there is no {text}")
        store: Store = OwnFiles(Address("", "", str(Path(text).expanduser())))
        return Shown("", None, (_held(store, store.listing().entries, text),))
    address = parse_address(text)
    store = store_of(address)
    listing = retried(store.listing, address)
    if address.scheme != "hf" or address.path:
        store = store_of(replace(address, revision=listing.revision or address.revision))
        return Shown(listing.revision, None, (_held(store, listing.entries, text),))
    pinned = replace(address, revision=listing.revision)
    return _of_hub(address, store_of(pinned), listing)


def _of_hub(address: Address, store: Store, listing: Listing) -> Shown:
    card = Card(store, listing)
    parts = {config: splits for config, splits in card.parts.items() if address.config in (None, config)}
    if not parts:
        known = f"has no configuration '{address.config}', only {', '.join(card.parts)}"
        if address.config:
            raise ValueError(f"{address.root} {known}")
        return Shown(listing.revision, card.licence, (_held(store, listing.entries, str(address)),))
    found = []
    for config, splits in parts.items():
        told = card.rows(config)
        for split, files in splits.items():
            if address.split not in (None, split):
                continue
            named = str(replace(address, config=config, split=split))
            entries = [entry for entry in listing.entries if entry.path in set(files)]
            one = _held(store, entries, named, told.get(split))
            found.append(replace(one, config=config, split=split))
    if not found:
        raise ValueError(f"{address.root}#{address.config} has no split '{address.split}', only {', '.join(splits)}")
    return Shown(listing.revision, card.licence, tuple(found))


def _held(store: Store, entries: Sequence[Entry], named: str, told: int | None = None) -> Held:
    """What some files hold.

    Args:
        store: where they lie.
        entries: the files.
        named: what to write for them.
        told: number of rows, where a card says it.
    """
    size = sum(max(0, entry.size) for entry in entries)
    plain = Held(named, "", "", len(entries), size, told, (), None)
    if any(PurePosixPath(entry.path).name == INFO for entry in entries):
        return replace(plain, form="Converted")
    tables = [entry for entry in entries if entry.path.lower().endswith(".parquet")]
    if tables:
        return _of_tables(store, tables, plain)
    rows = [entry for entry in entries if entry.path.lower().endswith((".jsonl", ".json"))]
    if rows and not any(entry.path.lower().endswith(".tar") for entry in entries):
        first = next((entry for entry in rows if entry.path.lower().endswith(".jsonl")), rows[0])
        return _of_rows(store, first, plain)
    try:
        return replace(plain, form=form_of_files([entry.path for entry in entries], named))
    except ValueError:
        return plain


def _of_tables(store: Store, tables: Sequence[Entry], plain: Held) -> Held:
    import pyarrow.parquet as pq

    def footer(entry: Entry) -> tuple[int, tuple[str, ...]]:
        try:
            with pq.ParquetFile(RemoteFile(store, entry), pre_buffer=False) as file:
                return file.metadata.num_rows, tuple(file.schema_arrow.names)
        except (OSError, ValueError) as error:
            if isinstance(error, ValueError) and "parquet" not in str(error).lower():
                raise
            raise ValueError(f"{entry.path} is no parquet file, or not all of it: {error}") from error

    counted = tables if plain.rows is None and len(tables) <= READ_ROWS else tables[:1]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(footer, counted))
    rows = sum(count for count, _ in found) if counted is tables else plain.rows
    columns = found[0][1]
    return replace(plain, rows=rows, columns=columns, form="Parquet" if set(columns) & set(COLUMNS) else None)


def _of_rows(store: Store, first: Entry, plain: Held) -> Held:
    """By the first bytes of JSON lines, or of a list."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, f"head{PurePosixPath(first.path).suffix}")
        file.write_bytes(read(store, first, 0, HEAD))
        row = first_row(file)
        try:
            form: str | None = recognise(file)
        except ValueError:
            form = None
    plain = replace(plain, columns=tuple(row) if isinstance(row, dict) else (), form=form)
    if form is None and (settings := caption_settings(row)):
        # `Captions` reads such a table by its file; of a folder it would look for NAME.txt.
        named = plain.address if plain.files == 1 else _name(store, first)
        return replace(plain, address=named, form="Captions", settings=settings)
    return plain


def _name(store: Store, entry: Entry) -> str:
    """What to write for one file of several."""
    return entry.path if isinstance(store, OwnFiles) else str(store.address.below(entry.path))
