"""What a plan says of a step, and which change makes one fit."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lit_vlm.core.batch import Counts
from lit_vlm.core.devices import CARDS
from lit_vlm.planning.changes import smaller
from lit_vlm.planning.job import Device, Failed, Job, Measured, States, job_line, read_job, read_result, result_line
from lit_vlm.planning.operations import Message, Operation
from lit_vlm.planning.plan import Setup, StagePlan, largest_micro_batch, plan_stage
from lit_vlm.planning.roofline import Assumptions

GIB = 2**30
ASSUMED = Assumptions(matrix=0.5, bandwidth=1.0, kernel=0.0, context=0.0)
SETUP = Setup(CARDS["a100-80"], 8, 8, ASSUMED, price=2.0)
COUNTS = Counts(samples=4, tokens=3500, supervised=500, images=4, visual_tokens=2304, positions=4000)
STEP = Measured(
    states=States(10 * GIB, 20 * GIB, 40 * GIB),
    expected_states=States(10 * GIB, 20 * GIB, 40 * GIB),
    peak=75 * GIB,
    reserved=77 * GIB,
    typical=COUNTS,
    heaviest=COUNTS,
    mean={"samples": 4.0, "positions": 3000.0, "images": 4.0, "tokens": 2500.0},
    micro_batches=100,
    model_flops=312e12,
    operations=[
        Operation("forward", "mm", "bfloat16", 156e12, 0.0, 1),
        Operation("recompute", "mm", "bfloat16", 156e12, 0.0, 1),
        Operation("optimizer", "_fused_adamw_", "float32", 0.0, 2039e9, 1),
    ],
    messages=[Message("forward", "all_gather", 8.0, 8, 1, 1)],
    batch_size=4,
    accumulate=2,
    epochs=1,
    max_steps=None,
    records=8000,
    strategy="FSDP2",
    recompute=False,
    frozen_full=False,
    preparable=[],
    checkpoint=GIB,
    weights_file=GIB,
    host_loading=28 * GIB,
    batch_bytes=GIB // 100,
    record_bytes=50_000.0,
    workers=4,
    slots=[("decoder", "HFDecoder", 1, 0)],
    blocks=33,
    unsharded=[],
    precision="bf16-mixed",
)


def _plan(measured: Measured = STEP) -> StagePlan:
    return StagePlan("2_sft", SETUP, measured, fits=True)


def test_time_is_that_of_the_mean_micro_batch_and_of_one_optimizer_step() -> None:
    plan = _plan()
    assert plan.work == 0.75
    assert plan.step_seconds == pytest.approx(2 * 0.75 * 2.0 + 1.0)


def test_steps_follow_from_the_published_number_of_records() -> None:
    plan = _plan()
    assert plan.samples_per_step == 4 * 2 * 8
    assert plan.steps == 125
    assert plan.hours == pytest.approx(125 * plan.step_seconds / 3600)
    assert plan.to_json()["cost"] == pytest.approx(plan.hours * 8 * 2.0)


def test_steps_follow_from_the_data_where_they_are_there() -> None:
    assert _plan(replace(STEP, records=None)).samples == 100 * 4 * 8
    assert _plan(replace(STEP, max_steps=7, epochs=None)).steps == 7


def test_flops_tell_what_is_needed_from_what_is_computed_again() -> None:
    flops = _plan().flops
    assert flops == {"model": 2 * 0.75 * 312e12, "executed": 2 * 0.75 * 312e12, "recomputed": 2 * 0.75 * 156e12}
    assert _plan().mfu == pytest.approx(2 * 0.75 * 312e12 / (4.0 * 312e12))


def test_a_step_that_ran_on_a_real_device_sets_the_pace() -> None:
    recorded = _plan().step_seconds
    assert _plan(replace(STEP, seconds=[9.0, 2 * 2 * 2.0 + 2 * 1.0, 9.0])).step_seconds == pytest.approx(2 * recorded)


def test_memory_of_the_host() -> None:
    sharded = _plan().host
    whole = _plan(replace(STEP, blocks=0)).host
    assert whole["loading"] - sharded["loading"] == 7 * STEP.host_loading
    assert sharded["training"] > 8 * 4 * 4 * STEP.batch_bytes


JOB = Job(("--config", "model.yaml"), Device("A100", 1), 8)


def _flag(job: Job, name: str) -> str | None:
    found = [job.words[i + 1] for i, word in enumerate(job.words) if word == name]
    return found[-1] if found else None


class Machine:
    """Runs a step if its micro-batch, as flags say, fits; the memory grows with it."""

    def __init__(self, fits: int, recomputed: int = 0) -> None:
        self.fits, self.recomputed = fits, recomputed or fits
        self.jobs: list[Job] = []

    def __call__(self, job: Job) -> Measured | Failed:
        self.jobs.append(job)
        size = int(_flag(job, "--data.batch_size") or 4)
        again = _flag(job, "--model.decoder.init_args.recompute") == "true"
        if job.device.bytes < 1 << 43 and size > (self.recomputed if again else self.fits):
            return Failed("CUDA out of memory", memory=True)
        return replace(STEP, batch_size=size)


def test_what_fits_is_run_once() -> None:
    machine = Machine(fits=4)
    plan = plan_stage("2_sft", JOB, SETUP, machine)
    assert plan.fits
    assert len(machine.jobs) == 1
    assert machine.jobs[0].record
    assert machine.jobs[0].device.bytes == SETUP.room


def test_the_smallest_change_that_fits_is_found_by_running_it() -> None:
    plan = plan_stage("2_sft", JOB, SETUP, Machine(fits=1))
    assert not plan.fits
    assert [change.what for change in plan.changes] == ["micro-batches of 1, 8 per step"]
    assert plan.tried == [("micro-batches of 2, 4 per step", None), ("micro-batches of 1, 8 per step", STEP.peak)]
    assert plan.to_json()["flags"] == ["--data.batch_size", "1", "--trainer.accumulate_grad_batches", "8"]


def test_changes_are_taken_together_where_none_helps_alone() -> None:
    plan = plan_stage("2_sft", JOB, SETUP, Machine(fits=0, recomputed=2))
    assert [change.what for change in plan.changes] == ["recomputed blocks", "micro-batches of 2, 4 per step"]


def test_a_stage_that_nothing_helps_keeps_what_it_asks_for() -> None:
    plan = plan_stage("2_sft", JOB, SETUP, Machine(fits=0))
    assert not plan.fits
    assert not plan.changes
    assert plan.runs.peak == STEP.peak


def test_another_error_than_memory_is_raised_with_the_stage() -> None:
    with pytest.raises(ValueError, match="2_sft: no such head"):
        plan_stage("2_sft", JOB, SETUP, lambda _job: Failed("no such head"))


def test_states_that_do_not_fit_are_not_helped_by_smaller_batches() -> None:
    large = replace(STEP, states=States(90 * GIB, 0, 0), blocks=0, frozen_full=True, preparable=["depth"])
    changes = [[change.what for change in group] for group in smaller(large, SETUP.room, SETUP.devices)]
    assert changes[0] == ["frozen weights in bf16"]
    assert changes[1] == ["FSDP2 over all devices"]
    assert changes[2] == ["prepared features of depth"]
    assert changes[3] == ["FSDP2 over all devices", "recomputed blocks", "prepared features of depth"]


def test_the_largest_micro_batch_keeps_the_global_batch() -> None:
    plan = largest_micro_batch("2_sft", JOB, SETUP, Machine(fits=5), 4, 3)
    assert plan is not None
    assert plan.runs.batch_size == 4
    assert largest_micro_batch("2_sft", JOB, SETUP, Machine(fits=0), 4, 3) is None


def test_jobs_and_results_come_back_from_their_lines() -> None:
    assert read_job(job_line(JOB)) == JOB
    assert read_result(result_line(STEP)) == STEP
    failed = Failed("out of memory", memory=True)
    assert read_result(result_line(failed)) == failed
