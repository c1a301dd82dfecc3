"""Muon on sharded matrices takes the steps of one process, bit for bit, and goes on from a saved state."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from lit_vlm.training.optim import MuonAdamW
from tests.runs import gathered, run_ranks, tiny_fit

MuonTiny = partial(MuonAdamW, betas=(0.9, 0.98), eps=1e-8)
WORLD, STEPS, CUT = 4, 4, 2
MESHES = {"sharded": (WORLD,), "hybrid": (2, 2), "replicas": (WORLD, 1)}
"""Shapes of meshes: FSDP2 alone, (replicate, shard), and shards that are whole matrices."""
SHAPES = ((16, 8), (8, 16), (7, 12), (2, 5), (1, 6), (30, 4))
"""Of matrices: tall and wide ones, rows that do not divide by the processes, and fewer rows than processes."""


class Matrices(nn.Module):
    """Matrices of many shapes, and a vector."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        matrices = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
        self.matrices = nn.ParameterList(matrices)
        self.bias = nn.Parameter(torch.randn(5, generator=generator))


def optimizer_of(model: Matrices) -> MuonAdamW:
    first, second = list(model.matrices[:2]), list(model.matrices[2:])
    return MuonTiny(
        [
            {"params": first, "lr": 0.02, "weight_decay": 0.1, "muon": True},
            {"params": second, "lr": 0.05, "weight_decay": 0.0, "muon": True},
            {"params": [model.bias], "lr": 0.01, "weight_decay": 0.0, "muon": False},
        ]
    )


def take(model: Matrices, optimizer: MuonAdamW, steps: range) -> None:
    """Steps with gradients that are drawn, whole, from a seed."""
    for step in steps:
        generator = torch.Generator().manual_seed(1 + step)
        for parameter in model.parameters():
            grad = torch.randn(parameter.shape, generator=generator)
            if isinstance(parameter, DTensor):
                parameter.grad = distribute_tensor(grad, parameter.device_mesh, parameter.placements)
            else:
                parameter.grad = grad
        optimizer.step()


def sharded(mesh: DeviceMesh) -> tuple[Matrices, MuonAdamW]:
    model = Matrices()
    fully_shard(model, mesh=mesh)
    return model, optimizer_of(model)


def whole(model: Matrices) -> dict[str, Tensor]:
    return {name: p.detach().full_tensor() for name, p in model.named_parameters() if isinstance(p, DTensor)}


def _one_rank(rank: int, folder: str) -> None:
    """A process of the test below: weights after a straight run, and after one that was saved and resumed."""
    with gathered(folder, rank, WORLD):
        results = {}
        for name, shape in MESHES.items():
            mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
            straight, optimizer = sharded(mesh)
            take(straight, optimizer, range(STEPS))
            model, optimizer = sharded(mesh)
            take(model, optimizer, range(CUT))
            saved = get_optimizer_state_dict(model, optimizer)
            resumed, fresh = sharded(mesh)
            with torch.no_grad():
                for parameter, value in zip(resumed.parameters(), model.parameters(), strict=True):
                    parameter.copy_(value)
            set_optimizer_state_dict(resumed, fresh, saved)
            take(resumed, fresh, range(CUT, STEPS))
            momentum = fresh.state[resumed.matrices[0]]["momentum_buffer"]
            assert isinstance(momentum, DTensor)
            assert momentum.placements == resumed.matrices[0].placements
            results[name] = {"straight": whole(straight), "resumed": whole(resumed)}
        if rank == 0:
            torch.save(results, f"{folder}/results.pt")


if __name__ == "__main__":
    _one_rank(int(sys.argv[1]), sys.argv[2])


def test_sharded_matrices_take_the_steps_of_one_process(tmp_path: Path) -> None:
    run_ranks(tmp_path, "tests.training.test_sharded_muon", str(tmp_path), world=WORLD)
    model = Matrices()
    take(model, optimizer_of(model), range(STEPS))
    expected = {name: p.detach() for name, p in model.named_parameters()}
    results = torch.load(tmp_path / "results.pt", weights_only=True)
    assert results.keys() == MESHES.keys()
    for name, runs in results.items():
        for kind, found in runs.items():
            torch.testing.assert_close(found, expected, rtol=0, atol=0, msg=lambda m, a=name, b=kind: f"{a} {b}: {m}")


@pytest.mark.slow
def test_a_sharded_stage_with_muon_equals_one_process_and_resumes(tmp_path: Path) -> None:
    flags = ["--trainer.logger", "false", "--model.stage.optimizer", "muon", "--trainer.limit_val_batches", "0",
             "--checkpoint.every_n_steps", "2", "--checkpoint.keep", "-1"]  # fmt: skip
    two = [*flags, "--data.batch_size", "1", "--trainer.devices", "2"]
    one = tiny_fit(tmp_path, "one", "2_sft", *flags, "--data.batch_size", "2")
    found = tiny_fit(tmp_path, "two", "2_sft", *two, strategy="fsdp")
    middle = str(tmp_path / "two" / "checkpoints" / "step=00000002.ckpt")
    resumed = tiny_fit(tmp_path, "resumed", "2_sft", *two, "--ckpt_path", middle, strategy="fsdp")
    for name, value in one.items():
        assert torch.equal(resumed[name], found[name]), name
        torch.testing.assert_close(found[name], value, atol=2e-5, rtol=1e-3, msg=name)
