"""`python -m tests.decoders.families`: what works with which family of decoders, the tables of docs/decoders.md.

Each cell is a comparison of a tiny model with random weights; `tests/decoders/test_families.py` runs them all again.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import AutoTokenizer
from transformers.masking_utils import create_masks_for_generate

from lit_vlm.core.batch import Grid
from lit_vlm.core.lora import Lora, is_adapter, merge_adapters
from lit_vlm.data.sample.collate import collate, collate_prompts
from lit_vlm.decoders import HFDecoder, check_cache, check_images, check_order
from lit_vlm.model.build import build
from lit_vlm.model.generate import generate
from lit_vlm.model.vlm import VLM
from lit_vlm.testing.tiny import samples_for, tiny_slots
from lit_vlm.training.sharding import reshard, shard
from lit_vlm.training.stage import Stage
from tests.decoders.test_order import ATTENDING, CARRYING, DEAF
from tests.decoders.wrappers import MULTIMODAL
from tests.decoders.wrappers import row as of_wrapper
from tests.runs import gathered, run_ranks
from tests.tiny import batch_of, collate_packed, samples_of

OWN = {"lfm2", "qwen3_5_text", "qwen3_next", "granitemoehybrid"}
FAMILIES: dict[str, dict[str, Any]] = ATTENDING | DEAF | {name: CARRYING[name] for name in sorted(OWN)}
"""Model type → a small configuration: dense ones, experts, sliding windows, and hybrids."""
NEW = ("<|first|>", "<|second|>")
"""Tokens that the decoder gets beside its own."""
YES, NO, ABSENT = "yes", "refused", "–"
TOLERANCE = 2e-5
Check = Callable[[str], str]


def decoder_of(family: str, attention: str = "sdpa", **settings: Any) -> Callable[[], HFDecoder]:
    """A function that builds a tiny decoder of a family, of bytes."""
    size = {"vocab_size": 259 + len(settings.get("new_tokens", ()))}
    config = {"model_type": family} | FAMILIES[family] | size | settings.pop("config", {})
    return partial(HFDecoder, config=config, tokenizer="bytes", attention=attention, **settings)  # type: ignore[arg-type]


def attention_of(family: str) -> str:
    """The attention that a family is tried with: sdpa, where it has that."""
    return "eager" if packed(family, "sdpa") == ABSENT else "sdpa"


def model_of(family: str, **settings: Any) -> VLM:
    """A tiny model with a decoder of a family, in eval mode."""
    torch.manual_seed(0)
    chosen = {"attention": attention_of(family)} | settings
    return build(tiny_slots(decoder=decoder_of(family, **chosen))).eval()


def packed(family: str, attention: str) -> str:
    """Whether packed rows give the states of samples on their own; else whether they are refused by name."""
    torch.manual_seed(0)
    try:
        model = build(tiny_slots(decoder=decoder_of(family, attention))).eval()
    except ValueError as error:
        if "attention" in str(error):
            return ABSENT
        raise
    try:
        check_order(model.decoder, packed=True, device=torch.device("cpu"))
    except ValueError:
        return NO
    samples = samples_of(model, 6, True)
    batch = collate_packed(samples, capacity=256)
    assert len(batch.input_ids) < len(samples)
    with torch.no_grad():
        together = model.logits(batch)
        alone = {sample.id: model.logits(collate([sample]))[0] for sample in samples}
    for info in batch.samples:
        own = together[info.row][batch.segment_ids[info.row] == info.segment]
        assert_close(own, alone[info.id], f"{family} packed")
    return YES


def whole_images(family: str) -> str:
    """Whether images that see all of themselves give what transformers gives with its own masks for blocks."""
    try:
        decoder = model_of(family, image_attention="bidirectional").decoder
    except ValueError as error:
        if "image_attention" in str(error):
            return NO
        raise
    assert isinstance(decoder, HFDecoder)
    check_order(decoder, packed=False, device=torch.device("cpu"))
    check_images(decoder, packed=False, device=torch.device("cpu"))
    check_cache(decoder, torch.device("cpu"))
    blocks = torch.tensor([[-1, 0, 0, 0, 0, -1, -1, -1, 1, 1, 1, -1]])  # each in one chunk of eight
    embeds = torch.randn(1, blocks.shape[1], decoder.width, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(blocks.shape[1])[None]
    own = {"visual": (blocks[0] >= 0).nonzero().flatten(), "grids": [Grid(2, 2), Grid(1, 3)]}
    masks = create_masks_for_generate(decoder.config, embeds, None, None, positions, block_sequence_ids=blocks)
    if isinstance(masks, dict) and len(masks) == 1:  # as all models take it
        (masks,) = masks.values()
    with torch.no_grad():
        theirs = decoder.base(inputs_embeds=embeds, position_ids=positions, attention_mask=masks, use_cache=False)
        found = decoder(embeds, positions, **own).hidden
        alone = decoder(embeds, positions, visual=own["visual"][:1], grids=[Grid(1, 1)]).hidden
        causal = decoder(embeds, positions).hidden
    assert_close(found, theirs.last_hidden_state, f"{family} whole images")
    assert_close(alone, causal, f"{family} an image of one token")
    return YES


def taps(family: str) -> str:
    """Whether tapped states are the hidden states of transformers' own model."""
    decoder = model_of(family).decoder
    assert isinstance(decoder, HFDecoder)
    ids = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(0))
    layers = range(decoder.num_layers + 1)
    with torch.no_grad():
        positions = torch.arange(9).expand(2, 9)
        found = decoder(decoder.embed(ids), positions, taps=layers)
        whole = decoder.lm(input_ids=ids, output_hidden_states=True)
    if whole.hidden_states is None or len(whole.hidden_states) != decoder.num_layers + 1:
        return ABSENT
    for layer in layers[1:]:
        assert_close(found.taps[layer], whole.hidden_states[layer], f"{family} layer {layer}")
    assert_close(decoder.logits(found.hidden), whole.logits, f"{family} logits")
    return YES


