"""The process that answers requests, several at a time, on one device."""

from __future__ import annotations

import base64
import io
import json
import logging
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing, suppress
from itertools import count
from pathlib import Path
from queue import Empty, Queue
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from litserve import LitAPI
from litserve.callbacks import CallbackRunner
from litserve.loops.base import _SENTINEL_VALUE, LitLoop
from litserve.specs.base import LitSpec
from litserve.transport.base import MessageTransport
from litserve.utils import LitAPIStatus, LoopResponseType
from PIL import Image as PILImage
from torch import Tensor

from lit_vlm.core.bits import Kind
from lit_vlm.data.records import Record, RecordError
from lit_vlm.serving.requests import Asked, Refused

if TYPE_CHECKING:
    from lit_vlm.data.sample.encode import Sample
    from lit_vlm.evaluation.asker import Asker

GATHER_S = 0.01
"""How long a first request waits for others that are answered with it."""


class Reply(NamedTuple):
    """One piece of an answer on its way to the process that talks to the client.

    Attributes:
        text: what is new.
        ended: `stop` or `length` with the last piece.
        prompt_tokens: positions of the prompt, those of pictures included.
        completion_tokens: tokens of the answer so far.
        refused: why there is no answer.
    """

    text: str = ""
    ended: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    refused: Refused | None = None


