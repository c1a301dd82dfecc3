from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import flop_registry

from lit_vlm.core.flops import operations_of

KERNELS = ("flash", "efficient", "cudnn")


def _attention(kernel: str, backward: bool, key_heads: int = 4) -> float:
    query, gradient = torch.zeros(2, 4, 10, 8), torch.zeros(2, 4, 10, 6)
    key, value = torch.zeros(2, key_heads, 7, 8), torch.zeros(2, key_heads, 7, 6)
    packet = getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}_attention{'_backward' if backward else ''}")
    arguments = (*([gradient] if backward else []), query, key, value)
    found = operations_of(packet.default, arguments, {}, gradient)
    if key_heads == 4:
        assert found == flop_registry[packet](*arguments, out_val=gradient)
    return found


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("kernel", KERNELS)
def test_fused_attention_counts_all_heads_of_the_queries(kernel: str, backward: bool) -> None:
    assert _attention(kernel, backward, key_heads=2) == _attention(kernel, backward)


def test_other_products_are_those_of_pytorchs_counter_and_the_rest_is_nothing() -> None:
    left, right = torch.zeros(3, 4), torch.zeros(4, 5)
    assert operations_of(torch.ops.aten.mm.default, (left, right), {}, left @ right) == 2 * 3 * 4 * 5
    assert operations_of(torch.ops.aten.add.Tensor, (left, left), {}, left) == 0
