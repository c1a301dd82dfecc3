"""Blocks compile as one graph each, give the numbers of uncompiled ones, and are not compiled over and over."""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import pytest
import torch
from torch import Tensor, nn

from lit_vlm.core.batch import Batch
from lit_vlm.data import ChatML, SquareCrop, VLMData
from lit_vlm.data.feed.batching import Packed, Padded
from lit_vlm.data.sample.collate import collate, make_rows
from lit_vlm.data.sample.encode import Sample
from lit_vlm.decoders import HFDecoder
from lit_vlm.embedders import Holistic
from lit_vlm.encoders import ConvPatches
from lit_vlm.model.build import build
from lit_vlm.model.generate import generate
from lit_vlm.model.vlm import VLM
from lit_vlm.projectors import Linear
from lit_vlm.testing import Case
from lit_vlm.testing.sharded import difference, parted, ready, whole
from lit_vlm.testing.tiny import samples_for, tiny_slots
from lit_vlm.training.compiling import compile_blocks
from lit_vlm.training.module import LitVLM
from lit_vlm.training.stage import Stage
from lit_vlm.worlds import Shapes
from tests.callbacks.test_callbacks import trainer
from tests.members import ADAPTED, CASES, LAYERS
from tests.runs import gathered, run_ranks, tiny_fit
from tests.tiny import LLAMA, batch_of, tiny_vlm

RECOMPUTING = partial(HFDecoder, config=LLAMA, tokenizer="bytes", recompute=True)


@pytest.fixture(autouse=True)
def _no_graphs() -> Iterator[None]:
    """Graphs of one test are none of another's."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    """How many graphs were made so far; the wrapper refuses blocks that take several."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def step(model: VLM, batch: Batch, losses: dict[str, float]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses and gradients."""
    model.zero_grad()
    sums = model(batch, losses)
    sum((losses[name] * value for name, value in sums.items()), torch.zeros(())).backward()
    found = {name: value.detach() for name, value in sums.items()}
    return found, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check_alike(one: VLM, two: VLM, batch: Batch, losses: dict[str, float], tolerance: float = 1e-5) -> None:
    for expected, found in zip(step(one, batch, losses), step(two, batch, losses), strict=True):
        for name, share in difference(expected, found).items():
            assert share <= tolerance, f"{name}: {share}"


# ------------------------------------------------------------------ one graph for each kind of block

ONE_GRAPH = {
    # Case: parts whose blocks must come to one graph each.
    "HFEncoder": ["encoder HFEncoder (CLIPEncoderLayer)", "decoder HFDecoder (LlamaDecoderLayer)"],
    "TimmEncoder/transformer": ["encoder TimmEncoder (Block)", "decoder HFDecoder (LlamaDecoderLayer)"],
    "Transformer": ["projector Transformer (LlamaDecoderLayer)", "decoder HFDecoder (LlamaDecoderLayer)"],
    "Holistic/merge": ["embedder Holistic (LlamaDecoderLayer)", "decoder HFDecoder (LlamaDecoderLayer)"],
    "HFDecoder with adapters": ["encoder HFEncoder (CLIPEncoderLayer)", "decoder HFDecoder (LlamaDecoderLayer)"],
    "DivideAndConquer": ["encoder HFEncoder (CLIPEncoderLayer)", "decoder DivideAndConquer (LlamaDecoderLayer)"],
    "PatchAlignment": ["encoder HFEncoder (CLIPEncoderLayer)", "decoder HFDecoder (LlamaDecoderLayer)"],
}


@pytest.mark.parametrize("name", ONE_GRAPH)
def test_each_kind_of_block_is_one_graph_with_the_numbers_of_an_uncompiled_one(name: str) -> None:
    case = (CASES | ADAPTED)[name]
    one, two = (ready(build(tiny_slots(**case.slots)), case) for _ in range(2))
    kinds = compile_blocks(two, fixed_rows=False, backend="eager")
    assert [kind.name for kind in kinds] == [f"the blocks of {kind}" for kind in ONE_GRAPH[name]]
    seen, text = samples_for(one, case.sizes * 2)
    check_alike(one, two, collate([*seen, *text]), dict(case.losses))
    assert graphs() == len(kinds)