def cache(family: str) -> str:
    """Whether answers that go on from a cache are those of whole sequences, rows of several lengths together."""
    model = model_of(family)
    try:
        check_cache(model.decoder, torch.device("cpu"))
    except ValueError:
        return NO
    seen, text = samples_for(model, [(28, 28)])
    prompts = [*seen, *text]
    batch = collate_prompts(prompts)
    answers = generate(model, batch, [-1], 5)
    for sample, answer in zip(prompts, answers, strict=True):
        ids = list(sample.ids)
        with torch.no_grad():
            for token in answer:
                longer = copy.copy(sample)
                longer.ids, longer.labels = ids, [-100] * len(ids)
                assert int(model.logits(collate([longer]))[0, -1].argmax()) == token, f"{family} cache"
                ids = [*ids, token]
    return YES


def lora(family: str) -> str:
    """Whether adapters alone train, and whether merging them changes nothing."""
    model = model_of(family, lora=Lora(rank=2))
    batch = batch_of(model, 3)
    with torch.no_grad():
        plain = model.logits(batch)
    for name, parameter in model.decoder.named_parameters():
        if is_adapter(name):
            torch.nn.init.normal_(parameter, std=0.01)
    stage = Stage(train={"decoder": 1e-3})
    stage.freeze(model)
    assert all(is_adapter(name) for name, p in model.decoder.named_parameters() if p.requires_grad)
    with torch.no_grad():
        before = model.logits(batch)
        assert float((before - plain).abs().max()) > 100 * TOLERANCE
        merge_adapters(model)
        assert_close(model.logits(batch), before, f"{family} merged")
    return YES


def tied(family: str) -> str:
    """Whether word table and output layer are one where the configuration says so."""
    decoder = model_of(family, config={"tie_word_embeddings": True}).decoder
    assert isinstance(decoder, HFDecoder)
    table, output = decoder.lm.get_input_embeddings(), decoder.lm.get_output_embeddings()
    if output.weight is not table.weight:
        return ABSENT
    assert decoder.logits(torch.zeros(1, 1, decoder.width)).shape[-1] == table.weight.shape[0] == decoder.vocab_size
    return YES


def new_tokens(family: str) -> str:
    """Whether published weights get rows for new tokens, in two tables and in one, which train beside adapters."""
    for together in (False, True) if tied(family) == YES else (False,):
        before = model_of(family, config={"tie_word_embeddings": together}).decoder
        assert isinstance(before, HFDecoder)
        with tempfile.TemporaryDirectory() as folder:
            before.lm.save_pretrained(folder)
            source: Any = partial(HFDecoder, folder, tokenizer="bytes", attention=attention_of(family))
            model = build(tiny_slots(decoder=partial(source, new_tokens=NEW, lora=Lora(rank=2)))).eval()
        own, size = model.decoder, before.vocab_size
        assert isinstance(own, HFDecoder)
        assert own.vocab_size == len(own.tokenizer) == size + len(NEW)
        for grown, table in zip(tables_of(own), tables_of(before), strict=True):
            assert torch.equal(grown[:size], table)
            assert_close(grown[size:], table.mean(0).expand(len(NEW), -1), f"{family} rows of new tokens")
        ids = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(0))
        positions = torch.arange(9).expand(2, 9)
        with torch.no_grad():
            one, other = (part.logits(part(part.embed(ids), positions).hidden) for part in (own, before))
        assert_close(one[..., :size], other, f"{family} logits beside new tokens")
        Stage(train={"decoder": 1e-3}).freeze(model)
        trained = {id(p) for name, p in own.named_parameters() if p.requires_grad and not is_adapter(name)}
        assert trained == {id(p) for table in (own.lm.get_input_embeddings(), own.lm.get_output_embeddings())
                           for p in table.parameters()}  # fmt: skip
        ids = torch.full_like(ids, size)
        own.logits(own(own.embed(ids), positions).hidden)[..., size].sum().backward()
        assert all(table.grad is not None and table.grad[size].any() for table in tables_of(own))
    return YES


