"""A request of OpenAI's chat API as a conversation of records, and errors in the form that its clients read."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from lit_vlm.core.sampling import Sampling
from lit_vlm.data.records import Content, Image, Message, RecordError, Text
from lit_vlm.data.records.media import image_of

NEUTRAL: dict[str, Any] = {
    "n": 1, "stop": None, "presence_penalty": 0, "frequency_penalty": 0, "logit_bias": None, "logprobs": False,
    "top_logprobs": None, "tools": None, "tool_choice": "none", "functions": None, "function_call": None,
    "response_format": {"type": "text"}, "seed": None, "modalities": ["text"], "audio": None, "prediction": None,
    "web_search_options": None, "reasoning_effort": None,
}  # fmt: skip
"""Fields of the API that change an answer and are not supported → the value that changes nothing."""


class Refused(ValueError):
    """A request that is answered with an error.

    Attributes:
        status: of HTTP.
        code: short name of the kind of error, for programs.
    """

    def __init__(self, message: str, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


def error_body(message: str, status: int, code: str | None = None) -> dict[str, Any]:
    """An error as clients of the API read it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


class _TextPart(BaseModel):
    type: Literal["text"]
    text: str


class _ImageUrl(BaseModel):
    url: str


class _ImagePart(BaseModel):
    type: Literal["image_url"]
    image_url: _ImageUrl | str


class ChatMessage(BaseModel):
    """One turn: text, or a list of texts and pictures."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Annotated[_TextPart | _ImagePart, Field(discriminator="type")]]


class StreamOptions(BaseModel):
    """What is sent besides the text of an answer."""

    include_usage: bool = False


class ChatRequest(BaseModel):
    """What `/v1/chat/completions` is sent; of other fields, those that would change an answer are refused."""

    model_config = ConfigDict(extra="allow")

    messages: list[ChatMessage] = Field(min_length=1)
    model: str = ""
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float = Field(default=0.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    stream: bool = False
    stream_options: StreamOptions | None = None


@dataclass(frozen=True)
class Asked:
    """What a worker is to answer.

    Attributes:
        model: name of the run.
        messages: the conversation, with pictures as bytes.
        sampling: how it is answered.
        seen: whether what the model sees is wanted in place of its answer.
    """

    model: str
    messages: tuple[Message, ...]
    sampling: Sampling
    seen: bool = False


def addresses(request: ChatRequest) -> list[str]:
    """Where the pictures of a request are, in order."""
    return [
        part.image_url if isinstance(part.image_url, str) else part.image_url.url
        for message in request.messages
        if not isinstance(message.content, str)
        for part in message.content
        if isinstance(part, _ImagePart)
    ]


def asked(request: ChatRequest, models: Collection[str], most_tokens: int, fetched: dict[str, bytes]) -> Asked:
    """What a request asks.

    Args:
        request: the request.
        models: names of the runs that answer.
        most_tokens: the longest answer in tokens, which is also the default.
        fetched: address → content of the pictures that are not in the request itself.

    Raises:
        Refused: naming the field and what it may be.
    """
    sent = request.model_extra or {}
    for field, neutral in NEUTRAL.items():
        if sent.get(field) not in (None, neutral, [], {}):
            raise Refused(f"{field} is not supported: leave it out", code="unsupported_parameter")
    model = request.model or (next(iter(models)) if len(models) == 1 else "")
    if model not in models:
        raise Refused(f"there is no model {model!r}, only {', '.join(models)}", 404, "model_not_found")
    limit = request.max_completion_tokens or request.max_tokens or most_tokens
    if limit > most_tokens:
        raise Refused(f"answers have {most_tokens} tokens at most, not {limit} (--max-new-tokens of the server)")
    if request.messages[-1].role != "user":
        raise Refused(f"the last message must be the user's, not of the {request.messages[-1].role}")
    messages = tuple(_message(message, fetched) for message in request.messages)
    return Asked(model, messages, Sampling(limit, request.temperature, request.top_p))


def _message(message: ChatMessage, fetched: dict[str, bytes]) -> Message:
    role: Literal["system", "user", "assistant"] = "system" if message.role == "developer" else message.role
    if isinstance(message.content, str):
        return Message(role, (Text(message.content),))
    parts: list[Content] = []
    for part in message.content:
        if isinstance(part, _TextPart):
            parts.append(Text(part.text))
        else:
            parts.append(_picture(part.image_url if isinstance(part.image_url, str) else part.image_url.url, fetched))
    return Message(role, tuple(parts))


def _picture(url: str, fetched: dict[str, bytes]) -> Image:
    if url in fetched:
        return Image(data=fetched[url])
    if not is_inline(url):
        raise Refused(
            f"image_url is {url[:80]!r}: send the picture itself as data:image/png;base64,... "
            "(or start the server with --allow-url PREFIX)",
            code="invalid_image_url",
        )
    try:
        return image_of(url, "image_url")
    except RecordError as error:
        raise Refused(error.detail, code="invalid_image_url") from error


def is_inline(url: str) -> bool:
    """Whether an address holds the picture itself."""
    return url[:5].lower() == "data:"


def allowed(url: str, prefixes: Sequence[str]) -> bool:
    """Whether a picture may be fetched: the server's operator named how its address begins."""
    return any(url.startswith(prefix) for prefix in prefixes)
