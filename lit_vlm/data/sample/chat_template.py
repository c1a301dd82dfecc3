"""Templates of the kit as the jinja that transformers' chat templates are written in."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lit_vlm.data.records import Image, Message, RecordError, Text
from lit_vlm.data.sample.templates import Piece, Span, Template

IMAGE_MARK = "<image>"
"""What stands for an image in the text of a prompt."""
_SYSTEM, _USER, _ANSWER = "\ue000", "\ue001", "\ue002"
_PICTURE = Image(path="picture")


class _Parts(NamedTuple):
    """The text that a template writes around what people and models say.

    Attributes:
        start: in front of the first question, where the conversation has no system text.
        before_system: in front of a system text; None where it is not written.
        after_system: between a system text and the first question.
        without_system: in front of the first question, where the conversation's system text is empty.
        answered: between a question and its answer.
        asked: behind the last question, where the answer begins.
        between: between an answer and the next question; None for a template of a single question.
        end: behind the last answer.
        asks: whether the text of questions is written.
    """

    start: str
    before_system: str | None
    after_system: str
    without_system: str
    answered: str
    asked: str
    between: str | None
    end: str
    asks: bool


def as_jinja(template: Template, eos: str, bos: str, behind: str = "") -> str:
    """The chat template that writes conversations as a template of the kit does.

    It is found by writing conversations with placeholders and looking at what stands around them, so that it holds for
    templates of other packages too; whether it gives the same ids is for the caller to check.

    Args:
        template: the template.
        eos: text of the tokenizer's end-of-sequence token.
        bos: what stands in front of every text; "" for nothing.
        behind: what stands behind the mark of each image.

    Raises:
        ValueError: for a template that writes a placeholder more than once, text that depends on the turn, or image
            marks that hold the mark of an image.
    """
    if IMAGE_MARK in "".join(template.image_marks or ()):
        raise ValueError(f"data.template: image_marks hold {IMAGE_MARK}, which stands for a picture in chats")
    front, after = template.image_marks or ("", "")
    image = f"{front}{IMAGE_MARK}{behind}{after}"
    if (own := template.as_jinja(image)) is not None:
        return own
    found = _look(template, eos)
    between = found.between or ""
    most = "" if found.between is not None else _only_one(template)
    text = (
        "{{- part['text'] -}}"
        if found.asks
        else "{%- if message['role'] != 'user' -%}{{- part['text'] -}}{%- endif -%}"
    )
    whole = (
        "{{- message['content'] -}}"
        if found.asks
        else ("{%- if message['role'] != 'user' -%}{{- message['content'] -}}{%- endif -%}")
    )
    return "".join(
        [
            "{%- macro write(message) -%}",
            "{%- if message['content'] is string -%}",
            whole,
            "{%- else -%}{%- for part in message['content'] -%}",
            "{%- if part['type'] == 'image' -%}",
            _literal(image),
            "{%- elif part['type'] == 'text' -%}",
            text,
            "{%- else -%}{{- raise_exception('this model takes text and images, not ' ~ part['type']) -}}{%- endif -%}",
            "{%- endfor -%}{%- endif -%}",
            "{%- endmacro -%}",
            _literal(bos),
            "{%- if messages and messages[0]['role'] == 'system' -%}",
            "{%- set turns = messages[1:] -%}",
            "{%- set said = write(messages[0]) -%}",
            *_system(found),
            "{%- else -%}{%- set turns = messages -%}",
            _literal(found.start),
            "{%- endif -%}",
            most,
            "{%- for message in turns -%}",
            "{%- if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}",
            "{{- raise_exception('user and assistant must alternate, and the user begins') -}}",
            "{%- endif -%}",
            "{{- write(message) -}}",
            "{%- if message['role'] == 'user' -%}",
            "{%- if not loop.last -%}" + _literal(found.answered),
            "{%- elif add_generation_prompt -%}" + _literal(found.asked) + "{%- endif -%}",
            "{%- elif loop.last -%}" + _literal(found.end) + "{%- else -%}" + _literal(between) + "{%- endif -%}",
            "{%- endfor -%}",
        ]
    )


def _system(found: _Parts) -> list[str]:
    """What stands in front of the first question where the conversation has a system text, `said`."""
    if found.before_system is None:
        return [_literal(found.without_system)]
    return [
        "{%- if said -%}",
        _literal(found.before_system) + "{{- said -}}" + _literal(found.after_system),
        "{%- else -%}" + _literal(found.without_system) + "{%- endif -%}",
    ]


def joining(image: str, system: str, parts: bool) -> str:
    """Jinja in front of a chat template that takes texts, for chats whose messages may be lists of parts.

    Args:
        image: what stands for a picture.
        system: system text of chats without one; "" for none.
        parts: whether the template takes a list of one text in place of a text.
    """
    content = "[{'type': 'text', 'text': written.text}]" if parts else "written.text"
    started = as_value([{"role": "system", "content": system}] if system else [])
    return "".join(
        [
            "{%- set joined = namespace(messages=[]) -%}",
            f"{{%- if messages[0]['role'] != 'system' -%}}{{%- set messages = {started} + messages -%}}{{%- endif -%}}",
            "{%- for message in messages -%}",
            "{%- set written = namespace(text='') -%}",
            "{%- if message['content'] is string -%}{%- set written.text = message['content'] -%}",
            "{%- else -%}{%- for part in message['content'] -%}",
            f"{{%- if part['type'] == 'image' -%}}{{%- set written.text = written.text + {as_value(image)} -%}}",
            "{%- elif part['type'] == 'text' -%}{%- set written.text = written.text + part['text'] -%}",
            "{%- else -%}{{- raise_exception('this model takes text and images, not ' ~ part['type']) -}}{%- endif -%}",
            "{%- endfor -%}{%- endif -%}",
            f"{{%- set joined.messages = joined.messages + [dict(message, content={content})] -%}}",
            "{%- endfor -%}{%- set messages = joined.messages %}\n",  # a newline behind a block is not written
        ]
    )


def _only_one(template: Template) -> str:
    name = type(template).__name__
    return (
        "{%- if turns | length > 2 -%}"
        f"{{{{- raise_exception('the template {name} takes one question and one answer') -}}}}"
        "{%- endif -%}"
    )


def as_value(value: Any) -> str:
    """A setting as jinja writes it. Letters stay as they are: jinja takes two escapes for one letter apart."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{as_value(key)}: {as_value(one)}' for key, one in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(as_value, value))}]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def _literal(text: str) -> str:
    """A jinja expression that writes a text as it is."""
    return f"{{{{- {as_value(text)} -}}}}" if text else ""


