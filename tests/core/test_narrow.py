"""Which weights are stored in a narrower type, and that no value is lost unnoticed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lit_vlm.core.narrow import narrow_operands, narrowest, operands


class Scaled(nn.Linear):
    """A linear layer that does more with its weight than multiply."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight / self.weight.norm(), self.bias)


class Net(nn.Module):
    """One layer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(8, 4)
        self.conv = nn.Conv1d(4, 4, 1)
        self.norm = nn.LayerNorm(4)
        self.linear = nn.Linear(4, 4)
        self.trained = nn.Linear(4, 4)
        self.scaled = Scaled(4, 4)
        self.tied = nn.Linear(4, 8, bias=False)
        self.tied.weight = self.words.weight
        self.position = nn.Parameter(torch.zeros(4))
        self.requires_grad_(False)
        self.trained.requires_grad_(True)


def test_only_what_autocast_rounds_is_narrow() -> None:
    net = Net()
    narrow = {"conv.weight", "conv.bias", "linear.weight", "linear.bias"}
    assert {name for name, _ in operands(net)} == narrow
    narrow_operands(net, torch.bfloat16, "the net")
    assert {name for name, p in net.named_parameters() if p.dtype == torch.bfloat16} == narrow
    assert net.tied.weight is net.words.weight


@pytest.mark.parametrize("own", [torch.bfloat16, torch.float16, torch.float32])
def test_values_are_kept_in_the_narrowest_type_that_has_them(own: torch.dtype) -> None:
    values = torch.randn(100, 100, generator=torch.Generator().manual_seed(0)).to(own).float()
    found = narrowest(values, torch.bfloat16)
    assert found.dtype == own
    assert torch.equal(found.float(), values)
    # The last value counts, too, not only those that are looked at first.
    values[-1, -1] = 1 + 2**-20
    assert narrowest(values, torch.bfloat16).dtype == torch.float32


def test_weights_that_fp16_turns_into_infinity_are_refused() -> None:
    net = Net()
    net.linear.weight.data[0, 0] = -7e4
    with pytest.raises(ValueError, match=r"the net.linear.weight has values up to 7e\+04, and trainer.precision 16-mi"):
        narrow_operands(net, torch.float16, "the net")
    narrow_operands(net, torch.bfloat16, "the net")
