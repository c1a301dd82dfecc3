"""Pictures in the rows of files: marks in the text, keys that hold pictures, and keys that no reader looks at."""

from __future__ import annotations

import base64
import re
from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Any, Literal
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from lit_vlm.data.records.record import Image, Record, RecordError

MARK = "<image>"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
IMAGE_KEYS = ("images", "image")
"""Keys under which a row holds its picture, or a list of pictures."""

MEDIA_KEY = re.compile(
    r"^([a-z]+_){0,2}(?P<medium>[Ii]mage|[Ii]mg|[Pp]icture|[Pp]hoto|[Mm]edia|[Vv]ideo|[Aa]udio|IMAGE|VIDEO|AUDIO)s?"
    r"(_?([Pp]ath|[Ff]ile|[Nn]ame|[Uu]rl|URL|[Uu]ri|[Ll]ink|[Ss]rc|[Ll]ist|[Bb]ytes|[Bb]ase64|[Dd]ata|[Ll]ocal|[Rr]elative"
    r"|[Ff]ull|str)s?){0,3}(_?(?P<number>[0-9]+))?$"
)
"""Keys that hold a picture, a film or a sound, or say where it is: `image_path`, `imageUrl`, `img`, `videos`,
`left_image`, `image_2`. It does not match `image_size` or `image_id`."""
FILE_KEY = re.compile(r"^(?:file|path|file_?name|file_?path)$")
MEDIA_FILE = re.compile(
    r"\.(?:jpe?g|jfif|png|webp|bmp|gif|tiff?|heic|heif|avif|svg|mp4|avi|mov|mkv|webm|mp3|wav|flac|ogg|m4a)$"
)
"""Endings, in small letters, of the names of pictures, films and sounds."""
ADDRESS = re.compile(r"^(?:data:|file:|[A-Za-z][A-Za-z0-9+.-]{0,20}://|\S{0,4000}[/\\]\S{3,255}$|[A-Za-z0-9+/_-]{64})")
"""Values that say where a picture is although they have no such ending: a URI, a path with folders, base64."""
MEDIA_PARTS = frozenset({"video", "video_url", "audio", "audio_url", "input_audio", "file"})
"""Types of message parts in chat APIs that no reader here reads."""
URL_KEYS = ("url", "URL", "image_url")
"""Keys under which a row says where it comes from: of img2dataset, LAION and COYO, and of C4 and MMC4 the page."""
WEB = re.compile(r"^https?://[^\s]+$", re.IGNORECASE)
QWEN_MARK = re.compile(r"<img>[^<]{1,2000}</img>")


def is_nothing(value: Any) -> bool:
    """Whether a value is empty: null, NaN, an empty text, or a list or object of such values only."""
    if isinstance(value, Mapping):
        return all(is_nothing(entry) for entry in value.values())
    if isinstance(value, list | tuple):
        return all(is_nothing(entry) for entry in value)
    return value is None or value in ("", b"") or value != value


def is_media(value: Any) -> bool:
    """Whether a value looks like a picture, a film or a sound, and not like a word about one (`no`, `BBC`).

    It does if it is a file name with an ending of `MEDIA_FILE`, an `ADDRESS`, bytes, an object with `path`, `bytes` or
    `url`, or a list or an object that holds one of these.
    """
    if isinstance(value, str):
        return MEDIA_FILE.search(value[-8:].lower()) is not None or ADDRESS.match(value) is not None
    if isinstance(value, Mapping):
        named = any(isinstance(value.get(key), str | bytes) and value[key] for key in ("path", "bytes", "url"))
        return named or any(is_media(entry) for entry in value.values())
    if isinstance(value, list | tuple):
        return any(is_media(entry) for entry in value)
    return isinstance(value, bytes) and bool(value)


def without_keys(value: Any, keys: Collection[str]) -> Any:
    """Remove keys from a row, and from the objects in it."""
    if isinstance(value, Mapping):
        return {key: without_keys(entry, keys) for key, entry in value.items() if key not in keys}
    return [without_keys(entry, keys) for entry in value] if isinstance(value, list) else value


def unread_key(row: Mapping[Any, Any], read: Collection[str], pictured: bool) -> str | None:
    """Find a key of a row that holds a picture, film or sound and that the row's reader does not look at.

    Args:
        row: a row of a file.
        read: keys that the reader looks at.
        pictured: whether the reader found pictures in the row. Other keys (`image_url`, `file_name`) may then repeat
            where these come from, and are not reported; numbered further pictures, films and sounds still are.

    Returns:
        the key, or None.
    """
    for key, value in row.items():
        kind = _kind(key)
        if kind is None or key in read or not is_media(value):
            continue
        if kind == "file" and (pictured or not isinstance(value, str) or not MEDIA_FILE.search(value.lower())):
            continue
        if kind != "picture" or not pictured:
            return str(key)
    return None


@lru_cache(maxsize=1024)
def _kind(key: Any) -> Literal["picture", "other", "file"] | None:
    """Kind of a key: `picture`, `other` (a numbered further picture, a film or sound), `file` of any kind, or None."""
    found = MEDIA_KEY.match(key) if isinstance(key, str) else None
    if found:
        return "other" if found["number"] or found["medium"].lower() in ("video", "audio", "media") else "picture"
    return "file" if isinstance(key, str) and FILE_KEY.match(key) else None


def urls_of(row: Any, keys: Collection[str] = URL_KEYS) -> tuple[str, ...]:
    """The addresses in the web that a row says it comes from; nothing for a row that is no object."""
    values = [row[key] for key in keys if key in row] if isinstance(row, Mapping) else []
    return tuple(value for value in values if isinstance(value, str) and WEB.match(value))


