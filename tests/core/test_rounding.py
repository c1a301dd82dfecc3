"""Weight files of a folder, rounded to another type."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from safetensors.torch import load_file

from lit_vlm.core.safetensors import read_folder, round_folder


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"layer.{i}.weight": torch.randn(64, 64, generator=generator) for i in range(4)} | {"ids": torch.arange(9)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shards_are_rounded_and_their_index_says_how_large_they_are(
    state: dict[str, torch.Tensor], dtype: torch.dtype, tmp_path: Path
) -> None:
    save_torch_state_dict(state, tmp_path, max_shard_size=40_000, metadata={"format": "pt"})
    config = {"dtype": "float32", "text_config": {"torch_dtype": "float32", "hidden_size": 64}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    round_folder(tmp_path, dtype)
    found = read_folder(str(tmp_path))
    assert found.keys() == state.keys()
    for key, value in state.items():
        torch.testing.assert_close(found[key], value.to(dtype) if value.is_floating_point() else value, rtol=0, atol=0)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in found.values())
    with safe_open(tmp_path / next(iter(index["weight_map"].values())), "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    name = str(dtype).removeprefix("torch.")
    config = {"dtype": name, "text_config": {"torch_dtype": name, "hidden_size": 64}}
    assert json.loads((tmp_path / "config.json").read_text()) == config
    assert not list(tmp_path.glob("*.rounded"))


def test_values_that_the_type_cannot_hold_are_refused_by_name(tmp_path: Path) -> None:
    save_torch_state_dict({"large": torch.tensor([1.0, 1e6])}, tmp_path)
    with pytest.raises(ValueError, match=r"large has values beyond the range of torch.float16: up to 1e\+06"):
        round_folder(tmp_path, torch.float16)
    assert load_file(tmp_path / "model.safetensors")["large"].dtype == torch.float32
