"""What the kit says a step needs, beside a count of the operations that run."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from lit_vlm import flops
from lit_vlm.core.batch import Batch, VisualTokens
from lit_vlm.core.flops import executed
from lit_vlm.data.sample.collate import collate, make_rows
from lit_vlm.model.build import Slots, build
from lit_vlm.model.vlm import VLM
from lit_vlm.testing import Case
from lit_vlm.testing.sharded import ready
from lit_vlm.testing.tiny import Size, samples_for
from lit_vlm.training.stage import Stage
from lit_vlm.training.step_flops import StepFlops
from tests.members import ADAPTED, CASES
from tests.tiny import tiny_decoder, tiny_slots

ONE: list[Size] = [(28, 28)]
LOSSES = {"next_token": 1.0}
# Where nothing in front of the decoder trains, the frozen products that read its input need no gradient of it; they are
# counted, a small part of one block of many.
TOLERANCE = dict.fromkeys([name for name in ADAPTED if name.startswith(("HFDecoder", "DivideAndConquer"))], 0.04)


@pytest.fixture
def full_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program computes the scores that a causal mask throws away, which are no model FLOPs."""
    monkeypatch.setattr(flops, "_pairs", lambda length: length**2)
    monkeypatch.setattr("lit_vlm.decoders.base.pairs_ahead", lambda lengths: 0.0)  # among them


def made(case: Case) -> tuple[VLM, Slots]:
    """A model that trains as in `case`, without computing anything twice."""
    plain = {
        name: partial(slot, recompute=False) if isinstance(slot, partial) and "recompute" in slot.keywords else slot
        for name, slot in case.slots.items()
    }
    slots = tiny_slots(**plain)
    return ready(build(slots), case), slots


def run(model: VLM, batch: Batch, case: Case) -> float:
    """Operations of a step."""
    model.zero_grad()
    losses = case.losses
    return executed(lambda: sum((losses[k] * v for k, v in model(batch, losses).items()), torch.zeros(())))


def freeze(model: VLM, *slots: str) -> None:
    """Let only these slots train, of what trains now."""
    for slot, parts in model.slots().items():
        for part in parts if slot not in slots else ():
            part.requires_grad_(False)


@pytest.mark.parametrize("name", [*CASES, *ADAPTED])
@pytest.mark.usefixtures("full_scores")
def test_each_member_says_what_runs(name: str) -> None:
    case = (CASES | ADAPTED)[name]
    model, slots = made(case)
    seen, _ = samples_for(model, case.sizes)
    batches = [collate([sample]) for sample in seen]  # without padding
    for trained in (tuple(model.slots()), ("embedder", "projector", "heads"), ("decoder", "heads")):
        freeze(ready(model, case), *trained)
        if all(part.frozen() for name in {*trained} - {"heads"} for part in model.slots().get(name, ())):
            continue  # nothing trains, or heads alone
        said = StepFlops(model, slots, case.losses)
        for batch in batches:
            assert said(batch) == pytest.approx(run(model, batch, case), rel=TOLERANCE.get(name, 0.02)), trained
        assert said(collate(seen)) <= sum(said(batch) for batch in batches)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_attention_heads": 4, "head_dim": 32},
        {"tie_word_embeddings": True},
        {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    ],
)
@pytest.mark.usefixtures("full_scores")
def test_decoders_say_what_runs(changes: dict[str, Any]) -> None:
    case = Case({"decoder": tiny_decoder(**changes)}, ONE)
    model, slots = made(case)
    model.decoder.lm.set_experts_implementation("eager")  # grouped products are not counted
    batch = collate(samples_for(model, case.sizes)[0])
    assert StepFlops(model, slots, case.losses)(batch) == pytest.approx(run(model, batch, case), rel=0.02)


def test_blocks_without_attention_have_no_scores() -> None:
    decoder = tiny_decoder()()
    assert decoder.attention_width == 3 * 64
    decoder.config.layer_types = ["full_attention", "linear_attention", "full_attention"]
    assert decoder.attention_width == 2 * 64


def test_packing_and_padding_cost_nothing_and_sizes_may_be_mixed() -> None:
    case = Case({"encoder": CASES["EvePatchEmbedding"].slots["encoder"]}, [(28, 28), (14, 28), (28, 28)])
    model, slots = made(case)
    seen, text = samples_for(model, case.sizes)
    said = StepFlops(model, slots, case.losses)
    alone = sum(said(collate([sample])) for sample in [*seen, *text])
    assert said(collate([*seen, *text])) == pytest.approx(alone)
    assert said(make_rows([[seen[0], text[0]], [seen[1], text[1], seen[2]]])) == pytest.approx(alone)


@pytest.mark.usefixtures("full_scores")
def test_a_dummy_picture_costs_nothing() -> None:
    case = Case({}, ONE)
    model, slots = made(case)
    text = collate(samples_for(model, case.sizes)[1][:1])
    dummy = executed(lambda: model.projector(model.encoder(model.encoder.dummy_images())).features)
    assert StepFlops(model, slots, case.losses)(text) == pytest.approx(run(model, text, case) - dummy, rel=0.02)


def test_prepared_features_leave_the_network_out() -> None:
    case = CASES["FeatureDistillation"]
    model, slots = made(case)
    freeze(model, "projector", "heads")
    seen, _ = samples_for(model, case.sizes)
    batch = collate(seen)
    said = StepFlops(model, slots, case.losses)
    with torch.no_grad():
        encoder = executed(lambda: model.encoder(batch.images).features)
        teacher = executed(lambda: model.heads["own"].teacher(batch.teacher_images["own"]).features)
        features = model.encoder(batch.images)
    ready_made = VisualTokens(features.features, features.grids)
    prepared = replace(batch, prepared={"encoder": ready_made, "own": ready_made})
    assert said(batch) - said(prepared) == pytest.approx(encoder + teacher)


@pytest.mark.usefixtures("full_scores")
def test_a_head_without_weight_and_a_decoder_that_no_loss_reads_cost_nothing() -> None:
    case = CASES["HolisticDistillation"]
    model, slots = made(case)
    seen, _ = samples_for(model, case.sizes)
    both, plain, image = (
        StepFlops(model, slots, losses)(collate(seen))
        for losses in ({"next_token": 1.0, "own": 1.0}, LOSSES, {"own": 1.0})
    )
    assert image < plain < both
    assert image == pytest.approx(run(model, collate(seen), replace(case, losses={"own": 1.0})), rel=0.1)


def test_each_token_passes_one_branch_and_adapters_need_no_gradient_of_frozen_weights() -> None:
    plain, parted = (made(Case(slots, ONE)) for slots in ({"decoder": tiny_decoder()}, CASES["DivideAndConquer"].slots))
    one, two = (
        StepFlops(model, slots, LOSSES)(collate(samples_for(model, ONE)[0])) for model, slots in (plain, parted)
    )
    assert one == two
    model, slots = made(ADAPTED["HFDecoder/lora"])
    batch = collate(samples_for(model, ONE)[0])
    adapted = StepFlops(model, slots, LOSSES)(batch)
    Stage(train={"decoder": 1.0}).freeze(model, [])
    assert StepFlops(model, slots, LOSSES)(batch) < adapted < one
