"""A client that goes: the HTTP side leaves a file with the id of its request, and the worker ends its answer."""

from __future__ import annotations

import asyncio
import queue
import time
import uuid
from collections.abc import Generator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lit_vlm.core.sampling import Sampling

endpoint = pytest.importorskip("lit_vlm.serving.endpoint")

from litserve import LitServer  # noqa: E402
from litserve.utils import LitAPIStatus  # noqa: E402

from lit_vlm.serving.requests import Asked  # noqa: E402
from lit_vlm.serving.worker import Batches, Reply, _Waiting  # noqa: E402

ASKED = Asked("run", (), Sampling(16))


def served(folder: Path, goes_at: dict[int, int], ends_at: dict[int, int], monkeypatch: Any) -> tuple[int, list[int]]:
    """Steps that are taken for a batch whose clients go, or whose answers end, at these steps; who gets pieces."""
    batch = [_Waiting(0, str(uuid.uuid4()), time.monotonic(), ASKED) for _ in {**goes_at, **ends_at}]
    steps, told = 0, []

    def answer(requests: Any) -> Generator[list[Reply | None]]:
        nonlocal steps
        for step in range(100):
            steps += 1
            for row, at in goes_at.items():
                if at == step:
                    (folder / batch[row].uid).touch()
            ended = {row for row, at in ends_at.items() if at <= step}
            yield [
                Reply("a", "stop" if ends_at.get(row) == step else None)
                if row not in ended or ends_at[row] == step
                else None
                for row in range(len(batch))
            ]

    loop = Batches()
    monkeypatch.setattr(loop, "_send", lambda one, reply, transport: told.append(batch.index(one)))
    api: Any = SimpleNamespace(left=folder, answer=answer)
    loop._serve(batch, api, None)  # type: ignore[arg-type]
    assert list(folder.iterdir()) == []
    return steps, told


def test_an_answer_that_nobody_waits_for_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert served(tmp_path, {0: 3}, {}, monkeypatch) == (4, [0] * 4)
    assert served(tmp_path, {0: 3}, {1: 1}, monkeypatch)[0] == 4
    assert served(tmp_path, {0: 3, 1: 7}, {}, monkeypatch)[0] == 8


def test_others_of_the_batch_get_their_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, told = served(tmp_path, {0: 3}, {1: 50}, monkeypatch)
    assert steps == 51
    assert told.count(1) == 51


@pytest.mark.parametrize(("ended", "left"), [(None, True), ("stop", False)])
def test_the_http_side_tells_of_a_client_that_has_gone(ended: str | None, left: bool, tmp_path: Path) -> None:
    async def ask() -> None:
        spec = endpoint.ChatEndpoint(["run"], 16, tmp_path)
        spec.response_buffer, spec.request_queue, spec.response_queue_id = {}, queue.Queue(), 0
        spec.data_streamer = LitServer.data_streamer
        replies = spec._replies(ASKED)
        first = asyncio.ensure_future(anext(replies))
        while not spec.response_buffer:
            await asyncio.sleep(0)
        ((uid, item),) = spec.response_buffer.items()
        item.response_queue.append((Reply("a", ended), LitAPIStatus.OK))
        item.event.set()
        assert (await first).text == "a"
        await replies.aclose()
        assert spec.response_buffer == {}
        assert (tmp_path / str(uid)).exists() == left

    asyncio.run(ask())
