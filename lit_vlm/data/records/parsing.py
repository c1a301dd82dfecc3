"""The chat form as JSON or as a row of a table: from a dictionary to a record."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any, cast

from lit_vlm.data.records.media import (
    IMAGE_KEYS,
    MARK,
    MEDIA_PARTS,
    image_of,
    is_nothing,
    refuse_calls,
    refuse_marks,
    refuse_unread,
    row_images,
    urls_of,
)
from lit_vlm.data.records.record import ROLES, Content, Image, Message, Record, RecordError, Role, Text

PICTURE_PARTS = ("image", "image_url")
"""Types of message parts that are pictures."""
ADVICE = f"name pictures under 'images', with a mark {MARK} in the text for each, or as parts of type image"


def parse_record(raw: Any, source: str, default_id: str, links: bool = False) -> Record:
    """Make a record of a row in the chat form, which `record.schema.json` describes.

    Besides `messages` there may be pictures under `images` (or `image`). They are taken in order by the marks `<image>`
    in the text and by parts of type image without a path, as ms-swift, LLaMA-Factory and TRL write it; also by parts
    whose path is only the picture's name, if marks and parts together are as many as the pictures. In place of
    `messages` there may be `texts`, a list of `{user, assistant}` (the_cauldron, FineVision), or `query` and `response`
    with `system` and `history` (ms-swift).

    Args:
        raw: the row.
        source: name of the row's source.
        default_id: id of a row that has none.
        links: whether files of pictures may be links that leave the image folder.

    Raises:
        RecordError: naming the key that is wrong, what was found, and what was expected.
    """
    if not isinstance(raw, Mapping):
        raise RecordError("malformed", f"a record is an object with a non-empty list 'messages', not {str(raw)[:80]!r}")
    images = row_images(raw, links)
    turns, key = _turns(raw, len(images))
    pictures = _Pictures(images, links, _name_only(turns, images, links))
    messages = tuple(pictures.message(turn, f"{key}[{i}]") for i, turn in enumerate(turns))
    pictures.check_count()
    options = [] if raw.get("options") is None else raw["options"]
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise RecordError("malformed", "'options' is a list of strings")
    identity = default_id if raw.get("id") is None else raw["id"]
    if not isinstance(identity, str | int) or isinstance(identity, bool):
        raise RecordError("malformed", f"'id' is a string or an integer, not {identity!r}")
    record = Record(str(identity), source, messages, tuple(options), urls_of(raw))
    refuse_unread(raw, IMAGE_KEYS, bool(record.images), "the record", ADVICE)
    refuse_calls(raw, "the record")
    return refuse_marks(record)


def is_chat(row: Mapping[str, Any]) -> bool:
    """Whether a row holds what `parse_record` reads; keys with empty values do not count, as tables fill all keys."""
    return any(not is_nothing(row.get(key)) for key in ("messages", "texts")) or _asks(row)


def _asks(row: Mapping[str, Any]) -> bool:
    return not is_nothing(row.get("query")) and "response" in row


def _turns(raw: Mapping[str, Any], num_images: int) -> tuple[list[Any], str]:
    """The messages as dictionaries, and the key that they come from."""
    for key in ("messages", "texts"):
        value = raw.get(key)
        if is_nothing(value):
            continue
        if not isinstance(value, list):
            raise RecordError("malformed", f"'{key}' is a {type(value).__name__}; expected a non-empty list")
        return (_cauldron(value, num_images) if key == "texts" else value), key
    if _asks(raw):
        return _query(raw), "query"
    raise RecordError(
        "malformed", "a record is an object with a non-empty list 'messages' (or 'texts', or 'query' and 'response')"
    )


def _cauldron(pairs: list[Any], num_images: int) -> list[Any]:
    """Turns of pairs of question and answer; if no text marks a picture, all stand in front of the first question."""
    turns: list[dict[str, Any]] = []
    for number, pair in enumerate(pairs):
        sides = [pair.get(role) if isinstance(pair, Mapping) else None for role in ("user", "assistant")]
        if not all(isinstance(side, str) for side in sides):
            raise RecordError("malformed", f"texts[{number}] is {str(pair)[:80]!r}; expected {{user, assistant}}")
        turns += [{"role": "user", "content": sides[0]}, {"role": "assistant", "content": sides[1]}]
    if num_images and not any(MARK in turn["content"] for turn in turns):
        turns[0]["content"] = MARK * num_images + f"\n{turns[0]['content']}"
    return turns


def _query(raw: Mapping[str, Any]) -> list[Any]:
    history, system = [] if raw.get("history") is None else raw["history"], raw.get("system")
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise RecordError("malformed", f"'history' is {str(history)[:80]!r}; expected a list of [query, response]")
    turns = [] if is_nothing(system) else [{"role": "system", "content": system}]
    for query, response in (*history, (raw["query"], raw.get("response"))):
        turns += [{"role": "user", "content": query}, {"role": "assistant", "content": response}]
    return turns


def _name_only(turns: Sequence[Any], images: Sequence[Image], links: bool) -> bool:
    """Whether the paths of image parts are only names of the row's pictures, and no further pictures.

    They are names if marks and parts without a path are fewer than the pictures, but as many together with the parts
    that have one, and each path has the same file name as the picture that it stands for.
    """
    if not images:
        return False
    places = [place for turn in turns if isinstance(turn, Mapping) for place in _places(turn.get("content"), links)]
    if places.count(None) == len(images) or len(places) != len(images):
        return False
    names = [(name, image.path) for name, image in zip(places, images, strict=True)]
    return all(PurePath(a).name == PurePath(b).name for a, b in names if a is not None and b is not None)


def _places(content: Any, links: bool) -> Iterator[str | None]:
    """Yield the path of each image part, and None for each mark and each part without one; skip parts with bytes."""
    for part in content if isinstance(content, list) else [{"type": "text", "text": content}]:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            yield from [None] * part["text"].count(MARK)
        elif kind in PICTURE_PARTS:
            found = _picture_of(part)
            try:
                image = Image() if found is None else image_of(found, "", links)
            except RecordError:
                continue  # the error is raised when the part is read
            if image.data is None:
                yield image.path


def _picture_of(part: Mapping[str, Any]) -> Any:
    """The value of an image part that says where its picture is, or None."""
    return next((part[key] for key in ("image", "image_url", "url", "path") if not is_nothing(part.get(key))), None)


class _Pictures:
    """Reads messages, and hands the pictures of the row to marks and to parts without a path, or with a mere name."""

    def __init__(self, images: Sequence[Image], links: bool, name_only: bool) -> None:
        self.images, self.links, self.name_only, self.asked = images, links, name_only, 0

    def check_count(self) -> None:
        """Refuse a row with more pictures than places or fewer; raises `RecordError`."""
        if self.asked != len(self.images):
            raise RecordError(
                "image_count",
                f"{self.asked} {MARK} marks in the text or image parts without a path, {len(self.images)} pictures in "
                "'images' (or 'image')",
            )

    def message(self, raw: Any, where: str) -> Message:
        """Make a message of a turn; raises `RecordError` naming the key that is wrong."""
        if not isinstance(raw, Mapping):
            raise RecordError("malformed", f"{where} is an object with 'role' and 'content'")
        if raw.get("role") not in ROLES:
            raise RecordError("unknown_role", f"{where}.role is {raw.get('role')!r}; roles: {', '.join(ROLES)}")
        refuse_unread(raw, (), False, where, ADVICE)
        refuse_calls(raw, where)
        content = raw.get("content")
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not isinstance(content, list):
            raise RecordError("malformed", f"{where}.content is a string or a list of parts")
        parts = [part for i, one in enumerate(content) for part in self._parts(one, f"{where}.content[{i}]")]
        return Message(cast(Role, raw["role"]), tuple(parts))

    def _parts(self, raw: Any, where: str) -> Iterator[Content]:
        kind = raw.get("type") if isinstance(raw, Mapping) else None
        if kind == "text" and isinstance(raw.get("text"), str) and isinstance(raw.get("loss"), bool | None):
            refuse_unread(raw, (), False, where, ADVICE)
            yield from self._in_text(raw["text"], raw.get("loss"))
        elif kind in PICTURE_PARTS:
            found = _picture_of(raw)
            own = Image() if found is None else image_of(found, where, self.links)
            named = self.name_only and own.data is None
            yield self._next() if found is None or named else own
        elif kind in MEDIA_PARTS:
            raise RecordError("unread_media", f"{where} is of type {kind}, which is not read: {ADVICE}")
        else:
            raise RecordError(
                "malformed",
                f"{where} is {str(raw)[:80]!r}; expected {{'type': 'text', 'text': ...}} or {{'type': 'image', "
                "'image': PATH}}",
            )

    def _in_text(self, text: str, loss: bool | None) -> Iterator[Content]:
        """Yield a text whole, or in pieces with a picture at each mark."""
        for number, piece in enumerate(text.split(MARK)):
            if number:
                yield self._next()
            if piece or piece == text:
                yield Text(piece, loss)

    def _next(self) -> Image:
        """The next picture of the row, or an empty image where none is left, which `check_count` then refuses."""
        self.asked += 1
        return self.images[self.asked - 1] if self.asked <= len(self.images) else Image()
