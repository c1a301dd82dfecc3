"""Another number of ranks: the same samples in each optimizer step, whatever the order was made by; or a refusal."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lit_vlm.data.feed.batching import Batching, GlobalBatch, ModalityLength, Packed, Padded
from lit_vlm.data.feed.elastic import Moved, change, same_step
from lit_vlm.data.feed.mixture import Interleaved, Mixture, Shuffled, Weighted
from lit_vlm.data.feed.plan import BatchPlan
from tests.data.made import Count, measures_of, plan_over
from tests.tiny import ROOT

MIXTURES: dict[str, Mixture] = {
    "shuffled": Shuffled(),
    "weighted": Weighted({"a": 0.7, "b": 0.3}, samples=50),
    "interleaved": Interleaved(),
}
BATCHINGS: dict[str, Batching] = {
    "Padded": Padded(),
    "Packed": Packed(window=20),
    "ModalityLength": ModalityLength(),
}
BEGAN = GlobalBatch(1, 4, 3)
"""Twelve rows per optimizer step."""
OTHERS = [GlobalBatch(1, 4, 3), GlobalBatch(1, 2, 6), GlobalBatch(2, 3, 2), GlobalBatch(2, 6, 1), GlobalBatch(12, 1, 1)]
FIXTURE = ROOT / "tests" / "fixtures" / "loader_states_b045812.json"


def plan_of(mixture: str, batching: str, dealt: GlobalBatch, rank: int = 0) -> BatchPlan:
    measures = measures_of([(5 + (7 * i) % 20, i % 3) for i in range(51)], 40)
    sources = [Count("a", 33), Count("b", 18)]
    return plan_over(sources, dealt, rank, mixture=MIXTURES[mixture], batching=BATCHINGS[batching], measures=measures)


def steps(mixture: str, batching: str, dealt: GlobalBatch, epoch: int, state: dict[str, Any] | None) -> list[list[int]]:
    """The samples of each optimizer step, over all ranks."""
    ranks = []
    for rank in range(dealt.world_size):
        plan = plan_of(mixture, batching, dealt, rank)
        if state is not None:
            plan.load_state_dict(state)
        plan.set_epoch(epoch)
        ranks.append([[place.sample for place in batch] for batch in plan])
    micro = [[i for batch in together for i in batch] for together in zip(*ranks, strict=True)]
    size = dealt.accumulate
    return [sorted(i for batch in micro[k : k + size] for i in batch) for k in range(0, len(micro), size)]


def saved(mixture: str, batching: str, dealt: GlobalBatch, epoch: int, batches: int) -> dict[str, Any]:
    plan = plan_of(mixture, batching, dealt)
    plan.set_epoch(epoch)
    state: dict[str, Any] = json.loads(json.dumps(plan.state_dict(batches)))
    return state


@pytest.mark.parametrize("epoch", [0, 1, 2])
@pytest.mark.parametrize("batching", BATCHINGS)
@pytest.mark.parametrize("mixture", MIXTURES)
def test_a_step_has_the_samples_that_it_would_have_had(mixture: str, batching: str, epoch: int) -> None:
    whole = steps(mixture, batching, BEGAN, epoch, None)
    later = steps(mixture, batching, BEGAN, epoch + 1, None)
    assert len(whole) >= 2
    for other in OTHERS:
        for done in range(len(whole)):
            state = saved(mixture, batching, BEGAN, epoch, done * BEGAN.accumulate)
            assert steps(mixture, batching, other, epoch, state) == whole[done:], (other, done)
        assert steps(mixture, batching, other, epoch + 1, state) == later, other  # the next epoch begins at its start


@pytest.mark.parametrize("batching", BATCHINGS)
@pytest.mark.parametrize("mixture", MIXTURES)
def test_the_number_may_change_again_and_back(mixture: str, batching: str) -> None:
    whole = steps(mixture, batching, BEGAN, 0, None)
    state = saved(mixture, batching, BEGAN, 0, 0)
    for dealt in (GlobalBatch(2, 3, 2), GlobalBatch(1, 2, 6), BEGAN):
        plan = plan_of(mixture, batching, dealt)
        plan.load_state_dict(state)
        assert plan.start == plan.global_batch.accumulate * (state["batches"] // state["dealt"][2])
        state = json.loads(json.dumps(plan.state_dict(dealt.accumulate)))
        assert state["ordered_for"] == list(BEGAN)
    assert steps(mixture, batching, BEGAN, 0, state) == whole[1:]


def test_a_finished_epoch_is_followed_by_a_whole_one() -> None:
    length = len(plan_of("shuffled", "Padded", BEGAN))
    assert length % BEGAN.accumulate  # its last step is short
    plan = plan_of("shuffled", "Padded", GlobalBatch(2, 3, 2))
    plan.load_state_dict(saved("shuffled", "Padded", BEGAN, 0, length))
    assert plan.start == 0
    assert plan.moved == Moved(BEGAN, GlobalBatch(2, 3, 2), 51)
    assert plan.moved.batches(length) == len(plan) == 9


def test_a_place_inside_a_step_goes_on_as_it_was_dealt_out_alone() -> None:
    state = saved("shuffled", "Padded", BEGAN, 0, 4)
    again = plan_of("shuffled", "Padded", BEGAN)
    again.load_state_dict(state)
    assert again.start == 4
    message = (
        r"saved 1 micro-batches into an optimizer step of 3, so it can only go on as it was dealt out: 1 rows × 4 "
        r"devices × 3 micro-batches, not 1 rows × 2 devices × 6 micro-batches"
    )
    with pytest.raises(ValueError, match=message):
        plan_of("shuffled", "Padded", GlobalBatch(1, 2, 6)).load_state_dict(state)


@pytest.mark.parametrize("batching", BATCHINGS)
def test_other_rows_per_step_are_refused_with_both_numbers(batching: str) -> None:
    plan = plan_of("weighted", batching, GlobalBatch(1, 2, 3))
    message = (
        r"order of samples would be another \(rows per micro-batch on all devices: 4 then, 2 now.*rows per optimizer "
        r"step: 12 \(1 rows × 4 devices × 3 micro-batches\) then, 6 \(1 rows × 2 devices × 3 micro-batches\) now\).*"
        r"trainer.accumulate_grad_batches = 12 as before"
    )
    with pytest.raises(ValueError, match=message):
        plan.load_state_dict(saved("weighted", batching, BEGAN, 0, 3))


# ----- checkpoints of earlier versions, which do not say how rows were dealt out -----


@pytest.mark.parametrize("name", json.loads(FIXTURE.read_text()))
def test_a_checkpoint_of_an_earlier_version_goes_on_exactly_or_not_at_all(name: str) -> None:
    kept = json.loads(FIXTURE.read_text())[name]
    mixture, batching = name.split()
    plan = plan_of(mixture, batching, GlobalBatch(2, 2, 2), rank=1)
    plan.load_state_dict(kept["state"])
    assert [[place.sample for place in batch] for batch in plan] == kept["rest"]
    assert plan.moved is None
    with pytest.raises(
        ValueError, match=r"rows per micro-batch on all devices: 4 then, 2 now.*devices × batch size as"
    ):
        plan_of(mixture, batching, GlobalBatch(1, 2, 4)).load_state_dict(kept["state"])


# ----- what is chosen -----


@pytest.mark.parametrize(
    ("began", "left", "settings", "expected"),
    [
        ((16, 8, 1), (16, 8, 1), (16, 8, 1), None),  # nothing changed
        ((16, 8, 1), (16, 8, 1), (16, 4, 1), (16, 4, 2)),  # the batch size stays
        ((16, 8, 1), (16, 8, 1), (16, 2, 1), (16, 2, 4)),
        ((16, 8, 1), (16, 8, 1), (16, 16, 1), (8, 16, 1)),  # more devices
        ((16, 8, 3), (16, 8, 3), (16, 6, 3), (16, 6, 4)),
        ((15, 8, 1), (15, 8, 1), (15, 6, 1), (10, 6, 2)),  # the largest that divides
        ((16, 8, 1), (16, 4, 2), (16, 2, 1), (16, 2, 4)),  # changed before, the command as it began
        ((16, 8, 1), (16, 4, 2), (16, 4, 1), (16, 4, 2)),  # the same command again, on as many as at last
        ((16, 8, 1), (16, 4, 2), (16, 8, 1), None),  # and back
        ((16, 8, 1), (16, 4, 2), (16, 2, 2), (16, 2, 4)),  # from the config that went on
        ((16, 8, 1), (16, 4, 2), (16, 8, 2), (16, 8, 1)),
        ((16, 8, 1), (16, 8, 1), (32, 4, 1), None),  # the user gave what fits
        ((16, 8, 1), (16, 8, 1), (8, 4, 1), None),  # what does not, which the loader refuses
        ((16, 8, 1), (16, 8, 1), (16, 8, 2), None),
    ],
)
def test_the_rows_of_a_step_are_kept(
    began: tuple[int, int, int],
    left: tuple[int, int, int],
    settings: tuple[int, int, int],
    expected: tuple[int, int, int] | None,
) -> None:
    assert same_step(GlobalBatch(*began), GlobalBatch(*left), GlobalBatch(*settings)) == expected


@pytest.mark.parametrize(
    ("devices", "advice"), [(6, "take 4 or 8"), (7, "take 4 or 8"), (3, "take 2 or 4"), (200, "take 128")]
)
def test_a_step_that_does_not_divide_is_refused_with_numbers_that_do(devices: int, advice: str) -> None:
    began = GlobalBatch(16, 8)
    with pytest.raises(
        ValueError, match=rf"128 rows per optimizer step.*16 rows × 8 devices\), do not divide by {devices} .*{advice},"
    ):
        same_step(began, began, GlobalBatch(16, devices))


def test_the_change_is_one_line() -> None:
    assert change(GlobalBatch(16, 8), GlobalBatch(16, 4, 2)) == (
        "8 → 4 devices: 16 rows × 8 devices → 16 rows × 4 devices × 2 micro-batches = 128 rows per optimizer step as "
        "before; each device has 2.00 times the rows per step, so a step takes about as much longer"
    )
    assert change(GlobalBatch(16, 1, 2), GlobalBatch(16, 2)).endswith("each device has 0.50 times the rows per step")
