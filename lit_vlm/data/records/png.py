"""PNG files that Pillow refuses for chunks beside the pixels: a large text or colour profile, or a damaged one."""

from __future__ import annotations

import struct
from collections.abc import Iterator

SIGNATURE = b"\x89PNG\r\n\x1a\n"
BESIDE_PIXELS = frozenset({b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"gAMA", b"cHRM", b"sRGB", b"pHYs", b"tIME"})
"""Kinds of chunks that change no pixel here, as no colour profile is applied (PNG, section 11.3)."""


def without_notes(content: bytes) -> bytes | None:
    """Remove texts, colour profiles and the like from a PNG file; the pixels do not depend on them.

    Pillow takes texts and profiles of at most a megabyte (`PngImagePlugin.MAX_TEXT_CHUNK`), a constant that holds for
    the whole process and so is left as it is.

    Args:
        content: bytes of a file of any kind.

    Returns:
        bytes of the smaller file; None where there is nothing to remove, or the file is no PNG.
    """
    if not content.startswith(SIGNATURE):
        return None
    chunks = list(_chunks(content))
    kept = [chunk for kind, chunk in chunks if kind not in BESIDE_PIXELS]
    return b"".join([SIGNATURE, *kept]) if len(kept) < len(chunks) else None


def _chunks(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield kind and bytes (length, kind, data, checksum) of each chunk; a chunk that is cut short ends the file."""
    place = len(SIGNATURE)
    while place + 8 <= len(content):
        (length,) = struct.unpack_from(">I", content, place)
        end = place + length + 12
        yield content[place + 4 : place + 8], content[place:end]
        place = end
