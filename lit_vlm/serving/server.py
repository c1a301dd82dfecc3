"""The server: LitServe with one worker per device."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

import torch
from litserve import LitServer
from rich.console import Console
from starlette.middleware.trustedhost import TrustedHostMiddleware

from lit_vlm.core.bits import Kind
from lit_vlm.serving.endpoint import PAGE, ChatEndpoint, errors_in_one_form
from lit_vlm.serving.worker import Runs


def serve(
    sources: Mapping[str, str],
    devices: Sequence[torch.device],
    host: str = "127.0.0.1",
    port: int = 8000,
    batch_size: int = 8,
    most_tokens: int = 512,
    timeout: float = 120,
    max_megabytes: int = 20,
    prefixes: Sequence[str] = (),
    quantise: Kind | None = None,
    page: str | None = None,
) -> None:
    """Serve runs until SIGINT or SIGTERM.

    Args:
        sources: name → checkpoint or folder of a run.
        devices: each has a worker with all runs; a CPU may be named several times.
        host: address that is listened on.
        port: port that is listened on.
        batch_size: requests that a worker answers together at most.
        most_tokens: longest answer in tokens.
        timeout: seconds that a request may wait for its turn.
        max_megabytes: size of a request.
        prefixes: how addresses begin that pictures may be fetched from.
        quantise: type of 4 or 8 bits in which blocks are stored.
        page: query of the page to talk to, with its settings at the start, such as `?temperature=0.7`; None: there is
            no page.

    Raises:
        ValueError: for devices of different kinds, or a port that is taken.
    """
    named = ", ".join(map(str, devices))
    if len({device.type for device in devices}) > 1:
        raise ValueError(f"devices must be of one kind, not {named}")
    _check_port(host, port)
    kind = devices[0].type
    left = Path(tempfile.mkdtemp(prefix="lit-vlm-clients-"))
    spec = ChatEndpoint(list(sources), most_tokens, left, prefixes, page is not None)
    on_cpu = len(devices) if kind == "cpu" else 1
    server = LitServer(
        Runs(sources, batch_size, spec, left, quantise, on_cpu),
        accelerator=kind,
        devices=1 if kind == "cpu" else [device.index or 0 for device in devices],
        workers_per_device=on_cpu,
        timeout=timeout,
        max_payload_size=max_megabytes * 2**20,
        disable_openapi_url=True,
    )
    errors_in_one_form(server.app)
    if page is not None:  # a page elsewhere whose name is made to lead here does not get answers
        server.app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])
    console = Console(highlight=False)
    shown = "localhost" if host == "127.0.0.1" else host
    console.print(f"loading {', '.join(sources)} on {named} ...", soft_wrap=True)
    where = f"clients: base_url http://{shown}:{port}/v1, any api_key"
    if page is not None:
        where = f"once it is ready, open http://{shown}:{port}{PAGE}{page}"
    console.print(f"{where}; Ctrl-C ends", soft_wrap=True)
    _end_quietly()
    try:
        server.run(host=host, port=port, num_api_servers=1, log_level="warning", generate_client_file=False)
    except RuntimeError as error:  # a worker that could not load its runs has said why
        raise ValueError(str(error)) from error
    except KeyboardInterrupt:  # while runs are loaded; later LitServe ends by itself
        for worker in getattr(server, "inference_workers", ()):
            worker.kill()
    finally:
        shutil.rmtree(left, ignore_errors=True)


def _end_quietly() -> None:
    """Let SIGTERM end the server as Ctrl-C does, without tracebacks of processes that lose each other."""
    owner = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() == owner:  # forked processes have the handler as well, and are ended by LitServe
            logging.disable(logging.ERROR)
            raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)


def _check_port(host: str, port: int) -> None:
    if not 1024 <= port <= 65535:
        raise ValueError(f"--port must be from 1024 to 65535, not {port}")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((host, port))
        except OSError as error:
            raise ValueError(
                f"port {port} of {host} cannot be used: {error.strerror}; name another with --port"
            ) from error
