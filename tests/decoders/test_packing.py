"""What transformers is told of the rows of a batch is what it would read from positions itself."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import masking_utils

from lit_vlm.core.batch import Segments, fill
from lit_vlm.decoders import HFDecoder
from lit_vlm.decoders.packing import ASKS, telling
from tests.tiny import LLAMA

ROWS = [((5,), (5,)), ((2, 3), (5,)), ((1, 1, 3), (2, 3))]
DYNAMIC = LLAMA | {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}


def positions(segments: Segments) -> Tensor:
    return torch.stack([torch.cat([torch.arange(length) for length in row]) for row in segments])


def test_padding_counts_to_the_last_segment_of_a_row() -> None:
    assert fill([2, 3], 7) == (2, 5)
    assert fill([7], 7) == (7,)
    assert fill([], 7) == (7,)


@pytest.mark.parametrize("segments", ROWS)
def test_the_answer_is_that_of_transformers(segments: Segments) -> None:
    asked = getattr(masking_utils, ASKS)(positions(segments))
    with telling(segments, nn.Identity()):
        told = getattr(masking_utils, ASKS)(positions(segments))
    assert (asked is None) == (told is None) == all(len(row) == 1 for row in segments)
    assert asked is None or torch.equal(asked, told)


def test_nothing_stays_replaced_after_an_error() -> None:
    decoder = HFDecoder(config=DYNAMIC, tokenizer="bytes")
    before = getattr(masking_utils, ASKS)

    def fail(*_: Any) -> None:
        assert getattr(masking_utils, ASKS) is not before
        assert decoder.base.rotary_emb.rope_type == "default"
        raise KeyError

    decoder.blocks()[0].register_forward_pre_hook(fail)
    with pytest.raises(KeyError):
        decoder(torch.randn(2, 5, decoder.width), positions(ROWS[0]), segments=ROWS[0])
    assert getattr(masking_utils, ASKS) is before
    assert decoder.base.rotary_emb.rope_type == "dynamic"


class OnDevice(Tensor):
    """Positions on a device that nobody may wait for: reading a value of them is an error."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.__bool__, Tensor.item, Tensor.tolist, Tensor.nonzero, Tensor.__int__, Tensor.__index__):
            raise AssertionError(f"{func.__name__} waits for the device")
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("config", [LLAMA, DYNAMIC], ids=["plain", "dynamic"])
@pytest.mark.parametrize("segments", ROWS)
def test_a_decoder_that_is_told_gives_the_same_states_and_reads_no_position(
    segments: Segments, config: dict[str, Any], attention: Any
) -> None:
    decoder = HFDecoder(config=config, tokenizer="bytes", attention=attention).eval()
    embeds, ids = torch.randn(2, 5, decoder.width), positions(segments)
    asked = decoder(embeds, ids).hidden
    run = partial(decoder, embeds, ids.as_subclass(OnDevice))
    assert torch.equal(run(segments=segments).hidden, asked)
    with pytest.raises(AssertionError, match="waits for the device"):
        run()


def test_frequencies_that_must_grow_do_so() -> None:
    decoder = HFDecoder(config=DYNAMIC | {"max_position_embeddings": 4}, tokenizer="bytes").eval()
    embeds, long, short = torch.randn(1, 5, decoder.width), ((5,),), ((2, 3),)
    first = decoder(embeds, positions(short), segments=short).hidden
    grown = decoder(embeds, positions(long), segments=long).hidden
    assert decoder.base.rotary_emb.max_seq_len_cached == 5
    again = decoder(embeds, positions(short), segments=short).hidden  # they shrink again, as by themselves
    plain = HFDecoder(config=DYNAMIC | {"max_position_embeddings": 4}, tokenizer="bytes").eval()
    plain.load_state_dict(decoder.state_dict())
    assert torch.equal(first, again)
    assert torch.equal(grown, plain(embeds, positions(long)).hidden)
