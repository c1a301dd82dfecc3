"""What several tests share: specs with tokenizers, pictures and samples; and that no test leaves anything to others."""

from __future__ import annotations

import io
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image as PILImage
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lit_vlm.core.batch import IGNORE, Grid, PixelSpec
from lit_vlm.core.tokenizers import byte_tokenizer
from lit_vlm.data.sample.encode import Sample
from lit_vlm.data.sample.spec import InputSpec
from lit_vlm.encoders import PatchGrid
from lit_vlm.projectors.base import same_grid

FIXTURES = Path(__file__).parent / "fixtures"

# Shells let what they start in the background ignore it, and so would all that tests start.
if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _first_process() -> Iterator[None]:
    """After each test this process is the first one again: Lightning keeps the rank of the last trainer that was made,
    and loggers of any other rank write nothing."""
    yield
    known = sys.modules.get("lightning_utilities.core.rank_zero")
    if known is not None and hasattr(known.rank_zero_only, "rank"):
        known.rank_zero_only.rank = 0


def make_spec(tokenizer: PreTrainedTokenizerFast) -> InputSpec:
    return InputSpec(tokenizer, PixelSpec(None, 4, (0.5, 0.5, 0.5)), PatchGrid(4), same_grid)


@pytest.fixture(scope="session")
def bytes_spec() -> InputSpec:
    """A spec with one token per byte, patches of 4 pixels, and one position per patch."""
    return make_spec(byte_tokenizer())


@pytest.fixture(scope="session")
def llama_spec() -> InputSpec:
    """A spec with the Llama-like tokenizer of 480 pieces that the reference ids were made with."""
    return make_spec(AutoTokenizer.from_pretrained(FIXTURES / "tiny_llama"))


@pytest.fixture
def png() -> Callable[..., bytes]:
    """A function that makes the PNG bytes of a picture of one colour."""

    def make(width: int = 8, height: int = 8, colour: tuple[int, int, int] = (10, 20, 30)) -> bytes:
        buffer = io.BytesIO()
        PILImage.new("RGB", (width, height), colour).save(buffer, "PNG")
        return buffer.getvalue()

    return make


@pytest.fixture
def make_sample() -> Callable[..., Sample]:
    """A function that makes a sample of `length` positions; text ids are 1 to 9, so that 0 marks image positions."""

    def make(name: str, length: int, grids: Sequence[Grid] = (), seed: int | None = None) -> Sample:
        rng = random.Random(name if seed is None else seed)
        text = length - sum(grid.num_tokens for grid in grids)
        assert text > 0
        cuts = sorted(rng.randint(0, text) for _ in grids)
        ids: list[int] = []
        labels: list[int] = []
        starts: list[int] = []
        done = 0
        for cut, grid in zip([*cuts, text], [*grids, None], strict=True):
            chunk = [rng.randint(1, 9) for _ in range(cut - done)]
            ids += chunk
            labels += [token if rng.random() < 0.6 else IGNORE for token in chunk]
            done = cut
            if grid is not None:
                starts.append(len(ids))
                ids += [0] * grid.num_tokens
                labels += [IGNORE] * grid.num_tokens
        pictures = [
            torch.full((3, 4 * grid.rows, 4 * grid.cols), rng.randint(0, 255), dtype=torch.uint8) for grid in grids
        ]
        return Sample(name, "made", ids, labels, starts, list(grids), pictures)

    return make
