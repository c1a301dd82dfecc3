"""llama.cpp, asked for what a pair of files makes of prompts."""

from __future__ import annotations

import base64
import http.client
import json
import math
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

WAIT_S = 300.0
READY, FAILED = "listening on ", "failed: "


class Answer(NamedTuple):
    """What llama.cpp writes behind a prompt, the likeliest token each time.

    Attributes:
        text: the answer.
        ids: its tokens.
        first: id → log-probability of the first token.
        positions: of the prompt, those of pictures included.
        tokens_per_s: speed of the answer; NaN where it is not told.
    """

    text: str
    ids: list[int]
    first: Mapping[int, float]
    positions: int
    tokens_per_s: float


def is_installed() -> bool:
    """Whether llama.cpp can be asked here: extra `edge`."""
    import importlib.util

    return importlib.util.find_spec("xllamacpp") is not None


class Runtime:
    """A pair of files, loaded by llama.cpp on the CPU of this machine.

    It runs in a process of its own: what goes wrong in llama.cpp ends a process without a word. Use it as a context, or
    call `close`.

    Args:
        decoder: file of the decoder.
        encoder: file of encoder and projector; None for text alone.
        positions: most positions of prompt and answer.

    Raises:
        ValueError: where llama.cpp refuses a file.
    """

    def __init__(self, decoder: Path, encoder: Path | None, positions: int = 4096) -> None:
        words = [str(decoder), str(encoder or ""), str(positions)]
        self._name = decoder.name
        self._child = subprocess.Popen(
            [sys.executable, "-P", "-m", "lit_vlm.gguf.runtime", *words],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        assert self._child.stdout is not None
        lines = iter(self._child.stdout.readline, "")
        said = next(
            (line.strip() for line in lines if line.startswith((READY, FAILED))), f"{FAILED}it ended without a word"
        )
        if not said.startswith(READY):
            self.close()
            raise ValueError(f"llama.cpp does not load {self._name}: {said.removeprefix(FAILED)}")
        self._address = said.removeprefix(READY)
        self._marker = str(self._get("/props").get("media_marker", "<__media__>"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        self._child.kill()
        self._child.communicate()

    def tokens(self, text: str, special: bool = True) -> list[int]:
        """The tokens of a text, with the one that begins it; letters of special tokens are such tokens if `special`."""
        body = {"content": text, "add_special": True, "parse_special": special}
        return list(self._post("/tokenize", body)["tokens"])

    def answer(self, prompt: str, pictures: Sequence[bytes], most: int, rows: int) -> Answer:
        """Continue a prompt.

        Args:
            prompt: with `<image>` for each picture.
            pictures: content of their files.
            most: tokens at most.
            rows: how many tokens have their log-probability told.

        Raises:
            ValueError: where llama.cpp refuses the prompt.
        """
        given: Any = prompt
        if pictures:
            data = [base64.b64encode(picture).decode() for picture in pictures]
            given = {"prompt_string": prompt.replace("<image>", self._marker), "multimodal_data": data}
        asked = {"prompt": given, "n_predict": most, "temperature": 0, "cache_prompt": False, "return_tokens": True}
        found = self._post("/completion", asked)
        # Nothing is told of a token that ends the answer, or is half of a letter, so a whole letter is taken instead;
        # the probabilities are those before.
        taken = {"n_predict": 1, "n_probs": rows, "post_sampling_probs": False, "logit_bias": [["A", 1e4]]}
        first = self._post("/completion", asked | taken)
        told = first["completion_probabilities"][0]["top_logprobs"]
        speed = float((found.get("timings") or {}).get("predicted_per_second", math.nan))
        return Answer(
            str(found["content"]),
            list(found["tokens"]),
            {one["id"]: float(one["logprob"]) for one in told},
            int(found["tokens_evaluated"]),
            speed,
        )

    def chat(self, question: str, pictures: Sequence[bytes], most: int) -> str:
        """Answer a question about pictures in front of it, written by the template in the file.

        Raises:
            ValueError: where llama.cpp refuses it.
        """
        parts: list[Any] = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(one).decode()}"}}
            for one in pictures
        ]
        content = [*parts, {"type": "text", "text": question}]
        asked = {"messages": [{"role": "user", "content": content}], "max_tokens": most, "temperature": 0}
        return str(self._post("/v1/chat/completions", asked)["choices"][0]["message"]["content"])

    def _get(self, path: str) -> dict[str, Any]:
        return self._ask(urllib.request.Request(self._address + path), path)

    def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        return self._ask(urllib.request.Request(self._address + path, json.dumps(body).encode(), headers), path)

    def _ask(self, request: urllib.request.Request, path: str) -> dict[str, Any]:
        try:
            with urllib.request.urlopen(request, timeout=WAIT_S) as answer:
                found: dict[str, Any] = json.load(answer)
        except urllib.error.HTTPError as error:
            raise ValueError(f"llama.cpp refuses {path}: {error.read().decode(errors='replace')[:300]}") from error
        except (OSError, http.client.HTTPException) as error:
            raise ValueError(f"llama.cpp, with {self._name}, ended while it was asked ({path}): {error}") from error
        return found


def _serve(decoder: str, encoder: str, positions: str) -> None:
    """Load the files, tell the address, and answer until the other process is gone."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = decoder
    if encoder:
        params.mmproj.path = encoder
        params.mmproj_use_gpu = False
    params.n_ctx, params.n_parallel, params.n_gpu_layers = int(positions), 1, 0
    params.warmup, params.verbosity = False, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = len(os.sched_getaffinity(0))
    try:
        server = xllamacpp.Server(params)
    except RuntimeError as error:
        print(f"{FAILED}{error}", flush=True)  # noqa: T201 - read by the other process
        return
    print(f"{READY}{server.listening_address}", flush=True)  # noqa: T201
    sys.stdin.read()
    os._exit(0)  # nothing is left to be kept, and its own way out may fail


if __name__ == "__main__":
    _serve(*sys.argv[1:])
