"""QwenMerger behind QwenEncoder against whole vision towers of transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lit_vlm.core.batch import Grid, Images
from lit_vlm.core.part import load_state
from lit_vlm.projectors import QwenMerger
from lit_vlm.testing import check_projector
from tests.encoders.test_qwen import CONFIGS, SIZES, loaded, pictures, processed, saved


@pytest.mark.parametrize("model_type", CONFIGS)
def test_encoder_and_merger_are_the_published_tower(model_type: str, tmp_path: Path) -> None:
    tower = saved(model_type, tmp_path)
    merger = QwenMerger(32, 16, str(tmp_path)).eval()
    load_state(merger, merger.pretrained_state() or {}, "projector")
    shown = pictures(SIZES)
    with torch.no_grad():
        result = merger(loaded(tmp_path)(Images.pack(shown)))
    assert result.grids == tuple(Grid(height // 8, width // 8) for height, width in SIZES)
    parts = result.features.split([grid.num_tokens for grid in result.grids])
    for picture, found in zip(shown, parts, strict=True):
        given = processed(model_type, picture)
        with torch.no_grad():
            expected = tower(given["pixel_values"], given["image_grid_thw"]).pooler_output
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    alone = QwenMerger(32, 16, **merger.standalone({"name": str(tmp_path)}))
    alone.load_state_dict(merger.state_dict())


@pytest.mark.parametrize("model_type", CONFIGS)
def test_it_keeps_the_contract(model_type: str) -> None:
    check_projector(lambda width, out: QwenMerger(width, out, model_type=model_type))


def test_other_widths_than_the_published_ones_are_refused(tmp_path: Path) -> None:
    saved("qwen2_5_vl_vision", tmp_path)
    for widths in ((64, 16), (32, 48)):
        with pytest.raises(ValueError, match=rf"makes 16 features of 32, .* encoder gives {widths[0]} and the"):
            QwenMerger(*widths, str(tmp_path))


def test_another_kind_of_model_is_refused() -> None:
    with pytest.raises(ValueError, match="QwenMerger: model_type 'clip' is none of qwen2_5_vl_vision, qwen3_vl_vision"):
        QwenMerger(32, 16, model_type="clip")
