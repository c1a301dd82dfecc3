"""Requests of OpenAI's chat API: what they become, and what is refused."""

from __future__ import annotations

import base64
import io
from typing import Any

import pytest
from PIL import Image as PILImage

from lit_vlm.core.sampling import Sampling
from lit_vlm.data.records import Image, Message, Text
from lit_vlm.serving.requests import ChatRequest, Refused, addresses, allowed, asked

RED = io.BytesIO()
PILImage.new("RGB", (8, 8), "red").save(RED, "PNG")
URI = "data:image/png;base64," + base64.b64encode(RED.getvalue()).decode()
PICTURED = [{"type": "image_url", "image_url": {"url": URI}}, {"type": "text", "text": "What?"}]


def read(content: Any = "What?", models: tuple[str, ...] = ("one",), **fields: Any) -> Any:
    messages = fields.pop("messages", [{"role": "user", "content": content}])
    return asked(ChatRequest(messages=messages, **fields), models, 32, {"http://here/a.png": b"fetched"})


def test_a_conversation_becomes_messages() -> None:
    found = read(
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": PICTURED},
            {"role": "assistant", "content": "red"},
            {"role": "user", "content": [{"type": "image_url", "image_url": "http://here/a.png"}]},
        ],
        temperature=0.5, top_p=0.9, max_tokens=7,
    )  # fmt: skip
    assert found.messages == (
        Message("system", (Text("Be brief."),)),
        Message("user", (Image(data=RED.getvalue()), Text("What?"))),
        Message("assistant", (Text("red"),)),
        Message("user", (Image(data=b"fetched"),)),
    )
    assert found.sampling == Sampling(7, 0.5, 0.9)
    assert found.model == "one"


def test_what_is_left_out_is_greedy_and_as_long_as_the_server_allows() -> None:
    assert read().sampling == Sampling(32, 0.0, 1.0)
    assert read(max_completion_tokens=5, max_tokens=9).sampling.max_new_tokens == 5
    assert read(models=("one", "two"), model="two").model == "two"


@pytest.mark.parametrize(
    "neutral", [{"n": 1}, {"stop": None}, {"tools": []}, {"presence_penalty": 0.0}, {"user": "me"}, {"logprobs": False}]
)
def test_fields_that_change_nothing_are_taken(neutral: dict[str, Any]) -> None:
    read(**neutral)


@pytest.mark.parametrize(
    ("fields", "status", "message"),
    [
        ({"n": 2}, 400, "n is not supported"),
        ({"stop": ["\n"]}, 400, "stop is not supported"),
        ({"tools": [{"type": "function"}]}, 400, "tools is not supported"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format is not supported"),
        ({"seed": 0}, 400, "seed is not supported"),
        ({"model": "two"}, 404, "there is no model 'two', only one"),
        ({"models": ("one", "two")}, 404, "there is no model '', only one, two"),
        ({"max_tokens": 33}, 400, "32 tokens at most, not 33"),
        ({"messages": [{"role": "assistant", "content": "Hm"}]}, 400, "the last message must be the user's"),
        ({"content": [{"type": "image_url", "image_url": {"url": "/etc/passwd"}}]}, 400, "send the picture itself"),
        ({"content": [{"type": "image_url", "image_url": "file:///etc/passwd"}]}, 400, "send the picture itself"),
        ({"content": [{"type": "image_url", "image_url": "https://elsewhere/a.png"}]}, 400, "--allow-url"),
        ({"content": [{"type": "image_url", "image_url": "data:image/png;base64,@"}]}, 400, "is not base64"),
    ],
)
def test_what_is_refused(fields: dict[str, Any], status: int, message: str) -> None:
    with pytest.raises(Refused, match=message.replace("(", r"\(")) as refused:
        read(**fields)
    assert refused.value.status == status


def test_pictures_are_fetched_from_named_places_alone() -> None:
    request = ChatRequest(messages=[{"role": "user", "content": [*PICTURED, *PICTURED]}])  # type: ignore[list-item]
    assert addresses(request) == [URI, URI]
    assert allowed("https://good.example/a.png", ["https://good.example/"])
    assert not allowed("https://good.example.evil/a.png", ["https://good.example/"])
    assert not allowed("https://good.example/a.png", [])