def tables_of(decoder: HFDecoder) -> list[torch.Tensor]:
    """The word table and the output layer's."""
    return [decoder.lm.get_input_embeddings().weight, decoder.lm.get_output_embeddings().weight]


def exported(family: str) -> str:
    """Whether `--format hf` gives a model that is the same in transformers, with tokens that it was given."""
    from tests.exports import read

    settings = decoder_of(family, attention_of(family), new_tokens=NEW).keywords
    own = {"class_path": "lit_vlm.decoders.HFDecoder", "init_args": settings}
    module, config, written = read("llava15", decoder=own)
    from lit_vlm.hf.export import export_hf

    with tempfile.TemporaryDirectory() as scratch:
        try:
            export_hf(module.vlm, config, written, module.input_spec, Path(scratch) / "out")
            kept = AutoTokenizer.from_pretrained(Path(scratch) / "out", trust_remote_code=True)
            assert kept.convert_tokens_to_ids(list(NEW)) == [259, 260]
        except ValueError as error:
            if "cannot be asked" in str(error):  # by a cache, as `cache` says
                return NO
            raise
    return YES


def gradients_of(family: str, sharded: bool, **settings: Any) -> dict[str, torch.Tensor]:
    """Whole gradients of a step of everything, or of adapters; new tokens are there. Each process has the same rows."""
    model = model_of(family, new_tokens=NEW, **settings)
    if sharded:
        shard(model, init_device_mesh("cpu", (2,)), torch.float32, False)
    stage = Stage(train={"projector": 1e-3, "decoder": 1e-3})
    stage.freeze(model)
    seen, text = samples_for(model, [(28, 28), (28, 28)])
    batch = collate([*seen, *text])
    model.logits(batch).float().logsumexp(-1).mean().backward()
    return {
        name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        for name, p in model.named_parameters()
        if p.grad is not None
    }


@contextmanager
def _process(rank: str, folder: str) -> Iterator[None]:
    with gathered(folder, int(rank)):
        yield


def sharded_families(rank: str, folder: str) -> None:
    """In two processes: compare each family's gradients, sharded and whole; write the names of those that agree."""
    torch.set_num_threads(1)
    with _process(rank, folder):
        _check_sharded_images()
        for family in FAMILIES:
            for settings in ({}, {"lora": Lora(rank=2), "config": {"tie_word_embeddings": tied(family) == YES}}):
                whole, parts = (gradients_of(family, sharded, **copy.deepcopy(settings)) for sharded in (False, True))
                assert whole.keys() == parts.keys(), family
                for name in whole:
                    assert_close(parts[name], whole[name], f"{family} {name}")
            if dist.get_rank() == 0:
                with (Path(folder) / "agree.txt").open("a") as file:
                    file.write(f"{family}\n")


def _check_sharded_images() -> None:
    """The checks before training and before asking, one after the other, of a sharded decoder with whole images."""
    model = model_of("llama", image_attention="bidirectional")
    shard(model, init_device_mesh("cpu", (2,)), torch.float32, False)
    for packed_rows in (False, True):
        model.check_order(packed_rows, torch.device("cpu"))
        model.check_images(packed_rows, torch.device("cpu"))
        reshard(model)
    model.check_cache()


def all_sharded(folder: Path) -> set[str]:
    """The families whose gradients two sharded processes compute as one does."""
    run_ranks(folder, "tests.decoders.families", str(folder))
    return set((folder / "agree.txt").read_text().split())


def assert_close(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Compare to a tolerance that is relative to the largest value."""
    difference = float((found - expected).abs().max())
    assert difference <= TOLERANCE * max(1.0, float(expected.abs().max())), f"{what}: {difference:.1e}"


CHECKS: dict[str, Check] = {
    "packed, sdpa": partial(packed, attention="sdpa"),
    "packed, eager": partial(packed, attention="eager"),
    "tapped layers": taps,
    "cache": cache,
    "whole images": whole_images,
    "LoRA": lora,
    "tied words": tied,
    "new tokens": new_tokens,
    "export": exported,
}
"""Column → the comparison behind it."""


def row(family: str) -> list[str]:
    """The cells of a family, but for sharding."""
    return [check(family) for check in CHECKS.values()]


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as scratch:
        sharded = all_sharded(Path(scratch))
    show = Console(width=200, highlight=False).print
    show("| family | " + " | ".join([*CHECKS, "FSDP2"]) + " |")
    show("|---" * (len(CHECKS) + 2) + "|")
    for family in sorted(FAMILIES):
        show(f"| `{family}` | " + " | ".join([*row(family), YES if family in sharded else NO]) + " |")
    show("\n| checkpoint | text model | two word tables | one |\n|---|---|---|---|")
    for name in sorted(MULTIMODAL):
        show(f"| `{name}` | " + " | ".join(of_wrapper(name)) + " |")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sharded_families(*sys.argv[1:])
    else:
        main()
