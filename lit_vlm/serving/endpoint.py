"""The HTTP side: `/v1/chat/completions` and `/v1/models`, in OpenAI's form, and a page to talk to."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from litserve.specs.base import LitSpec
from litserve.utils import ResponseBufferItem
from starlette.exceptions import HTTPException as StarletteHTTPException

from lit_vlm.serving.requests import Asked, ChatRequest, Refused, addresses, allowed, asked, error_body, is_inline
from lit_vlm.serving.worker import Reply

PAGE = "/chat"
"""Path of the page."""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; connect-src 'self'"
"""What the page may load and ask: itself alone."""
MAX_FETCHED = 20 * 2**20
"""Most bytes of a picture that is fetched."""
FETCH_S = 10.0
"""How long a picture may take that is fetched."""


class ChatEndpoint(LitSpec):
    """Conversations with pictures, whole or as a stream of server-sent events.

    Args:
        models: names of the runs.
        most_tokens: longest answer in tokens.
        left: folder for a file per request whose client has gone, as `Runs` reads it.
        prefixes: how addresses begin that pictures are fetched from.
        page: whether there is a page to talk to, at `PAGE`, and `/v1/seen`, which it asks.
    """

    def __init__(
        self,
        models: Sequence[str],
        most_tokens: int,
        left: Path,
        prefixes: Sequence[str] = (),
        page: bool = False,
    ) -> None:
        super().__init__()
        self.page, self.left = page, left
        self.api_path = "/v1/chat/completions"
        self.models, self.most_tokens, self.prefixes = list(models), most_tokens, list(prefixes)
        self.started = int(time.time())

    @property
    def stream(self) -> bool:
        """Pieces of answers are sent as they come; whoever wants an answer whole gets them joined."""
        return True

    def pre_setup(self, lit_api: Any) -> None:
        """Name the paths."""
        self.add_endpoint("/v1/chat/completions", self.chat, ["POST"])
        self.add_endpoint("/v1/models", self.list_models, ["GET"])
        if self.page:
            self.add_endpoint(PAGE, self.show_page, ["GET"])
            self.add_endpoint("/v1/seen", self.show_seen, ["POST"])

    def decode_request(self, request: Any, context_kwargs: Any) -> Any:
        """Requests are read in `chat`."""
        raise NotImplementedError

    def encode_response(self, output: Any, context_kwargs: Any) -> Any:
        """Answers are written in `chat`."""
        raise NotImplementedError

    async def list_models(self) -> Response:
        """The runs that can be asked."""
        entries = [
            {"id": name, "object": "model", "created": self.started, "owned_by": "lit-vlm"} for name in self.models
        ]
        return JSONResponse({"object": "list", "data": entries})

    async def show_page(self) -> Response:
        """The page, which loads nothing from elsewhere."""
        content = files("lit_vlm.serving").joinpath("page.html").read_text(encoding="utf-8")
        return HTMLResponse(content, headers={"Content-Security-Policy": POLICY})

    async def show_seen(self, request: ChatRequest) -> Response:
        """What the model sees of a conversation: the prompt with the places of pictures, and them as it gets them."""
        try:
            question = asked(request, self.models, self.most_tokens, await self._fetched(request))
        except Refused as error:
            return _refusal(error)
        async with aclosing(self._replies(replace(question, seen=True))) as replies:
            only = await anext(replies)
        return _refusal(only.refused) if only.refused else JSONResponse(json.loads(only.text))

    async def chat(self, request: ChatRequest, connection: Request) -> Response:
        """Answer a conversation."""
        try:
            question = asked(request, self.models, self.most_tokens, await self._fetched(request))
        except Refused as error:
            return _refusal(error)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": question.model}
        replies = self._replies(question)
        # The first piece decides between an answer and an error, which a stream that has begun cannot have.
        first = await anext(replies)
        if first.refused:
            await replies.aclose()
            return _refusal(first.refused)
        if request.stream:
            with_usage = bool(request.stream_options and request.stream_options.include_usage)
            return StreamingResponse(_events(head, first, replies, with_usage), media_type="text/event-stream")
        text = first.text
        last = first
        async with aclosing(replies):
            async for last in replies:
                text += last.text
                if await connection.is_disconnected():  # a stream ends with its client, and this handler does not
                    return Response()
        if last.refused:
            return _refusal(last.refused)
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": last.ended}
        return JSONResponse({**head, "object": "chat.completion", "choices": [choice], "usage": _usage(last)})

    async def _replies(self, question: Asked) -> AsyncGenerator[Reply]:
        """The pieces of an answer; the last one has an end or a refusal."""
        uid = uuid.uuid4()
        item = ResponseBufferItem(response_queue=deque(), event=asyncio.Event())
        self.response_buffer[uid] = item
        wanted = True
        try:
            entry = (self.response_queue_id, uid, time.monotonic(), question)
            await asyncio.to_thread(self.request_queue.put, entry)
            async with aclosing(self.data_streamer(item.response_queue, item.event)) as pieces:
                async for reply in pieces:
                    wanted = not (reply.ended or reply.refused)
                    yield reply
                    if not wanted:
                        return
            yield Reply(refused=Refused("the process that answers has ended", 500))
        finally:  # a client that has gone leaves nothing behind
            self.response_buffer.pop(uid, None)
            if wanted:
                with suppress(OSError):  # the server ends as well
                    (self.left / str(uid)).touch()

    async def _fetched(self, request: ChatRequest) -> dict[str, bytes]:
        """The pictures that are not in the request and may be fetched."""
        wanted = [url for url in addresses(request) if not is_inline(url) and allowed(url, self.prefixes)]
        return {url: await _fetch(url) for url in dict.fromkeys(wanted)}


async def _fetch(url: str) -> bytes:
    """The content at an address that is allowed; redirections, which may lead anywhere, are not followed."""
    content = b""
    try:
        async with asyncio.timeout(FETCH_S), httpx.AsyncClient() as client, client.stream("GET", url) as answer:
            if answer.status_code != 200:
                raise Refused(f"{url[:200]} answers with status {answer.status_code}", code="invalid_image_url")
            async for chunk in answer.aiter_bytes():
                content += chunk
                if len(content) > MAX_FETCHED:
                    raise Refused(f"{url[:200]} has over {MAX_FETCHED >> 20} MiB", code="invalid_image_url")
    except TimeoutError as error:
        raise Refused(f"{url[:200]} takes over {FETCH_S:.0f} s", code="invalid_image_url") from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        why = str(error) or type(error).__name__
        raise Refused(f"{url[:200]} cannot be fetched: {why}", code="invalid_image_url") from error
    return content


async def _events(
    head: Mapping[str, Any], first: Reply, replies: AsyncGenerator[Reply], with_usage: bool
) -> AsyncIterator[str]:
    """An answer as server-sent events."""

    def event(delta: Mapping[str, str], ended: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": ended}
        return _data({**head, "object": "chat.completion.chunk", "choices": [choice]})

    yield event({"role": "assistant", "content": ""})
    last = first
    if first.text:
        yield event({"content": first.text})
    async with aclosing(replies):
        async for last in replies:
            if last.text:
                yield event({"content": last.text})
    if last.refused:
        yield _data(error_body(str(last.refused), last.refused.status, last.refused.code))
        return
    yield event({}, last.ended)
    if with_usage:
        yield _data({**head, "object": "chat.completion.chunk", "choices": [], "usage": _usage(last)})
    yield "data: [DONE]\n\n"


def _data(body: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def _usage(last: Reply) -> dict[str, int]:
    total = last.prompt_tokens + last.completion_tokens
    return {
        "prompt_tokens": last.prompt_tokens, "completion_tokens": last.completion_tokens, "total_tokens": total
    }  # fmt: skip


def _refusal(error: Refused) -> Response:
    return JSONResponse(error_body(str(error), error.status, error.code), status_code=error.status)


def errors_in_one_form(app: FastAPI) -> None:
    """Let errors that FastAPI and LitServe find have the form of all others."""

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        return _refusal(Refused(f"{where or 'the body'}: {first['msg']}"))

    async def of_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, StarletteHTTPException)
        return JSONResponse(error_body(str(error.detail), error.status_code), status_code=error.status_code)

    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(StarletteHTTPException, of_http)
    app.add_exception_handler(HTTPException, of_http)
