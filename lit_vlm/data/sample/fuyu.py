"""Fuyu: the prompt that Fuyu-8B was published with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lit_vlm.data.records import Image, Message
from lit_vlm.data.sample.chat_template import as_value
from lit_vlm.data.sample.templates import Piece, Span, Template, closes_with_loss, content_of

START, ANSWER = "<s>", "<0x04>"
ANSWER_LINE = f"\n{ANSWER}"


class Fuyu(Template):
    r"""`IMAGES<s>question\n<0x04>answer|ENDOFTEXT|`: Fuyu-8B (Adept 2023), as its processor and model card write it.

    The pictures of the first question stand in front of everything, the token that starts a text behind them; `<0x04>`
    begins the answer, and the tokenizer's end-of-sequence token closes it. Published are one picture and one question.
    Ours: several pictures side by side, a system text as a line of its own, and further turns behind the answer.
    """

    own_start = True

    def as_jinja(self, image: str) -> str:
        """The jinja template that writes the same, as pictures in front of the text are no turn's own.

        Args:
            image: what stands for a picture.
        """
        begins, close = _put(ANSWER_LINE), "{{- eos_token -}}"
        lines = [
            "{%- macro pictures(content) -%}{%- if content is not string -%}{%- for part in content -%}",
            "{%- if part['type'] == 'image' -%}" + _put(image) + "{%- endif -%}",
            "{%- endfor -%}{%- endif -%}{%- endmacro -%}",
            "{%- macro write(content, placed) -%}{%- if content is string -%}{{- content -}}{%- else -%}",
            "{%- for part in content -%}{%- if part['type'] == 'text' -%}{{- part['text'] -}}",
            "{%- elif part['type'] != 'image' -%}",
            "{{- raise_exception('this model takes text and images, not ' ~ part['type']) -}}",
            "{%- elif placed -%}" + _put(image) + "{%- endif -%}{%- endfor -%}{%- endif -%}{%- endmacro -%}",
            "{%- if messages and messages[0]['role'] == 'system' -%}",
            "{%- set turns = messages[1:] -%}{%- set system = messages[0]['content'] -%}",
            "{%- else -%}{%- set turns = messages -%}{%- set system = " + as_value(self.system) + " -%}{%- endif -%}",
            "{{- pictures(system) -}}{%- if turns -%}{{- pictures(turns[0]['content']) -}}{%- endif -%}" + _put(START),
            "{%- set said = write(system, false) -%}{%- if said -%}{{- said -}}" + _put("\n") + "{%- endif -%}",
            "{%- for message in turns -%}",
            "{%- if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}",
            "{{- raise_exception('user and assistant must alternate, and the user begins') -}}{%- endif -%}",
            "{{- write(message['content'], not loop.first) -}}",
            "{%- if message['role'] == 'assistant' -%}" + close,
            "{%- elif not loop.last or add_generation_prompt -%}" + begins + "{%- endif -%}",
            "{%- endfor -%}",
        ]
        return "".join(lines)

    def _turns(self, system: Sequence[Piece], turns: Sequence[Message], eos: str) -> Iterator[Piece]:
        first = [*system, *(turns[0].content if turns else ())]
        yield from (part for part in first if isinstance(part, Image))
        yield Span(START, mark=True)
        said = [piece for piece in system if isinstance(piece, Span)]
        yield from [*said, Span("\n")] if said else ()
        for index, message in enumerate(turns):
            if message.role == "user":
                yield from (piece for piece in content_of(message, False) if index or isinstance(piece, Span))
                yield Span("\n")
                yield Span(ANSWER, mark=True)
            else:
                yield from content_of(message, supervised=True)
                yield Span(eos, closes_with_loss(message), mark=True)


def _put(text: str) -> str:
    return "{{- " + as_value(text) + " -}}"
