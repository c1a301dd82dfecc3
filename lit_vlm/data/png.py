"""PNG files whose texts or colour profile are larger than Pillow takes, though their pixels are whole."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_TEXT = 1 << 20
"""Bytes of one text or colour profile, unpacked; Pillow refuses the file above it (`PngImagePlugin.MAX_TEXT_CHUNK`)."""
TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")


def without_large_texts(content: bytes) -> bytes | None:
    """The file without texts and colour profiles of more than `MAX_TEXT` bytes.

    They do not change pixels here: no colour profile is applied. Pillow's limits stay as they are, as they are module
    constants that hold for the whole process.

    Args:
        content: of any file.

    Returns:
        None where nothing was left out, or the file is no PNG.
    """
    if not content.startswith(SIGNATURE):
        return None
    kept, dropped = [SIGNATURE], False
    for kind, chunk in _chunks(content):
        if kind in TEXTS and _is_large(kind, chunk[8:-4]):
            dropped = True
        else:
            kept.append(chunk)
    return b"".join(kept) if dropped else None


def _chunks(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Kind and bytes of each chunk: length, kind, data, checksum; of a file that is cut, the rest as one."""
    place = len(SIGNATURE)
    while place + 8 <= len(content):
        (length,) = struct.unpack_from(">I", content, place)
        end = place + length + 12
        yield content[place + 4 : place + 8], content[place:end]
        place = end


def _is_large(kind: bytes, data: bytes) -> bool:
    """Whether a text or profile, unpacked, is larger than `MAX_TEXT`."""
    if len(data) > MAX_TEXT:
        return True
    try:
        return len(zlib.decompressobj().decompress(_packed(kind, data), MAX_TEXT + 1)) > MAX_TEXT
    except zlib.error:
        return False


def _packed(kind: bytes, data: bytes) -> bytes:
    """The part of a chunk that is packed: behind the keyword and, in iTXt, two more texts (PNG, section 11.3)."""
    after = data.find(b"\0") + 1
    if kind in (b"zTXt", b"iCCP"):
        return data[after + 1 :]
    if kind == b"iTXt" and data[after : after + 1] == b"\1":
        return data[after + 2 :].split(b"\0", 2)[-1]
    return b""
