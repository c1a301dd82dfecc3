"""`lit-vlm bench`: what it measures on a processor, what kernels say of the roofline, and what it refuses."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import LlavaForConditionalGeneration

from lit_vlm.checkpoints.published.llava_hf import llava_parts
from lit_vlm.checkpoints.published.llava_written import llava_config
from lit_vlm.commands.bench import main
from lit_vlm.commands.plan import _measured
from lit_vlm.core.batch import Counts
from lit_vlm.core.devices import CARDS
from lit_vlm.data.sample.collate import collate
from lit_vlm.planning.bench.job import Benched, Reference
from lit_vlm.planning.bench.kernels import KernelTime, Launch, Span, exposed, implied, kernel_times, recorded
from lit_vlm.planning.bench.reference import reference_inputs
from lit_vlm.planning.bench.report import Row, report, show
from lit_vlm.planning.bench.step import PHASES, draw
from lit_vlm.planning.operations import Operation
from lit_vlm.planning.roofline import Assumptions
from tests.runs import lit_vlm
from tests.tiny import samples_of, tiny_vlm

CARD = CARDS["h100"]
SECOND_OF_PRODUCTS = CARD.flops


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder and the output of a bench of a packed stage, against transformers."""
    folder = tmp_path_factory.mktemp("bench")
    flags = ["--stages", "2_sft", "--steps", "4", "--json", "out/bench.json", "--profile", "traces", "--against", "hf"]
    own = ["--data.batching", "Packed", "--data.batch_size", "2", "--trainer.accumulate_grad_batches", "2"]
    done = lit_vlm(folder, "bench", "llava15", "--scale", "tiny", *flags, *own)
    return folder, done.stdout


@pytest.mark.slow
def test_a_stage_is_measured_with_its_own_loader_and_trainer(bench: tuple[Path, str]) -> None:
    folder, said = bench
    content = json.loads((folder / "out" / "bench.json").read_text())
    (stage,) = content["stages"]
    assert stage["stage"] == "2_sft"
    assert (stage["batch_size"], stage["accumulate"], stage["steps"]) == (2, 2, 4)
    assert stage["fill"] > 0.6, "rows are packed"
    # Phases follow each other without a gap, so that their sum is the time from the first step to the last.
    split = sum(stage["split"][phase]["median"] for phase in PHASES)
    assert split == pytest.approx(stage["step_seconds"], rel=0.5)
    assert all(stage["split"][phase]["median"] > 0 for phase in ("data", "forward", "backward", "optimizer"))
    assert stage["tokens_per_s"] > 0
    assert 0 <= stage["data_wait"] < 1
    assert content["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert content["flags"]["steps"] == 4
    assert content["device"] in said.replace("\n", " ")


@pytest.mark.slow
def test_a_processor_says_nothing_of_the_roofline_of_gpus(bench: tuple[Path, str]) -> None:
    folder, said = bench
    assert _measured(folder / "out" / "bench.json") == {}
    assert "no plan beside it" in said


@pytest.mark.slow
def test_transformers_trains_on_the_same_samples(bench: tuple[Path, str]) -> None:
    folder, said = bench
    (stage,) = json.loads((folder / "out" / "bench.json").read_text())["stages"]
    other = stage["transformers"]
    assert other["ratio"] == pytest.approx(stage["tokens_per_s"] / other["tokens_per_s"])
    assert "LlavaForConditionalGeneration (sdpa, unpacked" in said


@pytest.mark.slow
def test_the_trace_is_one_that_perfetto_opens(bench: tuple[Path, str]) -> None:
    folder, _ = bench
    trace = json.loads((folder / "traces" / "2_sft.json").read_text())
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {"aten::mm", "aten::_fused_adamw_"} <= names
    assert sum(event.get("name") == "aten::_fused_adamw_" for event in trace["traceEvents"]) >= 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "name a recipe, as the first argument"),
        (["llava15", "tiny"], "'tiny' is neither a flag nor the value of one"),
        (["llava15", "--steps", "0"], "--steps is at least 1, not 0"),
        (["llava15", "--stages", "3_more"], "recipe 'llava15' has no stage '3_more'"),
        (["llava15", "--json", "."], "--json . is a folder; name another"),
        (["llava15", "--profile", "pyproject.toml"], "--profile pyproject.toml is a file; name another"),
    ],
)
def test_wrong_arguments_are_refused(words: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        main(words)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "flags", "said"),
    [
        ("llava15", ["--model.projecter", "Linear"], "there is no flag --model.projecter"),
        ("eve", ["--against", "hf"], "this model is EvePatchEmbedding"),
        (
            "llava15",
            ["--against", "hf", "--model.decoder.init_args.lora", "{rank: 2}"],
            "adapters, and here the decoder has some: set model.lora to null",
        ),
    ],
)
def test_what_a_stage_refuses_ends_the_command(tmp_path: Path, recipe: str, flags: list[str], said: str) -> None:
    stage = {"llava15": "1_align", "eve": "1_align"}[recipe]
    done = lit_vlm(tmp_path, "bench", recipe, "--scale", "tiny", "--stages", stage, *flags, check=False)
    assert done.returncode == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_kernels_are_sorted_by_the_operation_that_launched_them() -> None:
    launches = [
        Launch("aten::addmm", "gemm", 2.0),
        Launch("aten::cudnn_convolution", "implicit_gemm", 1.0),
        Launch("aten::_flash_attention_forward", "flash_fwd", 0.25),
        Launch("ScaledDotProductCudnnAttentionBackward0", "cudnn_generated_native_sdpa_bprop", 0.25),
        Launch("aten::copy_", "elementwise", 0.25),
        Launch("c10d::allreduce_", "ncclDevKernel_AllReduce", 4.0),
    ]
    operations = [
        Operation("forward", "addmm", "bfloat16", SECOND_OF_PRODUCTS, 0.0, 1),
        Operation("forward", "convolution", "bfloat16", SECOND_OF_PRODUCTS / 2, 0.0, 1),
        Operation("forward", "_scaled_dot_product_flash_attention", "bfloat16", SECOND_OF_PRODUCTS / 10, 0.0, 2),
        Operation("optimizer", "copy_", "float32", 0.0, CARD.bandwidth / 5, 1),
    ]
    times = kernel_times(launches, operations, CARD)
    assert {kind: one.seconds for kind, one in times.items()} == {
        "matrix": 3.0,
        "attention": 0.5,
        "memory": 0.25,
        "message": 4.0,
    }
    assert implied([times]) == pytest.approx({"matrix": 0.5, "attention": 0.4, "bandwidth": 0.8})