class Runs(LitAPI):
    """Trained runs on one device.

    Args:
        sources: name → checkpoint or folder of a run.
        batch_size: requests that are answered together at most.
        spec: the HTTP side.
        left: folder in which the HTTP side makes a file for each request whose client has gone, named by its id.
        quantise: type of 4 or 8 bits in which blocks are stored.
        sharing: workers that share the threads of a CPU.
    """

    def __init__(
        self,
        sources: Mapping[str, str],
        batch_size: int,
        spec: LitSpec,
        left: Path,
        quantise: Kind | None = None,
        sharing: int = 1,
    ) -> None:
        self.sources, self.left, self.quantise, self.sharing = dict(sources), left, quantise, sharing
        super().__init__(batch_size, api_path="/v1/chat/completions", spec=spec, loop=Batches())

    def setup(self, device: str) -> None:
        """Load all runs."""
        # As in the console script: torchao registers types in a way that PyTorch warns of.
        logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
        from lit_vlm.core.precision import choose
        from lit_vlm.evaluation.asker import load_run

        # Threads beyond the cores would wait for each other by spinning.
        torch.set_num_threads(max(1, torch.get_num_threads() // self.sharing))
        dtype = choose(device.split(":")[0], scaled=False).dtype
        self.askers = {name: load_run(source, device, dtype, self.quantise) for name, source in self.sources.items()}
        sys.stdout.write(f"ready on {device}\n")
        sys.stdout.flush()

    def answer(self, requests: Sequence[Asked]) -> Generator[list[Reply | None]]:
        """Answer requests for one run together.

        Yields:
            after each step what is new of each answer; None where it has ended.
        """
        asker = self.askers[requests[0].model]
        encoded = [_encoded(asker, request) for request in requests]
        first = [_at_once(asker, *one) for one in zip(requests, encoded, strict=True)]
        if any(first):
            yield first
        rows = [row for row, reply in enumerate(first) if reply is None]
        samples = [one for row, one in enumerate(encoded) if row in rows and not isinstance(one, Refused)]
        if not samples:
            return
        for pieces in asker.stream(samples, [requests[row].sampling for row in rows]):
            replies: list[Reply | None] = [None] * len(requests)
            for row, sample, piece in zip(rows, samples, pieces, strict=True):
                if piece is not None:
                    replies[row] = Reply(piece.text, piece.ended, len(sample), piece.num_tokens)
            yield replies


def _encoded(asker: Asker, request: Asked) -> Sample | Refused:
    try:
        return asker.encode([Record("chat", "chat", request.messages)])[0]
    except RecordError as error:
        return Refused(f"{error}", code=error.reason)


def _at_once(asker: Asker, request: Asked, encoded: Sample | Refused) -> Reply | None:
    """What is known without the model's answer; None where that is wanted."""
    if isinstance(encoded, Refused):
        return Reply(refused=encoded)
    if not request.seen:
        return None
    pictures: list[dict[str, Any]] = [
        {
            "png": _png(image),
            "width": image.shape[2],
            "height": image.shape[1],
            "tokens": grid.num_tokens,
            "predicted": [],
        }
        for image, grid in zip(encoded.images, encoded.grids, strict=True)
    ]
    pictured = count()
    prompt = [
        {"picture": next(pictured)} if text is None else {"text": text}
        for text in asker.pieces(Record("chat", "chat", request.messages))
    ]
    from lit_vlm.evaluation.predicted import draw_predictions  # with PyTorch, as a worker has it

    seen: dict[str, Any] = {"prompt": prompt, "positions": len(encoded), "pictures": pictures}
    try:
        predicted = draw_predictions(asker, encoded)
    except Exception as error:  # the others of this batch want answers, and the prompt can be shown without
        predicted, seen["not_predicted"] = {}, f"{type(error).__name__}: {error}"
    for head, places in predicted.items():
        trains = bool(asker.module.stage.losses.get(head))
        for place, drawn in places.items():
            for picture, colours in zip(pictures, drawn, strict=True):
                picture["predicted"].append({"head": head, "read": place, "loss": trains, "png": _png(colours)})
    return Reply(json.dumps(seen), "stop", len(encoded))


def _png(image: Tensor) -> str:
    """Pixels `[3, h, w]` as an address that holds them."""
    buffer = io.BytesIO()
    PILImage.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


class _Waiting(NamedTuple):
    """A request in the queue: who waits for its answer, its id, when it came, and what it asks."""

    consumer: int
    uid: str
    since: float
    asked: Asked

    def has_left(self, folder: Path) -> bool:
        """Whether its client has gone."""
        return (folder / str(self.uid)).exists()


class Batches(LitLoop):
    """Takes what waits in the queue, answers it together, and sends each piece on at once.

    An answer that ends does not wait for the others; a request that comes while others are answered waits for the last
    of them that a client still waits for.
    """

    def __call__(
        self,
        lit_api: LitAPI,
        device: str,
        worker_id: int,
        request_queue: Queue[Any],
        transport: MessageTransport,
        workers_setup_status: dict[int, str],
        callback_runner: CallbackRunner,
    ) -> None:
        """Serve until the server stops."""
        assert isinstance(lit_api, Runs)
        with suppress(KeyboardInterrupt, EOFError, ConnectionError):  # Ctrl-C, or the server's process has gone
            while (waiting := self._next(request_queue, lit_api.max_batch_size)) is not None:
                current = [one for one in waiting if not self._late(one, lit_api, transport)]
                for model in dict.fromkeys(one.asked.model for one in current):
                    self._serve([one for one in current if one.asked.model == model], lit_api, transport)

    def _next(self, queue: Queue[Any], most: int) -> list[_Waiting] | None:
        """The next requests; none after a while without any, and None when the server stops."""
        found: list[_Waiting] = []
        patience = 1.0
        while len(found) < most:
            try:
                item = queue.get(timeout=patience)
            except Empty:
                break
            if item == _SENTINEL_VALUE:
                return None
            found.append(_Waiting(*item))
            patience = GATHER_S
        return found

    def _late(self, one: _Waiting, api: LitAPI, transport: MessageTransport) -> bool:
        limit = api.request_timeout
        if not limit or limit < 0 or time.monotonic() - one.since <= limit:
            return False
        self._send(one, Reply(refused=Refused(f"not begun within {limit:g} s", 503, "overloaded")), transport)
        return True

    def _serve(self, batch: Sequence[_Waiting], api: Runs, transport: MessageTransport) -> None:
        left = dict(enumerate(batch))
        try:
            with closing(api.answer([one.asked for one in batch])) as steps:
                for replies in steps:
                    for row, reply in enumerate(replies):
                        if reply is not None:
                            self._send(batch[row], reply, transport)
                            if reply.ended or reply.refused:
                                del left[row]
                    if left and all(one.has_left(api.left) for one in left.values()):
                        break
        except Exception as error:  # one batch that does not fit into memory does not end the server
            why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            for one in left.values():
                self._send(one, Reply(refused=Refused(f"the model failed: {why}", 500)), transport)
        for one in batch:
            (api.left / str(one.uid)).unlink(missing_ok=True)

    def _send(self, one: _Waiting, reply: Reply, transport: MessageTransport) -> None:
        self.put_response(transport, one.consumer, one.uid, reply, LitAPIStatus.OK, LoopResponseType.STREAMING)
