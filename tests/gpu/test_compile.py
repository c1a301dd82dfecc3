"""Compiled blocks give the losses and gradients of blocks that are not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lit_vlm.training.compiling import compile_blocks
from tests.gpu.systems import error, errors, needs_values, tiny_system, values


@pytest.mark.parametrize(("recipe", "stage"), [("llava15", "2_sft"), ("ola_vlm", "1_pretrain")])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-3), (torch.bfloat16, 0.03)])
def test_compiled_blocks_give_the_same(
    recipe: str, stage: str, dtype: torch.dtype, bound: float, tmp_path: Path
) -> None:
    needs_values()  # kernels are compiled for a device that is there
    system = tiny_system(recipe, stage, tmp_path)
    expected = values(system, "cuda", dtype)
    compile_blocks(system.model, False)
    found = values(system, "cuda", dtype)
    for name, loss in expected.losses.items():
        assert error(found.losses[name], loss) < bound, name
    assert {n: value for n, value in errors(found.gradients, expected.gradients).items() if value > bound} == {}