def test_shares_of_several_stages_are_weighted_by_their_time() -> None:
    stages = [{"matrix": KernelTime(1.0, 0.5)}, {"matrix": KernelTime(3.0, 2.1)}]
    assert implied(stages) == pytest.approx({"matrix": 0.65})


def test_messages_beside_kernels_are_hidden() -> None:
    spans = [
        Span("gemm", 0.0, 2.0),
        Span("gemm", 1.0, 3.0),
        Span("ncclDevKernel_AllGather", 2.5, 5.0),
        Span("k", 4.0, 4.5),
    ]
    assert exposed(spans) == pytest.approx((2.5, 1.5))


def test_a_recording_without_kernels_is_empty() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.ones(2, 2) @ torch.ones(2, 2)
    assert recorded(profile.events()) == ([], [])


def benched(**changes: object) -> Benched:
    """A measurement of ten steps of a second on one H100."""
    given: dict[str, object] = {
        "stage": "1_align",
        "device": "NVIDIA H100 80GB HBM3",
        "cuda": True,
        "processes": 1,
        "per_node": 1,
        "strategy": "SingleDeviceStrategy",
        "precision": "bf16-mixed",
        "own_data": True,
        "batch_size": 4,
        "accumulate": 1,
        "seconds": 10.0,
        "counts": Counts(40, 10000, 2000, 40, 5000, 12500)._asdict(),
        "phases": {phase: [0.1] * 10 for phase in PHASES} | {"backward": [0.5] * 10},
        "model_flops": 4e15,
        "peak_flops": 1e15,
        "memory": {"allocated": 2**34, "reserved": 2**35, "device": 2**35, "total": 79 * 2**30},
    }
    return Benched(**given | changes)  # type: ignore[arg-type]


def test_figures_of_a_measurement(tmp_path: Path) -> None:
    benched(messages=(1.0, 0.5), kernels={"matrix": KernelTime(1.0, 0.5)}).write(tmp_path / "one")
    one = Benched.read(tmp_path / "one")
    assert one.kernels["matrix"].best == 0.5
    assert one.messages == (1.0, 0.5)
    row = Row(one, "no plan", Reference([1.0] * 10, {"tokens": 5000.0}, 2**34, 2**35, "sdpa"))
    content = report([row], {})
    (stage,) = content["stages"]
    assert (stage["tokens_per_s"], stage["samples_per_s"], stage["mfu"]) == (1000.0, 4.0, 0.4)
    assert (stage["allocated_gib"], stage["reserved_gib"]) == (16.0, 32.0)
    assert stage["data_wait"] == pytest.approx(0.1)
    assert stage["transformers"]["ratio"] == 2.0
    assert stage["plan"] == {"note": "no plan"}
    assert content["assumptions"] == {"matrix": 0.5}
    assert Assumptions().changed(content["assumptions"]).matrix == 0.5


def test_what_a_simulated_device_measures_is_marked() -> None:
    row = Row(benched(simulated=True), "no plan")
    assert report([row], {})["simulated"] is True
    console = Console(record=True, width=200, file=io.StringIO())
    show(row, console)
    assert "the device is simulated: memory is real, and no time or speed means anything" in console.export_text()


def test_drawn_weights_are_finite_and_the_same_each_time() -> None:
    first, second = tiny_vlm(), tiny_vlm()
    for model in (first, second):
        draw(model.parameters())
    for (name, one), other in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other), name
        assert torch.isfinite(one).all()
        assert one.std() < 0.03 if one.ndim > 1 else (one == 1).all(), name


def test_transformers_sees_the_samples_that_the_kit_sees() -> None:
    model = tiny_vlm()
    encoder, _, decoder = llava_parts(model)
    batch = collate(samples_of(model, 4))
    image_id = decoder.vocab_size
    reference = LlavaForConditionalGeneration(llava_config(encoder, decoder, image_id)).eval()
    inputs = reference_inputs(encoder, batch, image_id)
    assert int((inputs["input_ids"] == image_id).sum()) == len(batch.image_positions)
    assert int(inputs["attention_mask"].sum()) == batch.num_tokens
    assert torch.equal(inputs["labels"], batch.labels)
    with torch.no_grad():
        assert torch.isfinite(reference(**inputs).loss)
