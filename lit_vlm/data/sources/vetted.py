"""A source without what a deny-list names, and with what is known of where it comes from."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lit_vlm.core.batch import DENIED
from lit_vlm.data.records import Record, RecordError, image_bytes
from lit_vlm.data.records.pictures import image_file
from lit_vlm.data.sources.base import Source
from lit_vlm.data.sources.deny import DenyList
from lit_vlm.data.sources.provenance import Provenance

LOOKED_AT = 16
"""Number of records in which an address is looked for, to warn where a list of addresses denies nothing."""

logger = logging.getLogger(__name__)


class Vetted(Source):
    """Another source, any, without the records that a deny-list names, and with its licence and origin.

    A record is denied if one of its addresses (`Record.urls`) is listed, or the SHA-256 of one of its pictures' files,
    of a video that of the whole video. It is left out like any record that cannot be used, with the reason `denied`.

    Args:
        source: the source.
        deny: a deny-list (`DenyList`); default: nothing is denied.
        licence: its licence; default: as the source knows it, and so below.
        origin: the address that it was published at.
        revision: the version that was taken: a commit, a tag or a date.
        name: name of the source; default: that of `source`.

    Raises:
        ValueError: as `DenyList`.
    """

    def __init__(
        self,
        source: Source,
        deny: str | None = None,
        licence: str | None = None,
        origin: str | None = None,
        revision: str | None = None,
        name: str | None = None,
    ) -> None:
        self.source, self.deny = source, deny
        self.name, self.named = (source.name, source.named) if name is None else (name, True)
        self.path, self.image_folder, self.chunked = source.path, source.image_folder, source.chunked
        self.provenance = source.provenance | Provenance(licence, origin, revision)
        self.captions = source.captions
        self._list = None if deny is None else DenyList(deny)
        if self._list is not None:
            _warn_of_nothing(self._list, source)

    def __len__(self) -> int:
        return len(self.source)

    def record(self, index: int) -> Record:
        """The record of the source.

        Raises:
            RecordError: `denied` if the list names it; as the source; and as `image_bytes`, where pictures are hashed.
        """
        record = self._by_address(self.source.record(index))
        if self._list is not None and self._list.has_hashes:
            self._refuse_pictures(self._list, record)
        return record

    def outline(self, index: int) -> Record:
        """The record without the bytes of its images, of which only the addresses are looked at.

        Raises:
            RecordError: `denied` if the list names one of its addresses, and as the source.
        """
        return self._by_address(self.source.outline(index))

    def places(self) -> list[Path | str]:
        """Those of the source."""
        return self.source.places()

    def repeats(self) -> NDArray[np.int64] | None:
        """Records that differ in nothing but their ids, as the source knows them: `[n]`."""
        return self.source.repeats()

    def shuffled(self, generator: np.random.Generator) -> NDArray[np.int64]:
        """All indices in random order, as the source shuffles its own: `[n]`."""
        return self.source.shuffled(generator)

    def fingerprint(self) -> str:
        """That of the source; with a deny-list, a hash of both."""
        own = self.source.fingerprint()
        if self._list is None:
            return own
        return hashlib.sha256(f"{own} without {self._list.fingerprint()}".encode()).hexdigest()[:16]

    def _by_address(self, record: Record) -> Record:
        listed = self._list
        if listed is not None and listed.has_addresses:
            for url in record.urls:
                if listed.has_address(url):
                    raise RecordError(DENIED, f"record {record.id}: {url} is in {listed.path}")
        return record if record.source == self.name else replace(record, source=self.name)

    def _refuse_pictures(self, listed: DenyList, record: Record) -> None:
        videos = dict.fromkeys(image.path for image in record.images if image.in_video)
        for image in record.images:
            if not image.in_video:
                digest = hashlib.sha256(image_bytes(image, self.image_folder))
            elif image.path in videos:
                del videos[image.path]  # its other frames are of the same file
                with image_file(image, self.image_folder).open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256")
            else:
                continue
            if listed.has_hash(digest.digest()):
                what = f"{image.path or 'a picture'}, SHA-256 {digest.hexdigest()}, is in {listed.path}"
                raise RecordError(DENIED, f"record {record.id}: {what}")


def _warn_of_nothing(listed: DenyList, source: Source) -> None:
    """Warn where a list of nothing but addresses meets pictures that do not say where they come from."""
    if listed.has_hashes or not listed.has_addresses:
        return
    pictured = False
    for index in range(min(LOOKED_AT, len(source))):
        try:
            record = source.outline(index)
        except RecordError:
            continue
        if record.urls:
            return
        pictured = pictured or bool(record.images)
    if pictured:
        logger.warning(
            "%s lists addresses, and the first records of the source '%s' have none: it denies none of these; list "
            "the SHA-256 of pictures' files to deny them",
            listed.path,
            source.name,
        )
