"""Training on quantised weights on one process, on two, and sharded; what it leaves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lit_vlm.core.lora import is_adapter
from lit_vlm.core.quantised import round_to
from lit_vlm.evaluation.asker import load_run
from tests.runs import lit_vlm, tiny_fit

pytest.importorskip("torchao")
QUICK = ["--trainer.limit_val_batches", "0", "--trainer.logger", "false", "--data.batch_size", "4"]
QLORA = ["--model.lora", "{encoder: {rank: 2}, decoder: {rank: 2}}", "--model.stage.start_from", "align",
         "--model.quantize", "{encoder: int8, decoder: nf4}", "--model.stage.warmup_ratio", "0",
         "--model.stage.train", "{encoder: 1e-2, projector: 1e-2, decoder: 1e-2}"]  # fmt: skip
TWO = ["--trainer.devices", "2", "--data.batch_size", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs `align` and `tuned`, of which the second trained on quantised weights."""
    folder = tmp_path_factory.mktemp("runs")
    tiny_fit(folder, "align", "1_align", *QUICK)
    tiny_fit(folder, "tuned", "2_sft", *QUICK, *QLORA)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_train_as_one(strategy: str, folder: Path) -> None:
    state = tiny_fit(folder, strategy, "2_sft", *QUICK, *QLORA, *TWO, strategy=strategy, fresh=strategy == "ddp")
    from lit_vlm.checkpoints import read_state

    expected = read_state(folder / "tuned")
    assert state.keys() == expected.keys()
    assert all(is_adapter(name) or name.startswith("projector.") for name in state)
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, atol=2e-3, rtol=2e-3)


def test_it_is_asked_with_the_weights_that_it_was_trained_on(folder: Path) -> None:
    model, before = load_run(folder / "tuned").module.vlm, load_run(folder / "align").module.vlm
    round_to(before.decoder, "nf4", "decoder")
    own, rounded = model.decoder.state_dict(), before.decoder.state_dict()
    assert all(torch.equal(own[key if key in own else key.replace(".weight", ".base_layer.weight")], value)
               for key, value in rounded.items())  # fmt: skip


def test_weights_that_cannot_be_read_again_are_refused(folder: Path) -> None:
    flags = [
        *QUICK,
        "--model.quantize.decoder",
        "nf4",
        "--model.lora.decoder.rank",
        "2",
        "--trainer.accelerator",
        "cpu",
    ]
    words = ["--config", str(folder / "align" / "config.yaml"), "--trainer.default_root_dir", "refused"]
    done = lit_vlm(folder, "fit", *words, *flags, check=False)
    assert "model.quantize.decoder: checkpoints leave quantised weights out, and these could not be read" in done.stderr