def test_recomputation_is_inside_of_the_graph_and_keeps_the_input_of_a_block_alone() -> None:
    decoder = RECOMPUTING().train()
    embeds, positions = torch.randn(2, 64, 64, requires_grad=True), torch.arange(64).expand(2, -1)
    sizes: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in decoder.parameters()}

    def note(kept: Tensor) -> Tensor:
        if kept.untyped_storage().data_ptr() not in weights:
            sizes[kept.untyped_storage().data_ptr()] = kept.untyped_storage().nbytes()
        return kept

    class Alone:
        def slots(self) -> dict[str, list[HFDecoder]]:
            return {"decoder": [decoder]}

    compile_blocks(Alone(), fixed_rows=True, backend="aot_eager")  # type: ignore[arg-type]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda kept: kept):
        decoder(embeds, positions)
    # Of each block its input, and of all together the rotary table; a Llama block that keeps all has about 18 inputs.
    assert sum(sizes.values()) < (decoder.num_layers + 3) * embeds.nbytes


# ------------------------------------------------------------------ how often torch compiles


def longer(sample: Sample, by: int) -> Sample:
    return Sample(sample.id, sample.source, [*sample.ids, *[7] * by], [*sample.labels, *[7] * by])


def batches_of(model: VLM) -> tuple[list[Batch], list[Batch]]:
    """Batches with one sample per row, and packed ones; of many lengths and numbers of pictures."""
    seen, text = samples_for(model, [(28, 28)] * 4)
    padded = [
        collate([*seen[:2], *text]),
        collate([*seen[:3], longer(text[0], 20)]),
        collate([seen[0], longer(text[1], 30), text[0]]),
        collate([seen[1], text[1]]),
        collate([longer(text[0], 25), text[1]]),
    ]
    packed = [
        make_rows([[seen[0], text[0], text[1]], [seen[1], longer(text[1], 9)]], length=64),
        make_rows([[seen[2], seen[3]], [longer(text[0], 20), seen[0], text[1]]], length=64),
        make_rows([[longer(text[0], 31), text[1]], [seen[0], longer(text[1], 13)]], length=64),
    ]
    return padded, packed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("decoder", "rows", "expected"),
    [
        # The encoder makes two in any case: one for a picture (or a dummy) and one for several.
        (RECOMPUTING, "padded", 1 + 2),
        (RECOMPUTING, "packed", 1 + 2),
        # Which rows are image tokens differs from batch to batch; a batch without any is a graph of its own.
        (CASES["DivideAndConquer"].slots["decoder"], "padded", 2 + 2),
        (CASES["DivideAndConquer"].slots["decoder"], "packed", 2 + 2),
    ],
    ids=["padded", "packed", "padded-divided", "packed-divided"],
)
def test_lengths_and_numbers_of_pictures_do_not_compile_anew(decoder: Any, rows: str, expected: int) -> None:
    case = Case({"decoder": decoder})
    one, two = (ready(build(tiny_slots(**case.slots)), case) for _ in range(2))
    compile_blocks(two, fixed_rows=rows == "packed", backend="eager")
    padded, packed = batches_of(one)
    for batch in padded if rows == "padded" else packed:
        check_alike(one, two, batch, {"next_token": 1.0})
    assert graphs() == expected
    compile_blocks(two, fixed_rows=rows == "packed", backend="eager")  # a second fit of the same model
    two(padded[0] if rows == "padded" else packed[0], {"next_token": 1.0})
    assert graphs() == expected


def test_decoding_runs_blocks_as_they_are() -> None:
    model = tiny_vlm()
    batch = batch_of(model, 2)
    stop = frozenset({model.decoder.tokenizer.eos_token_id})
    expected = generate(model, batch, stop, 8)
    compile_blocks(model, fixed_rows=False, backend="eager")
    assert generate(model, batch, stop, 8) == expected
    assert graphs() <= 1  # the encoder's


# ------------------------------------------------------------------ what cannot be compiled


