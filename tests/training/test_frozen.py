"""Frozen weights in the compute type: half the bytes, and the same losses, gradients and checkpoints, bit for bit."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from lit_vlm.checkpoints.folder import checkpoints_in
from lit_vlm.core.precision import DTYPES
from lit_vlm.data.sample.collate import collate
from lit_vlm.decoders import AbsentDecoder, Lora
from lit_vlm.heads import Head
from lit_vlm.model.build import build, build_on_meta, load_teachers
from lit_vlm.model.vlm import VLM
from lit_vlm.teachers.base import EncoderTeacher
from lit_vlm.testing import Case
from lit_vlm.testing.tiny import samples_for, tiny_decoder, tiny_slots
from lit_vlm.training.frozen import Originals, narrow_whole, stored_in
from lit_vlm.training.sharding import reshard, shard
from lit_vlm.training.stage import Stage
from tests.members import CASES
from tests.runs import gathered, lit_vlm, run_ranks, tiny_fit

BF16 = torch.bfloat16
TENSORS = dict[str, Tensor]
MIXED = ["--trainer.precision", "bf16-mixed", "--trainer.logger", "false", "--checkpoint.every_n_steps", "2",
         "--checkpoint.keep", "-1"]  # fmt: skip
TWO = ["--data.batch_size", "4", "--trainer.devices", "2"]
STRATEGIES = {
    "single": ["--data.batch_size", "8", "--model.stage.optimizer", "muon", "--trainer.gradient_clip_val", "1.0"],
    "ddp": TWO,
    "fsdp": TWO,
}


def frozen_model(case: Case, model: VLM, slot: str | None = None) -> tuple[VLM, Stage]:
    """A case's model of which one slot trains, the first that can unless it is given; and the stage that says so."""
    if case.leave_out:
        model.decoder = AbsentDecoder(model.decoder)
    order = ("projector", "embedder", "encoder", "decoder")
    able = [name for name in order if any(list(part.parameters()) for part in model.slots()[name])]
    stage = Stage(train={slot or able[0]: 1e-3}, only=case.only if slot else {}, losses=dict(case.losses))
    stage.freeze(model)
    return model, stage


def step(model: VLM, case: Case, dtype: torch.dtype, only_text: bool | None = None) -> tuple[TENSORS, TENSORS]:
    """Losses and gradients of a step under autocast, of all samples, or only of those without or with pictures."""
    seen, text = samples_for(model, case.sizes)
    batch = collate([*seen, *text] if only_text is None else text if only_text else seen)
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype):
        sums = model.train()(batch, case.losses)
    sum((case.losses[name] * value for name, value in sums.items()), torch.zeros(())).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: value.detach() for name, value in sums.items()}, {
        name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in grads.items()
    }


def assert_same(one: TENSORS, two: TENSORS) -> None:
    """Both have the same values under the same names, whatever type they are stored in."""
    assert one.keys() == two.keys()
    assert not [name for name, value in one.items() if not torch.equal(value.double(), two[name].double())]


@pytest.mark.parametrize("name", CASES)
def test_no_member_computes_anything_else(name: str) -> None:
    case = CASES[name]
    results = []
    for narrow in (None, BF16):
        model, _ = frozen_model(case, build(tiny_slots(**case.slots)))
        own = sum(p.nbytes for p in model.parameters())
        load_teachers(model, model.heads, narrow)
        if narrow:
            narrow_whole(model, narrow, keep=True)
            assert sum(p.nbytes for p in model.parameters()) < 0.8 * own
        results.append((*step(model, case, BF16), model.state_dict()))
    for full, compute in zip(*results, strict=True):
        assert_same(full, compute)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_bytes_and_own_values(precision: str) -> None:
    dtype = DTYPES[precision]
    model, stage = frozen_model(Case(), build(tiny_slots()))
    linear = [p for name, p in model.decoder.named_parameters() if "proj" in name or "lm_head" in name]
    own = {name: value.clone() for name, value in model.state_dict().items()}
    before = sum(p.nbytes for p in model.decoder.parameters())
    counts = stage.summary(model)
    originals = narrow_whole(model, dtype, keep=True)
    assert originals is not None
    assert {p.dtype for p in linear} == {dtype}
    assert sum(p.nbytes for p in model.decoder.parameters()) == before - sum(p.nbytes for p in linear)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert stage.summary(model) == counts
    narrow = sum(p.nbytes for p in model.parameters() if p.dtype == dtype) / 2**20
    assert f"{narrow:.1f} MiB in {str(dtype).removeprefix('torch.')}" in stored_in(model)
    assert_same(own, model.state_dict())
    assert narrow_whole(build(tiny_slots()).requires_grad_(False), dtype, keep=False) is None


