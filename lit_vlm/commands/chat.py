"""`lit-vlm chat`: ask a trained model about pictures."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console

from lit_vlm.data.records import Image, Message, Part, Record, Text


def main(argv: Sequence[str]) -> None:
    """Answer one prompt, or talk until the input ends."""
    arguments = _parser().parse_args(argv)
    for image in arguments.image:
        if not image.is_file():
            raise ValueError(f"there is no picture {image}")
    from transformers.utils.logging import disable_progress_bar

    from lit_vlm.checkpoints.run import load_run

    disable_progress_bar()
    console = Console(highlight=False)
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    run = load_run(arguments.checkpoint, device)
    images = [Image(path=str(path.resolve())) for path in arguments.image]
    messages: list[Message] = []
    for prompt in [arguments.prompt] if arguments.prompt else _typed(console):
        text = Text(f"\n{prompt}" if images and arguments.newline else prompt)
        content: tuple[Part, ...] = (*images, text)
        images = []  # a conversation shows its pictures once
        messages.append(Message("user", content))
        record = Record("chat", "chat", tuple(messages))
        batch = run.prompts([record], Path("/"))
        (answer,) = run.module.answer(batch, arguments.max_new_tokens, arguments.temperature, arguments.top_p)
        console.print(answer, markup=False)
        messages.append(Message("assistant", (Text(answer),)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lit-vlm chat", description="Ask a trained model about pictures. Without --prompt, type your questions."
    )
    parser.add_argument("checkpoint", help="a checkpoint, or the folder of a run")
    parser.add_argument("--image", type=Path, action="append", default=[], help="a picture; may be given several times")
    parser.add_argument("--prompt", help="one question; the answer is printed and that is all")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="length of an answer at most (default: 64)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default: 0)")
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="draw from the likeliest tokens of this share (default: 1)"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    parser.add_argument(
        "--newline",
        action="store_true",
        help="a line break between the pictures and the question, as LLaVA's data has it",
    )
    return parser


def _typed(console: Console) -> Iterator[str]:
    """Lines that are typed or piped in, until the end of input or an empty line."""
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
