"""Speed and memory at published sizes on one GPU: `python -m tests.gpu.bench [CASE ...]` writes build/gpu/CASE.json.

Each case is one `lit-vlm bench`, which any user can give as well, and which stands in its JSON file.
"""

from __future__ import annotations

import subprocess
import sys
import time
from typing import NamedTuple

import torch

from tests.tiny import ROOT

OUT = ROOT / "build" / "gpu"
SECONDS = 420
"""Budget of all cases together; a case that the rest of it does not suffice for is left out, and said to be."""
PACKED = ("--data.batching", "Packed", "--data.max_length", "4096")
SMALL = (  # the sizes of SmolLM-1.7B
    "--model.decoder.init_args.name", "null", "--model.decoder.init_args.tokenizer", "bytes",
    "--model.decoder.init_args.config",
    "{model_type: llama, hidden_size: 2048, intermediate_size: 8192, num_hidden_layers: 24, num_attention_heads: 32, "
    "num_key_value_heads: 32, vocab_size: 49152, max_position_embeddings: 8192}",
)  # fmt: skip


class Case(NamedTuple):
    """A measurement.

    Attributes:
        what: in words, for the table.
        seconds: its budget.
        words: arguments of `lit-vlm bench`.
    """

    what: str
    seconds: int
    words: tuple[str, ...]


def _llava(stage: str, *flags: str, steps: int = 10) -> tuple[str, ...]:
    return ("llava15", "--scale", "7b", "--strategy", "single", "--stages", stage, "--steps", str(steps), *flags)


CASES = {
    "llava15_7b_align": Case(
        "LLaVA-1.5 7B, projector trains, packed 4 × 4,096",
        90,
        _llava("1_align", *PACKED, "--data.batch_size", "4"),
    ),
    "llava15_7b_lora": Case(
        "LLaVA-1.5 7B, LoRA of rank 64, packed 4 × 4,096",
        100,
        _llava("2_sft", *PACKED, "--data.batch_size", "4", "--model.decoder.init_args.lora", "{rank: 64}"),
    ),
    "llava15_2b": Case(
        "CLIP-L and 1.7B, all but the encoder trains, packed 4 × 4,096",
        90,
        _llava("2_sft", *SMALL, *PACKED, "--data.batch_size", "4"),
    ),
    "llava15_2b_compiled": Case(
        "the same, `model.compile: blocks`",
        110,
        _llava("2_sft", *SMALL, *PACKED, "--data.batch_size", "4", "--model.compile", "blocks"),
    ),
    "llava15_2b_unpacked": Case(
        "the same model, 16 samples of mixed length without packing, against transformers",
        120,
        _llava("2_sft", *SMALL, "--data.batching", "Padded", "--against", "hf"),
    ),
    "llava15_2b_packed": Case(
        "the same model, 6 packed rows of 2,048, against transformers",
        120,
        _llava("2_sft", *SMALL, "--data.batching", "Packed", "--data.batch_size", "6", "--against", "hf"),
    ),
    "ola_vlm_8b": Case(
        "OLA-VLM 8B, first stage, teachers in the step",
        120,
        ("ola_vlm", "--scale", "8b", "--strategy", "single", "--stages", "1_pretrain", "--steps", "6",
         "--data.batch_size", "4"),
    ),
}  # fmt: skip


def main(names: list[str]) -> int:
    """Run the cases that are named, or all; returns 1 where one fails."""
    if unknown := sorted(set(names) - set(CASES)):
        print(f"there is no case {unknown[0]}; cases: {', '.join(CASES)}", file=sys.stderr)  # noqa: T201
        return 1
    if not torch.cuda.is_available():
        print("there is no GPU, so nothing is measured", file=sys.stderr)  # noqa: T201
        return 1
    end, failed = time.monotonic() + SECONDS, False
    for name in names or CASES:
        case, left = CASES[name], end - time.monotonic()
        print(f"--- {name}: {case.what}", flush=True)  # noqa: T201
        if left < case.seconds / 2:
            print(f"left out: {left:.0f} s of {SECONDS} are left, and it may take {case.seconds}")  # noqa: T201
            continue
        failed |= not _run(name, case, min(left, case.seconds))
    return int(failed)


def _run(name: str, case: Case, seconds: float) -> bool:
    file = OUT / f"{name}.json"
    file.unlink(missing_ok=True)
    words = [sys.executable, "-m", "lit_vlm", "bench", *case.words, "--json", str(file)]
    try:
        code = subprocess.run(words, cwd=ROOT, timeout=seconds, check=False).returncode
    except subprocess.TimeoutExpired:
        print(f"stopped: over its budget of {seconds:.0f} s", flush=True)  # noqa: T201
        return False
    return code == 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
