"""Contract test of sharding: one process against two under FSDP2, one of which has no picture."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import ProcessException, spawn

from lit_vlm.core.batch import Batch
from lit_vlm.data.sample.collate import collate
from lit_vlm.decoders import AbsentDecoder
from lit_vlm.model.build import build, build_on_meta
from lit_vlm.model.vlm import VLM
from lit_vlm.testing.rules import PAGE
from lit_vlm.testing.tiny import Size, samples_for, tiny_slots
from lit_vlm.training.sharding import shard
from lit_vlm.training.stage import Stage
from lit_vlm.training.step_flops import StepFlops

Results = dict[str, dict[str, float]]


@dataclass
class Case:
    """A tiny model and its stage. Factories must pickle: classes, functions of a module, `functools.partial` of them.

    Attributes:
        slots: factories that replace those of a tiny LLaVA (`tiny_slots`).
        sizes: (height, width) in pixels of the pictures, which only one process gets.
        losses: weights of losses, as in `Stage`.
        leave_out: whether the stage does without the decoder.
        only: groups of parameters that train, as in `Stage`.
    """

    slots: dict[str, Any] = field(default_factory=dict)
    sizes: Sequence[Size] = ((28, 28), (28, 28))
    losses: Mapping[str, float] = field(default_factory=lambda: {"next_token": 1.0})
    leave_out: bool = False
    only: dict[str, str | None] = field(default_factory=dict)


def check_sharded(cases: Mapping[str, Case], tolerance: float = 1e-4) -> None:
    """Check that two processes under FSDP2, one of them without pictures, give the losses and gradients of one.

    All cases share one start of two processes, as a start takes longer than a case.

    Args:
        cases: tiny models by name.
        tolerance: relative difference of a loss or gradient, at most.

    Raises:
        AssertionError: naming the cases and the values that differ, or the case in which a part raised a ValueError.
    """
    refused: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            spawn(_compare, (dict(cases), folder), nprocs=2)
        except ProcessException:
            # The process with the mistake ends, and then the other one, by an error of the connection.
            refused = [file.read_text(encoding="utf-8") for file in sorted(folder.glob("refused-*"))]
            if not refused:
                raise
        results: Results = torch.load(folder / "results.pt") if (folder / "results.pt").exists() else {}
    wrong = {
        name: {key: value for key, value in found.items() if not value <= tolerance}
        for name, found in results.items()
        if not found or any(not value <= tolerance for value in found.values())
    }
    assert not wrong, f"two processes differ from one, by the share of: {wrong}. 9.0: only one of them has it ({PAGE})"
    assert not refused, f"{len(results)} cases are alike; {refused[0]} ({PAGE})"
    assert results.keys() == cases.keys(), "a case was not compared"


def _compare(rank: int, cases: Mapping[str, Case], folder: Path) -> None:
    """Run all cases in one of two processes; the first writes the differences to `results.pt`."""
    torch.set_num_threads(1)
    expected = {name: whole(case) for name, case in cases.items()} if rank == 0 else {}
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    results: Results = {}
    for name, case in cases.items():
        try:
            losses, grads = parted(case)
        except ValueError as error:
            (folder / f"refused-{rank}").write_text(f"{name}: {error}", encoding="utf-8")
            raise
        if rank == 0:
            near = [difference(*pair) for pair in zip(expected[name], (losses, grads), strict=True)]
            results[name] = near[0] | near[1]
            torch.save(results, folder / "results.pt")
    dist.barrier()
    dist.destroy_process_group()


def ready(model: VLM, case: Case) -> VLM:
    """The model of a case as a stage trains it: frozen, in train mode, and maybe without its decoder."""
    if case.leave_out:
        model.decoder = AbsentDecoder(model.decoder)
    rates = {name: 1e-3 for name, parts in model.slots().items() if any(list(part.parameters()) for part in parts)}
    Stage(train=dict(rates), only=case.only, losses=dict(case.losses)).freeze(model, [])
    return model.train()


def _step(model: VLM, batch: Batch, case: Case, scale: int = 1) -> dict[str, Tensor]:
    """Run forward and backward; returns the losses."""
    sums = model(batch, case.losses)
    total: Tensor = sum((case.losses[name] * value for name, value in sums.items()), torch.zeros(()))
    (scale * total).backward()
    return {name: value.detach() for name, value in sums.items()}


def whole(case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses, model FLOPs and gradients of one process."""
    slots = tiny_slots(**case.slots)
    model = ready(build(slots), case)
    seen, text = samples_for(model, case.sizes)
    batch = collate([*seen, *text])
    losses = _step(model, batch, case) | {"flops": torch.tensor(StepFlops(model, slots, case.losses)(batch))}
    return losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def parted(case: Case, prepare: Callable[[VLM], Any] | None = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses, model FLOPs and gradients of two processes, of which only the second has pictures.

    Args:
        case: the tiny model.
        prepare: called with the sharded model before its step.
    """
    slots, first = tiny_slots(**case.slots), dist.get_rank() == 0
    torch.manual_seed(dist.get_rank())  # numbers that each process draws must not matter
    model = ready(build(slots) if first else build_on_meta(slots), case)
    shard(model, init_device_mesh("cpu", (2,)), None)
    model = ready(model, Case(losses=case.losses, only=case.only))
    if prepare is not None:
        prepare(model)
    seen, text = samples_for(model, case.sizes)
    batch = collate(text if first else seen)
    losses = _step(model, batch, case, scale=2)  # as gradients are averaged over processes
    losses["flops"] = torch.tensor(StepFlops(model, slots, case.losses)(batch))
    for name in sorted(losses):
        dist.all_reduce(losses[name])
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return losses, {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in grads.items()}


def difference(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> dict[str, float]:
    """Relative difference of two tensors of each name; 9.0 where only one side has the name.

    The norm of a tensor, by which its difference is divided, counts as 1e-4 of the largest norm at least.
    """
    least = 1e-4 * max(float(value.norm()) for value in one.values())
    far = {
        name: float((two[name] - one[name]).norm() / max(least, float(one[name].norm())))
        for name in one.keys() & two.keys()
    }
    return far | dict.fromkeys(one.keys() ^ two.keys(), 9.0)