class Undecided(nn.Module):
    """A block whose path depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if x.sum() > 0 else x


class UndecidedProjector(Linear):
    """A projector with such a block."""

    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__(in_width, out_width)
        self.block = Undecided()

    def blocks(self) -> list[nn.Module]:
        return [self.block]

    def forward(self, tokens: Any) -> Any:
        tokens.features = self.block(tokens.features)
        return super().forward(tokens)


def test_a_block_that_is_no_single_graph_is_refused_by_name() -> None:
    model = tiny_vlm(projector=UndecidedProjector)
    compile_blocks(model, fixed_rows=False, backend="eager")
    message = r"model.compile: the blocks of projector UndecidedProjector \(Undecided\) do not compile as one graph: .+"
    with pytest.raises(ValueError, match=message + r"\. Set model.compile to null, or"):
        model(batch_of(model), {"next_token": 1.0})


def test_inputs_on_the_host_are_refused() -> None:
    model = tiny_vlm(decoder=partial(RECOMPUTING, recompute="offload"))
    with pytest.raises(ValueError, match=r"model.compile: decoder HFDecoder has recompute: offload.*recompute to true"):
        compile_blocks(model, fixed_rows=False)


def test_blocks_go_on_uncompiled_after_too_many_graphs(caplog: pytest.LogCaptureFixture) -> None:
    case = Case({"decoder": RECOMPUTING})
    one, two = (ready(build(tiny_slots(**case.slots)), case) for _ in range(2))
    compile_blocks(two, fixed_rows=False, backend="eager")
    padded, _ = batches_of(one)
    with torch._dynamo.config.patch(recompile_limit=1), caplog.at_level(logging.WARNING, "lit_vlm.training.compiling"):
        for batch in padded:
            check_alike(one, two, batch, {"next_token": 1.0})
    (record,) = [record for record in caplog.records if record.name == "lit_vlm.training.compiling"]
    assert "the blocks of encoder HFEncoder (CLIPEncoderLayer) were called in more ways" in record.getMessage()


# ------------------------------------------------------------------ sharded, and whole runs

SHARDED = {
    "divided": CASES["DivideAndConquer"],
    "holistic": Case(
        {
            "encoder": partial(ConvPatches, 32, 28, 7),
            "projector": Linear,
            "embedder": partial(Holistic, merge=2, recompute=True, **LAYERS),
            "decoder": RECOMPUTING,
        },
        [(28, 28), (56, 28)],
    ),
}


def _one_rank(rank: int, folder: str) -> None:
    """A process of the test below: as `testing.sharded.parted`, with compiled blocks; the first has no pictures."""
    with gathered(folder, rank):
        results = {}
        for name, case in SHARDED.items():
            results[name] = parted(case, lambda model: compile_blocks(model, fixed_rows=False, backend="aot_eager"))
        if rank == 0:
            torch.save(results, f"{folder}/results.pt")


if __name__ == "__main__":
    _one_rank(int(sys.argv[1]), sys.argv[2])


@pytest.mark.slow
def test_compiled_blocks_of_two_sharded_processes_give_the_numbers_of_one(tmp_path: Path) -> None:
    run_ranks(tmp_path, "tests.training.test_compiling", str(tmp_path))
    results = torch.load(tmp_path / "results.pt", weights_only=True)
    for name, case in SHARDED.items():
        for expected, found in zip(whole(case), results[name], strict=True):
            assert all(share <= 1e-4 for share in difference(expected, found).values()), name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("packed", [True, False])
def test_training_compiles_blocks_and_packed_rows_have_one_length(
    packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[bool] = []

    def compile_eagerly(model: VLM, fixed_rows: bool) -> None:
        calls.append(fixed_rows)
        compile_blocks(model, fixed_rows, backend="eager")

    monkeypatch.setattr("lit_vlm.training.module.compile_blocks", compile_eagerly)
    lengths: set[int] = set()
    made = {}
    for compiles in (None, "blocks"):
        lightning.seed_everything(3)
        slots = tiny_slots(decoder=RECOMPUTING)
        parts = (slots.encoder, slots.projector, slots.embedder, slots.decoder)
        module = LitVLM(*parts, Stage(train={"decoder": 1e-3}), compile=compiles)
        whole_step = module.training_step

        def training_step(batch: Batch, batch_idx: int, step: Any = whole_step) -> Tensor:
            lengths.add(batch.input_ids.shape[1])
            return step(batch, batch_idx)

        if compiles:
            module.training_step = training_step  # type: ignore[method-assign]
        batching = Packed() if packed else Padded()
        data = VLMData([Shapes(24)], ChatML(), SquareCrop(), batch_size=2, max_length=80, batching=batching)
        trainer(tmp_path, max_steps=3).fit(module, data)
        made[compiles] = module.vlm.state_dict()
    assert calls == [packed]
    assert lengths == {80} if packed else len(lengths) > 1
    assert graphs() > 0
    torch.testing.assert_close(made["blocks"], made[None], atol=1e-5, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch's own backend needs a C++ compiler on a CPU")
@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp"])
def test_a_compiled_stage_gives_the_weights_of_an_uncompiled_one(
    strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--trainer.logger", "false", "--data.batching", "Packed", "--model.decoder.recompute", "true"]
    flags += ["--data.batch_size", "1" if strategy != "single" else "2"]
    flags += ["--trainer.devices", "2"] if strategy != "single" else []
    plain = tiny_fit(tmp_path, "plain", "2_sft", *flags, strategy=strategy)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled-code"))
    found = tiny_fit(tmp_path, "compiled", "2_sft", *flags, "--model.compile", "blocks", strategy=strategy)
    assert any((tmp_path / "compiled-code").iterdir())
    for name, value in plain.items():
        torch.testing.assert_close(found[name], value, atol=2e-5, rtol=1e-3, msg=name)
