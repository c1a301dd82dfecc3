"""What cannot be sharded says so; that members can is one of the contract tests."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import timedelta

import lightning.pytorch as L
import pytest
import torch
import torch.distributed as dist
from torch import nn

from lit_vlm.commands.lightning_cli import ParsedCLI
from lit_vlm.commands.recipe import find_recipe
from lit_vlm.core.batch import Images, VisualTokens
from lit_vlm.core.part import load_state, meta_parameters
from lit_vlm.encoders import HFEncoder
from lit_vlm.model.build import build
from lit_vlm.projectors import Projector
from lit_vlm.training.sharding import FSDP2, OncePerForward, shard
from tests.members import Tangled
from tests.tiny import CLIP, tiny_slots


class Stack(HFEncoder):
    """A vision transformer whose forward pass is one list of blocks."""

    def __init__(self, order: list[int]) -> None:
        super().__init__(config=CLIP)
        self.order = order

    def forward(self, images: Images) -> VisualTokens:
        for index in self.order:
            self.blocks()[index](torch.zeros(1, 4, 32), None)
        return VisualTokens(torch.zeros(0, 32), ())


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ([0, 1, 0], "encoder Stack: block 0 runs again in one forward pass (2 blocks)"),
        ([1, 0], "encoder Stack: block 1 runs before block 0 in one forward pass"),
        ([0], "encoder Stack: block 1 does not run in one forward pass"),
    ],
)
def test_blocks_run_once_and_in_order(order: list[int], message: str) -> None:
    part = Stack(order)
    OncePerForward("encoder Stack", part, part.blocks())
    with pytest.raises(ValueError, match=re.escape(message)):
        part(Images.pack([]))
    part.order = [0, 1]
    for _ in range(2):  # the next passes are counted anew
        part(Images.pack([]))
        part.blocks()[0](torch.zeros(1, 4, 32), None)  # as recomputing does, outside of the part's forward pass


def test_loaded_weights_keep_ties_of_modules_parameters_and_buffers() -> None:
    with meta_parameters():
        part = Tangled(8, 8)
    state = Tangled(8, 8).state_dict()
    load_state(part, state, "projector")
    assert part.again is part.hidden
    assert part.last.weight is part.hidden.weight
    assert part.norm.get_buffer("scale") is part.scale
    assert torch.equal(part.scale, state["scale"])


class Twice(Projector):
    """One module with a parameter under two names."""

    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__(in_width, out_width)
        self.linear = nn.Linear(in_width, out_width)
        self.linear.again = self.linear.weight

    def forward(self, tokens: VisualTokens) -> VisualTokens:
        return VisualTokens(self.linear(tokens.features), tokens.grids)


def test_a_parameter_with_two_names_in_one_module_is_refused() -> None:
    model = build(tiny_slots(projector=Twice))
    with pytest.raises(ValueError, match=r"projector.linear \(Linear\) has a parameter under two names, again is"):
        shard(model, None, None)  # type: ignore[arg-type]


@pytest.fixture
def _one_process() -> Iterator[None]:
    """Takes the process group down again that a test makes."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.usefixtures("_one_process")
@pytest.mark.parametrize("replicas", [1, "nodes"])
def test_the_timeout_reaches_all_process_groups(replicas: int | str) -> None:
    strategy = FSDP2(replicas=replicas, timeout=77)
    L.Trainer(accelerator="cpu", devices=1, strategy=strategy, logger=False, enable_checkpointing=False)
    strategy.connect(L.LightningModule())
    strategy.setup_environment()
    groups = [dist.group.WORLD, *strategy.shard_mesh().get_all_groups()]
    backends = [group._get_backend(torch.device("cpu")) for group in groups if group is not None]
    assert [backend.options._timeout for backend in backends] == [timedelta(seconds=77)] * len(backends)


def test_the_timeout_is_a_flag() -> None:
    files = find_recipe("llava15").configs("1_align", "tiny", "fsdp")
    words = [word for path in files for word in ("--config", str(path))]
    config = ParsedCLI([*words, "--trainer.strategy.timeout", "7200"]).config
    assert config.trainer.strategy.init_args.timeout == 7200
    with pytest.raises(ValueError, match="FSDP2: timeout is a positive number of seconds, not 0: 1800 is half an hour"):
        FSDP2(timeout=0)