def refuse_unread(row: Mapping[Any, Any], read: Collection[str], pictured: bool, where: str, advice: str) -> None:
    """Refuse a row with a picture, film or sound that its reader does not look at; see `unread_key`.

    Args:
        row: a row of a file.
        read: keys that the reader looks at.
        pictured: whether the reader found pictures in the row.
        where: names the row in errors.
        advice: where the reader looks for pictures, for errors.

    Raises:
        RecordError: `unread_media`, naming the key.
    """
    if (key := unread_key(row, read, pictured)) is not None:
        raise RecordError(
            "unread_media",
            f"{where} holds {str(row[key])[:80]!r} under '{key}', which is not read: {advice}; if it is no picture, "
            f"film or sound, ignore_keys: [{key}] of the source leaves it out",
        )


CALLS = ("tool_calls", "function_call", "tools", "functions")
"""Keys of tools: calls of an answer, and what tools there are."""


def refuse_calls(row: Mapping[Any, Any], where: str) -> None:
    """Refuse a row or turn with calls of tools, or a list of tools, which no reader writes.

    Args:
        row: a row of a file, or a turn of one.
        where: names it in errors.

    Raises:
        RecordError: `unread_calls`, naming the key and what to do.
    """
    for key in CALLS:
        if row.get(key):
            raise RecordError(
                "unread_calls",
                f"{where} holds {str(row[key])[:80]!r} under '{key}', which is not read: write a call as text of its "
                "answer, as the model is to write it, and tools into data.template.init_args.arguments of HFChat; "
                f"ignore_keys: [{key}] of the source leaves it out",
            )


def refuse_marks(record: Record) -> Record:
    """Refuse a record whose text still holds marks of pictures, as their letters would be trained.

    Returns:
        the record.

    Raises:
        RecordError: `image_count` for `<image>`, `unread_media` for Qwen-VL's `<img>PATH</img>`.
    """
    for message in record.messages:
        text = message.text
        if MARK in text:
            raise RecordError(
                "image_count", f"{text.count(MARK)} {MARK} marks in the text that no picture of the record stands for"
            )
        if "</img>" in text and (found := QWEN_MARK.search(text)):
            raise RecordError(
                "unread_media",
                f"the text names a picture as {found[0][:80]!r}: write {MARK} instead, and its path under 'images'",
            )
    return record


def row_images(row: Mapping[str, Any], links: bool) -> list[Image]:
    """The pictures that a row holds under `images` or `image`, in order.

    Args:
        row: a row of a file.
        links: whether picture files may be links that leave the image folder.

    Raises:
        RecordError: as `image_of`, and `malformed` when the two keys hold different pictures.
    """
    found = {key: row[key] for key in IMAGE_KEYS if not is_nothing(row.get(key))}
    lists = {key: list(value) if isinstance(value, list | tuple) else [value] for key, value in found.items()}
    if len(lists) == 2 and lists["images"] != lists["image"]:
        raise RecordError("malformed", "'image' and 'images' hold different pictures; expected one of the two keys")
    for key, values in lists.items():
        return [image_of(value, f"'{key}'", links) for value in values]
    return []


def image_of(value: Any, where: str, links: bool = False) -> Image:
    """Make an image of a value in a row.

    Args:
        value: a path, a `data:` or `file:` URI, bytes, or an object with one of these under `bytes`, `path` or `url`.
        where: names the place in errors.
        links: whether its file may be a link that leaves the image folder.

    Raises:
        RecordError: `remote_image` for an address in the network, `corrupt_image` for a broken `data:` URI, `malformed`
            for anything else.
    """
    if isinstance(value, Mapping):
        key = next((key for key in ("bytes", "path", "url") if not is_nothing(value.get(key))), "")
        value = value.get(key, value)
        if key == "bytes" and isinstance(value, str):  # JSON holds no bytes
            value = decode_base64(value, where)
    if isinstance(value, bytes) and value:
        return Image(data=value)
    if not isinstance(value, str) or not value:
        raise RecordError(
            "malformed",
            f"{where} is {str(value)[:80]!r}; expected a path, a data: or file: URI, bytes, or {{bytes, path}}, "
            "or a list of these",
        )
    scheme = value[:16].split(":", 1)[0].lower() if ":" in value[:16] else ""
    if scheme == "data":
        return Image(data=_data_uri(value, where))
    if scheme == "file":
        parts = urlsplit(value)
        if parts.netloc not in ("", "localhost"):
            raise RecordError(
                "malformed", f"{where} is {value[:200]!r}: a file: URI has three slashes, file:///FOLDER/NAME"
            )
        return Image(path=unquote(parts.path), links=links)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", value):
        raise RecordError(
            "remote_image",
            f"{where} is {value[:200]!r}: pictures are not fetched while training; download them and give their paths",
        )
    return Image(path=value, links=links)


def decode_base64(text: str, where: str) -> bytes:
    """Decode the bytes of a picture in a row.

    Args:
        text: the base64 text.
        where: names the place in errors.

    Raises:
        RecordError: `corrupt_image` for text that is not base64.
    """
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise RecordError("corrupt_image", f"{where} is not base64: {error}") from error


def _data_uri(text: str, where: str) -> bytes:
    head, comma, content = text.partition(",")
    if not comma or not content:
        raise RecordError("corrupt_image", f"{where} is a data: URI without content: {text[:80]!r}")
    if head.lower().endswith(";base64"):
        return decode_base64("".join(unquote(content).split()), where)
    return unquote_to_bytes(content)
