"""Features of patches as colours, and what heads of whole models predict."""

from __future__ import annotations

import json

import pytest
import torch

from lit_vlm.core.batch import Grid, VisualTokens
from lit_vlm.core.sampling import Sampling
from lit_vlm.data.records import Image, Message, Record, Text
from lit_vlm.evaluation.asker import Asker
from lit_vlm.evaluation.predicted import draw_features
from lit_vlm.serving.requests import Asked
from lit_vlm.serving.worker import _at_once
from lit_vlm.teachers import KnownMap
from lit_vlm.worlds import Scenes
from lit_vlm.worlds.scenes.maps import SHAPE_SHARES
from tests.exports import read


def drawn(features: torch.Tensor, *grids: Grid) -> list[torch.Tensor]:
    return draw_features(VisualTokens(features, grids))


def test_patches_that_are_alike_have_one_colour() -> None:
    torch.manual_seed(0)
    kinds = torch.tensor([0, 0, 1, 2, 1, 2])
    (picture,) = drawn(torch.randn(3, 8)[kinds], Grid(2, 3))
    assert picture.shape == (3, 2, 3)
    assert picture.dtype == torch.uint8
    colours = [tuple(pixel.tolist()) for pixel in picture.flatten(1).T]
    assert colours[0] == colours[1]
    assert colours[2] == colours[4]
    assert len(set(colours)) == 3
    assert picture[0].min() == 0
    assert picture[0].max() == 255
    assert picture[2].max() == 0  # two directions tell three kinds apart


def test_pictures_have_their_own_colours_and_do_not_change() -> None:
    torch.manual_seed(0)
    features = torch.randn(10, 8)
    first, second = drawn(features, Grid(2, 3), Grid(2, 2))
    assert torch.equal(second, drawn(features[6:] * 5 + 1, Grid(2, 2))[0])  # neither place nor size of features counts
    assert torch.equal(first, drawn(features[:6], Grid(2, 3))[0])
    assert drawn(torch.ones(4, 8), Grid(2, 2))[0].max() == 0
    assert drawn(torch.arange(4.0)[:, None], Grid(2, 2))[0][0].flatten().tolist() == [0, 85, 170, 255]


def test_known_maps_have_colours_that_say_something() -> None:
    depth = torch.zeros(3, 16)
    depth[0, 0] = depth[2, 15] = 1.0
    depth[1, [0, 15]] = torch.tensor([0.5, 0.5])
    several = VisualTokens(torch.randn(3, 64), (Grid(1, 3),))  # cells side by side: no depths of one place
    assert torch.equal(draw_features(several, KnownMap("depth"))[0], draw_features(several)[0])
    assert draw_features(VisualTokens(torch.full((3, 8), torch.nan), (Grid(1, 3),)))[0].max() == 0
    (picture,) = draw_features(VisualTokens(depth, (Grid(1, 3),)), KnownMap("depth"))
    assert picture[0].tolist() == picture[2].tolist() == [[255, 128, 0]]
    shapes = torch.eye(15)[: SHAPE_SHARES.stop]
    (picture,) = draw_features(VisualTokens(shapes, (Grid(1, len(shapes)),)), KnownMap("segmentation"))
    assert len({tuple(pixel.tolist()) for pixel in picture[:, 0].T}) == SHAPE_SHARES.stop


def test_the_page_is_told_what_heads_predict() -> None:
    module, config, written = read("ola_vlm", "1_pretrain")
    asker = Asker(module, written)
    record = Scenes("captions", 1).record(0)
    picture = next(part for part in record.messages[0].content if isinstance(part, Image))
    asked = Asked("run", (Message("user", (picture, Text("What is this?"), picture)),), Sampling(8), seen=True)
    (sample,) = asker.encode([Record("0", "asked", asked.messages)])
    reply = _at_once(asker, asked, sample)
    assert reply is not None
    for seen in json.loads(reply.text)["pictures"]:
        layers = {(one["head"], one["read"]) for one in seen["predicted"]}
        heads = config["model"]["heads"]
        assert {head for head, _ in layers} <= set(heads)
        assert ("depth", f"layer {heads['depth']['init_args']['layers'][0]}") in layers
        assert all(one["png"].startswith("data:image/png;base64,") for one in seen["predicted"])
        assert all(one["loss"] for one in seen["predicted"])
    assert reply.prompt_tokens == len(sample)


def test_heads_that_fail_leave_the_prompt_to_be_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    module, _, written = read("ola_vlm", "1_pretrain")
    asker = Asker(module, written)
    monkeypatch.setattr(type(module.vlm), "predictions", lambda *_: 1 / 0)
    asked = Asked("run", (Message("user", (Text("What is this?"),)),), Sampling(8), seen=True)
    (sample,) = asker.encode([Record("0", "asked", asked.messages)])
    reply = _at_once(asker, asked, sample)
    assert reply is not None
    assert json.loads(reply.text)["not_predicted"] == "ZeroDivisionError: division by zero"
    assert "What is this?" in json.dumps(json.loads(reply.text)["prompt"])