def test_published_bf16_needs_no_own_values_and_loading_replaces_them() -> None:
    model, _ = frozen_model(Case(), build(tiny_slots()))
    for parameter in model.decoder.parameters():
        parameter.data = parameter.data.bfloat16().float()
    originals = narrow_whole(model, BF16, keep=True)
    assert originals is not None
    assert not [name for name in originals.values if name.startswith("decoder.")]
    assert [name for name in originals.values if name.startswith("encoder.")]
    other = {
        name: value + 2**-12 if value.is_floating_point() else value
        for name, value in build(tiny_slots()).state_dict().items()
    }
    model.load_state_dict(other)
    assert_same(other, model.state_dict())
    assert torch.equal(model.decoder.state_dict()["lm.lm_head.weight"], other["decoder.lm.lm_head.weight"].bfloat16())
    model.load_state_dict({name: value.bfloat16() for name, value in other.items()})
    assert not [name for name in originals.values if name.startswith("decoder.")]


def test_a_teacher_is_narrow_where_asked_and_refuses_what_fp16_does_not_hold() -> None:
    model = build(tiny_slots(**CASES["FeatureDistillation"].slots))
    head = model.heads["own"]
    assert isinstance(head, Head)
    assert isinstance(head.teacher, EncoderTeacher)
    load_teachers(model, model.heads)
    weights = dict(head.teacher.encoder.named_parameters())
    assert {p.dtype for p in weights.values()} == {torch.float32}
    load_teachers(model, model.heads, BF16)
    assert {p.dtype for name, p in weights.items() if "fc1" in name or "q_proj" in name} == {BF16}
    assert {p.dtype for name, p in weights.items() if "norm" in name} == {torch.float32}
    wide = next(p for name, p in weights.items() if "fc1.weight" in name)
    wide.data = torch.full(wide.shape, 1e9)
    with pytest.raises(
        ValueError, match=r"heads.own.teacher: the encoder.*fc1.weight has values up to 1e\+09, and .* 16-m"
    ):
        load_teachers(model, model.heads, torch.float16)


# ---------------------------------------------------------------------- two processes

SHARDED = {
    "lora": (Case({"decoder": tiny_decoder(Lora(rank=2))}), "decoder"),
    "tied": (CASES["HFDecoder"], "projector"),
    "half a block": (CASES["DivideAndConquer/vision"], "decoder"),
    "two names": (CASES["Tangled"], "encoder"),
}
"""Cases and the slot that trains: adapters and branches share their block with frozen weights."""


