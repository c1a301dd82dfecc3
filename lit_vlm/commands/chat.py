"""`lit-vlm chat`: ask a trained model about pictures, in a terminal or on a page."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args
from urllib.parse import urlencode

import torch
from rich.console import Console

from lit_vlm.commands.named_runs import RUN_HELP, name_checkpoint
from lit_vlm.core.bits import Kind
from lit_vlm.core.precision import choose
from lit_vlm.core.quantised import check_kind
from lit_vlm.data.records import Content, Image, Message, Record, RecordError, Text
from lit_vlm.data.records.media import MARK
from lit_vlm.data.sources import ChatJsonl
from lit_vlm.data.sources.conversations import interleave

LONGEST = 512
"""Longest answer on a page in tokens, unless a longer one is asked for."""
MEGABYTES = 200
"""Size of a conversation on a page, which sends all its pictures with each question."""


def main(argv: Sequence[str]) -> None:
    """Answer one prompt, or each line of the input until it ends.

    Raises:
        ValueError: for a missing picture, a wrong value of a flag, or as `find_named` and `load_run`.
        RecordError: for a prompt that cannot be asked, such as one that is too long.
    """
    arguments = _parser().parse_args(argv)
    _check(arguments)
    if arguments.web:
        _serve_page(arguments)
        return
    from transformers.utils.logging import disable_progress_bar

    from lit_vlm.evaluation.asker import load_run, pick_device

    disable_progress_bar()
    console = Console(highlight=False)
    device = pick_device(arguments.device)
    checkpoint = name_checkpoint(arguments.checkpoint[0])
    dtype = choose(torch.device(device).type, scaled=False).dtype
    asker = load_run(checkpoint, device, dtype, arguments.quantise)
    images = [Image(path=str(path.resolve())) for path in arguments.image]
    messages = _demonstrations(arguments.demos) if arguments.demos else []
    for prompt in [arguments.prompt] if arguments.prompt else _typed(console):
        messages.append(Message("user", _content(prompt, images, arguments.newline)))
        images = []  # the first prompt shows all pictures
        record = Record("chat", "chat", tuple(messages))
        prompt_sample = asker.encode([record])
        (answer,) = asker.answer(prompt_sample, arguments.max_new_tokens, arguments.temperature, arguments.top_p)
        console.print(answer, markup=False)
        messages.append(Message("assistant", (Text(answer),)))


def _check(arguments: argparse.Namespace) -> None:
    """Refuse flags that make no sense, or not together; raises ValueError naming them."""
    for image in arguments.image:
        if not image.is_file():
            raise ValueError(f"there is no picture {image}")
    if arguments.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1, not {arguments.max_new_tokens}")
    check_kind(arguments.quantise, "--quantise")
    if arguments.web and not (0 <= arguments.temperature <= 2 and 0 < arguments.top_p <= 1):
        raise ValueError(
            f"with --web, --temperature must be from 0 to 2 and --top-p above 0 and at most 1, not "
            f"{arguments.temperature:g} and {arguments.top_p:g}"
        )
    if not arguments.web and len(arguments.checkpoint) > 1:
        raise ValueError("several checkpoints are asked side by side on a page: add --web")
    if not arguments.web and arguments.port is not None:
        raise ValueError("--port is that of a page: add --web")
    for flag in ("prompt", "image", "demos"):
        if arguments.web and getattr(arguments, flag):
            raise ValueError(f"--{flag} is for a terminal: with --web, the page asks for it")


def _serve_page(arguments: argparse.Namespace) -> None:
    """Serve a page until Ctrl-C; raises ValueError as `server.serve`, or for a package that is not installed."""
    from lit_vlm.commands.serve import find_runs, import_server
    from lit_vlm.evaluation.asker import pick_device

    start = {"temperature": arguments.temperature, "top_p": arguments.top_p, "max_tokens": arguments.max_new_tokens}
    query = urlencode(start | ({"newline": 1} if arguments.newline else {}))
    import_server().serve(
        find_runs(arguments.checkpoint),
        [torch.device(pick_device(arguments.device))],
        port=8000 if arguments.port is None else arguments.port,
        most_tokens=max(LONGEST, arguments.max_new_tokens),
        max_megabytes=MEGABYTES,
        quantise=arguments.quantise,
        page=f"?{query}",
    )


def _content(prompt: str, images: Sequence[Image], newline: bool) -> tuple[Content, ...]:
    """The prompt with pictures at its `<image>` marks, or in front of it if it has none."""
    pieces = prompt.split(MARK)
    if len(pieces) == 1:
        return (*images, Text(f"\n{prompt}" if images and newline else prompt))
    if len(pieces) - 1 != len(images):
        raise ValueError(f"the prompt has {len(pieces) - 1} {MARK} marks, and there are {len(images)} pictures left")
    return tuple(interleave(pieces, images))


def _demonstrations(file: Path) -> list[Message]:
    """Solved turns from a file in chat form, one conversation per line; raises ValueError naming the line."""
    source = ChatJsonl(str(file))
    messages: list[Message] = []
    for index in range(len(source)):
        try:
            record = source.record(index)
        except RecordError as error:
            raise ValueError(f"--demos {file} line {index + 1}: {error}") from error
        if [message.role for message in record.messages] != ["user", "assistant"] * (len(record.messages) // 2):
            raise ValueError(f"--demos {file} line {index + 1}: its turns must be user, assistant, user, assistant ...")
        messages += [
            replace(message, content=tuple(_absolute(p, source) for p in message.content))
            for message in record.messages
        ]
    return messages


def _absolute(part: Content, source: ChatJsonl) -> Content:
    if isinstance(part, Text) or part.path is None:
        return part
    return replace(part, path=str((source.image_folder / part.path).resolve()))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lit-vlm chat",
        description="Ask a trained model about pictures. Without --prompt, type your questions; --web opens a page.",
    )
    parser.add_argument("checkpoint", nargs="+", metavar="RUN", help=f"{RUN_HELP}; with --web several, side by side")
    parser.add_argument(
        "--web",
        action="store_true",
        help="a page in the browser, for this machine alone: several pictures, demonstrations, what the model sees "
        "(pip install 'lit-vlm[serve]')",
    )
    parser.add_argument("--port", type=int, help="of the page, from 1024 to 65535 (default: 8000)")
    parser.add_argument("--image", type=Path, action="append", default=[], help="a picture; may be given several times")
    parser.add_argument(
        "--prompt",
        help="one question; the answer is printed and that is all. <image> in it says where a picture stands; without, "
        "all stand in front",
    )
    parser.add_argument(
        "--demos",
        type=Path,
        metavar="FILE",
        help="solved examples to learn from: a .jsonl in chat form, a conversation of user and assistant per line, "
        "with pictures relative to the file",
    )
    parser.add_argument("--max-new-tokens", type=int, default=64, help="length of an answer at most (default: 64)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default: 0)")
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="draw from the likeliest tokens of this share (default: 1)"
    )
    parser.add_argument(
        "--quantise",
        choices=get_args(Kind),
        help="store the linear layers of all blocks in 4 or 8 bits, which takes less memory and no less time",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    parser.add_argument(
        "--newline",
        action="store_true",
        help="a line break between the pictures and the question, as LLaVA's data has it",
    )
    return parser


def _typed(console: Console) -> Iterator[str]:
    """Lines from the keyboard or a pipe, until an empty line or the end of the input."""
    interactive = sys.stdin.isatty()
    if interactive:
        console.print("type a question; an empty line ends", style="dim")
    while True:
        try:
            line = input("> " if interactive else "")
        except EOFError:
            return
        if not line.strip():
            return
        yield line.strip()