def _look(template: Template, eos: str) -> _Parts:
    """Find the parts of a template by writing conversations of one and two questions."""
    question = Message("user", (_PICTURE, Text(_USER)))
    answer = Message("assistant", (Text(_ANSWER),))
    one = _written(template, template.render([question, answer], eos))
    asks = _USER in one
    mark = _USER if asks else _picture(template)
    start, rest = _split(template, one, mark if not asks else _picture(template) + _USER)
    answered, end = _split(template, rest, _ANSWER)
    _, asked = _split(template, _written(template, template.prompt([question], eos)), mark)
    system = Message("system", (Text(_SYSTEM),))
    before_system, after_system = None, ""
    if _SYSTEM in (opening := _opening(template, system, question, answer, eos, mark)):
        before_system, after_system = _split(template, opening, _SYSTEM)
    silent = Message("system", (Text(""),))
    without_system = _opening(template, silent, question, answer, eos, mark)
    try:
        two = _written(template, template.render([question, answer] * 2, eos))
    except RecordError:
        return _Parts(start, before_system, after_system, without_system, answered, asked, None, end, asks)
    between = two.split(_ANSWER)[1].split(_picture(template))[0]
    again = start + (_picture(template) + _USER + answered + _ANSWER + between) * 2
    if not asks or two != again.removesuffix(between) + end:
        raise ValueError(f"the template {type(template).__name__} writes turns differently by their place")
    return _Parts(start, before_system, after_system, without_system, answered, asked, between, end, asks)


def _opening(template: Template, system: Message, question: Message, answer: Message, eos: str, mark: str) -> str:
    """What a template writes in front of the first question, whose text or picture is `mark`."""
    text = _written(template, template.render([system, question, answer], eos))
    return _split(template, text, mark)[0].removesuffix(_picture(template))


def _picture(template: Template) -> str:
    front, behind = template.image_marks or ("", "")
    return f"{front}{IMAGE_MARK}{behind}"


def _written(template: Template, pieces: Sequence[Piece]) -> str:
    return "".join(piece.text if isinstance(piece, Span) else IMAGE_MARK for piece in pieces)


def _split(template: Template, text: str, mark: str) -> tuple[str, str]:
    before, found, after = text.partition(mark)
    if not found or mark in after:
        raise ValueError(
            f"the template {type(template).__name__} cannot be written as a chat template: it writes a message "
            f"{'more than once' if found else 'not at all'}"
        )
    return before, after
