"""Exact maps as targets: what they say, and how they reach a head."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from lit_vlm.core.batch import Grid
from lit_vlm.data import Resize, VicunaV1
from lit_vlm.data.records import RecordError
from lit_vlm.data.sample.collate import make_rows
from lit_vlm.data.sample.encode import SampleEncoder
from lit_vlm.data.sample.spec import InputSpec
from lit_vlm.heads import EmbeddingDistillation
from lit_vlm.model.build import build
from lit_vlm.teachers import KnownMap
from lit_vlm.worlds import Scenes
from lit_vlm.worlds.scenes.maps import DEPTHS, FARTHEST, NEAREST, WIDTHS
from tests.encoders.test_ensemble import pictures
from tests.tiny import tiny_slots

CELLS = 6


def test_cells_hold_depth_and_what_stands_there() -> None:
    source = Scenes("captions", 8, maps=CELLS)
    for index in range(len(source)):
        (image,) = source.record(index).images
        (rendering,) = source.maps(index)
        assert image.maps is not None
        depth, seg = image.maps["depth"], image.maps["segmentation"]
        assert depth.shape == (CELLS, CELLS, WIDTHS["depth"])
        assert seg.shape == (CELLS, CELLS, WIDTHS["segmentation"])
        side = 96 // CELLS
        edges = np.geomspace(NEAREST, FARTHEST, DEPTHS + 1)[1:-1]
        for row, col in ((0, 0), (3, 2), (5, 5)):
            cell = rendering.depth[row * side : (row + 1) * side, col * side : (col + 1) * side]
            counts = np.bincount(np.digitize(cell.flatten(), edges), minlength=DEPTHS)
            np.testing.assert_allclose(depth[row, col], counts / side**2, atol=0.005)
            part = rendering.segmentation[row * side : (row + 1) * side, col * side : (col + 1) * side]
            assert seg[row, col, 0] == pytest.approx((part == 0).mean(), abs=1e-6)
        np.testing.assert_allclose(seg[..., :5].sum(-1), 1, rtol=1e-5)
        np.testing.assert_allclose(seg[..., 0] + seg[..., 5:13].sum(-1), 1, rtol=1e-5)


def test_maps_change_nothing_else() -> None:
    plain, with_maps = Scenes("questions", 4), Scenes("questions", 4, maps=CELLS)
    assert plain.fingerprint() == with_maps.fingerprint()
    assert [plain.record(i) for i in range(4)] == [with_maps.record(i) for i in range(4)]


@pytest.mark.parametrize("maps", [0, 5])
def test_pictures_must_divide_into_cells(maps: int) -> None:
    with pytest.raises(ValueError, match=f"maps is {maps}; pictures of 96 pixels must divide"):
        Scenes("captions", 4, maps=maps)


def test_a_head_reads_the_map_that_came_with_the_picture() -> None:
    head = partial(EmbeddingDistillation, teacher=partial(KnownMap, "depth"), layers=[1], num_targets=36, queries="own")
    model = build(tiny_slots(heads={"depth": head}))
    encoder = model.encoder
    spec = InputSpec(
        model.decoder.tokenizer, encoder.pixels, encoder.patch_grid, model.grid_map, known={"depth": "depth"}
    )
    encode = SampleEncoder(spec, VicunaV1(), Resize(), 512)
    source = Scenes("captions", 3, maps=CELLS)
    records = [source.record(index) for index in range(3)]
    batch = make_rows([[encode(record, source.image_folder)] for record in records], prepared=["depth"])
    given = batch.prepared["depth"]
    assert given.grids == (Grid(CELLS, CELLS),) * 3
    maps = records[1].images[0].maps
    assert maps is not None
    torch.testing.assert_close(given.features[36:72], torch.from_numpy(maps["depth"]).view(36, -1))
    assert model(batch, {"depth": 1.0})["depth"] > 0
    bare = Scenes("captions", 1)
    with pytest.raises(RecordError, match="no_map: the picture carries no map 'depth'"):
        encode(bare.record(0), bare.image_folder)
    asked = SampleEncoder(spec.without_teachers(), VicunaV1(), Resize(), 512, prompt=True)
    assert not asked(bare.record(0), bare.image_folder).features  # a question needs no map


def test_it_computes_nothing_from_pixels() -> None:
    with pytest.raises(ValueError, match="computes nothing from pixels"):
        KnownMap("depth")(pictures())