def _sharded(case: Case, slot: str, replicas: int, narrow: bool) -> tuple[TENSORS, TENSORS, TENSORS, int]:
    """Losses, gradients, whole weights after a step of the optimizer, and bytes of this process's shards."""
    slots, first = tiny_slots(**case.slots), dist.get_rank() == 0
    mesh = init_device_mesh("cpu", (2,))
    if replicas > 1:
        mesh = init_device_mesh("cpu", (replicas, 2 // replicas), mesh_dim_names=("replicate", "shard"))
    model, stage = frozen_model(case, build(slots) if first else build_on_meta(slots), slot)
    own = {name: value.clone() for name, value in model.state_dict().items()} if first else {}
    kept = shard(model, mesh, BF16, narrow)
    stage.freeze(model)
    assert isinstance(kept, Originals) == narrow
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {BF16 if narrow else torch.float32}
    size = sum(p.to_local().nbytes for p in model.parameters() if isinstance(p, DTensor) and not p.requires_grad)
    optimizer = stage.make_optimizer(model)
    losses, grads = step(model, case, BF16, only_text=first)
    optimizer.step()
    reshard(model)
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if first:
        frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
        assert_same({name: own[name] for name in frozen}, {name: whole[name] for name in frozen})
    return losses, grads, whole, size


def _one_rank(rank: int, folder: str) -> None:
    """A process of the test below."""
    with gathered(folder, rank):
        for case, slot in SHARDED.values():
            for replicas in (1, 2):
                full, compute = (_sharded(case, slot, replicas, narrow) for narrow in (False, True))
                assert compute[3] * 2 == full[3]
                for one, two in zip(full[:3], compute[:3], strict=True):
                    assert_same(one, two)


def test_two_sharded_processes_compute_nothing_else(tmp_path: Path) -> None:
    run_ranks(tmp_path, "tests.training.test_frozen", str(tmp_path))


# ---------------------------------------------------------------------- runs


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy", ["single", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ddp", "fsdp"))]
)
def test_a_run_leaves_the_same_checkpoints_and_goes_on_from_them(tmp_path: Path, strategy: str) -> None:
    fit = partial(tiny_fit, tmp_path, strategy=strategy)
    flags = [*MIXED, *STRATEGIES[strategy]]
    full = fit("full", "1_align", *flags, "--model.stage.frozen_dtype", "full")
    compute = fit("compute", "1_align", *flags)
    assert_same(full, compute)
    first, last = checkpoints_in(tmp_path / "compute")
    assert_same(compute, fit("resumed", "1_align", *flags, "--ckpt_path", str(first)))
    after = [
        fit(f"{name}-2", "2_sft", *flags, "--model.stage.start_from", str(tmp_path / name))
        for name in ("full", "compute")
    ]
    assert_same(*after)
    assert any(not torch.equal(after[0][name], full[name]) for name in full if name.startswith("decoder."))
    if strategy == "single":
        state = torch.load(last, weights_only=True)["state_dict"]
        assert {v.dtype for k, v in state.items() if k.startswith("model.projector")} == {torch.float32}


@pytest.mark.slow
def test_whole_and_sharded_checkpoints_of_either_setting_are_resumed(tmp_path: Path) -> None:
    fit = partial(tiny_fit, tmp_path, strategy="fsdp")
    flags = [*MIXED, *STRATEGIES["fsdp"]]
    whole = ["--trainer.strategy.init_args.save_distributed_checkpoint", "false"]
    expected = fit("full", "1_align", *flags, "--model.stage.frozen_dtype", "full")
    assert_same(expected, fit("whole", "1_align", *flags, *whole))
    for name in ("full", "whole"):
        first = checkpoints_in(tmp_path / name)[0]
        assert first.is_file() == (name == "whole")
        assert_same(expected, fit(f"from-{name}", "1_align", *flags, "--ckpt_path", str(first)))


def test_a_checkpoint_is_validated_and_predicted_in_the_compute_type(tmp_path: Path) -> None:
    tiny_fit(tmp_path, "run", "1_align", *MIXED, *STRATEGIES["single"])
    found = []
    for key in ("full", "compute"):
        words = ["validate", "--config", "run/config.yaml", "--ckpt_path", "run", "--trainer.limit_val_batches", "1.0"]
        result = lit_vlm(tmp_path, *words, "--model.stage.frozen_dtype", key)
        found.append([line for line in result.stdout.splitlines() if "val/loss" in line])
    assert found[0]
    assert found[0] == found[1]


if __name__ == "__main__":
    _one_rank(int(sys.argv[1]), sys.argv[2])
