"""Projectors against reference numbers, and the promises that every projector makes."""

from __future__ import annotations

import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lit_vlm.projectors as slot
from lit_vlm.core.batch import Grid, VisualTokens
from lit_vlm.core.part import load_state
from lit_vlm.projectors import (
    MLP,
    Downsample,
    Downsample3x3,
    Identity,
    Linear,
    PerEncoder,
    Projector,
    Resampler,
    Transformer,
)
from lit_vlm.projectors.downsample import Fold, TokenOrder, fold

FIXTURE = Path(__file__).parents[1] / "fixtures" / "vila_projectors.pt"
REFERENCE: dict[str, Any] = torch.load(FIXTURE, weights_only=True)
SIDES = (4, 5, 7)

PROJECTORS = [
    cls
    for cls in (getattr(slot, name) for name in slot.__all__)
    if isinstance(cls, type) and issubclass(cls, Projector) and not inspect.isabstract(cls)
]
WIDTH = 6
MIXED = (Grid(4, 4), Grid(5, 5), Grid(3, 7), Grid(1, 1), Grid(4, 4), Grid(6, 2))


def build(cls: type[Projector]) -> Projector:
    torch.manual_seed(0)
    if cls is PerEncoder:
        return PerEncoder(WIDTH, 10, widths=[WIDTH, 4, WIDTH])
    return cls(WIDTH, WIDTH if cls is Identity else 10)


def grids_for(cls: type[Projector], *grids: Grid) -> tuple[Grid, ...]:
    """With two tokens of each further encoder behind the patches, where a projector is made for them."""
    return tuple(grid._replace(suffix=4) for grid in grids) if cls is PerEncoder else grids


def tokens_of(*grids: Grid) -> VisualTokens:
    generator = torch.Generator().manual_seed(len(grids))
    return VisualTokens(torch.randn(sum(grid.num_tokens for grid in grids), WIDTH, generator=generator), grids)


def shifted(state: dict[str, Tensor], by: int) -> dict[str, Tensor]:
    """`layers.3.weight` → `layers.2.weight` for by = 1."""
    renamed = {}
    for key, value in state.items():
        _, index, rest = key.split(".")
        renamed[f"layers.{int(index) - by}.{rest}"] = value
    return renamed


def check(projector: Projector, inputs: Tensor, expected: Tensor, rows: int) -> None:
    grids = (Grid(rows, rows),) * inputs.shape[0]
    with torch.no_grad():
        result = projector(VisualTokens(inputs.flatten(0, 1), grids))
    torch.testing.assert_close(result.features, expected.flatten(0, 1), atol=1e-5, rtol=0)
    assert sum(grid.num_tokens for grid in result.grids) == expected.shape[0] * expected.shape[1]


@pytest.mark.parametrize("side", SIDES)
def test_linear_matches_vila(side: int) -> None:
    case = "projector/v1.5/linear"
    projector = Linear(6, 10)
    state = {key.replace("layers.", "linear."): value for key, value in REFERENCE[f"{case}/state_dict"].items()}
    load_state(projector, state, "projector")
    check(projector, REFERENCE[f"{case}/in{side}"], REFERENCE[f"{case}/out{side}"], side)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("depth", [2, 3])
def test_mlp_matches_vila(depth: int, side: int) -> None:
    case = f"projector/v1.5/mlp{depth}x_gelu"
    projector = MLP(6, 10, depth=depth)
    load_state(projector, REFERENCE[f"{case}/state_dict"], "projector")
    check(projector, REFERENCE[f"{case}/in{side}"], REFERENCE[f"{case}/out{side}"], side)


def test_linear_matches_vila_1_0() -> None:
    case = REFERENCE["projector/v1.0/linear"]
    projector = Linear(6, 10)
    load_state(projector, {f"linear.{key}": value for key, value in case["state_dict"].items()}, "projector")
    check(projector, case["in"], case["out"], 3)


def test_mlp_matches_vila_1_0() -> None:
    case = REFERENCE["projector/v1.0/mlp2x_gelu"]
    projector = MLP(6, 10)
    load_state(projector, {f"layers.{key}": value for key, value in case["state_dict"].items()}, "projector")
    check(projector, case["in"], case["out"], 3)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(
    ("case", "token_order"),
    [("v1.5/mlp_downsample", "col"), ("main/mlp_downsample", "row"), ("main/mlp_downsample_2x2_fix", "row")],
)
def test_downsample_matches_vila(case: str, token_order: TokenOrder, side: int) -> None:
    projector = Downsample(6, 10, token_order=token_order)
    load_state(projector, shifted(REFERENCE[f"projector/{case}/state_dict"], 1), "projector")
    check(projector, REFERENCE[f"projector/{case}/in{side}"], REFERENCE[f"projector/{case}/out{side}"], side)


@pytest.mark.parametrize("side", SIDES)
def test_downsample_3x3_matches_nvila(side: int) -> None:
    case = "projector/main/mlp_downsample_3x3_fix"
    projector = Downsample3x3(6, 10)
    load_state(projector, shifted(REFERENCE[f"{case}/state_dict"], 1), "projector")
    check(projector, REFERENCE[f"{case}/in{side}"], REFERENCE[f"{case}/out{side}"], side)


@pytest.mark.parametrize("batched", [True, False], ids=["one size", "among other sizes"])
@pytest.mark.parametrize("key", sorted(key for key in REFERENCE if key.startswith("order/")))
def test_fold_order_matches_vila(key: str, batched: bool) -> None:
    _, version, block, side = key.split("/")
    rows = int(side.removeprefix("side"))
    ids = torch.arange(1, rows * rows + 1, dtype=torch.float32)[:, None]
    token_order: TokenOrder = "col" if version == "v1.5" else "row"
    step = 3 if "3x3" in block else 2
    expected = REFERENCE[key].float()
    if batched:
        result = fold(VisualTokens(ids, (Grid(rows, rows),)), step, token_order)
    else:
        tokens = VisualTokens(torch.cat([torch.full((6, 1), -7.0), ids]), (Grid(2, 3), Grid(rows, rows)))
        result = fold(tokens, step, token_order)[-len(expected) :]
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("token_order", ["row", "col"])
@pytest.mark.parametrize("grid", [Grid(2, 6), Grid(3, 8), Grid(7, 2), Grid(1, 5)], ids=str)
def test_fold_of_a_grid_that_is_not_square_equals_a_plain_loop(grid: Grid, token_order: TokenOrder) -> None:
    image = torch.arange(1, grid.num_tokens + 1).view(grid.rows, grid.cols)
    rows, cols = -(-grid.rows // 2), -(-grid.cols // 2)
    places = [(r, c) for r in range(rows) for c in range(cols)]
    if token_order == "col":
        places = [(r, c) for c in range(cols) for r in range(rows)]

    def at(r: int, c: int) -> float:
        return float(image[r, c]) if r < grid.rows and c < grid.cols else 0.0

    expected = [[at(2 * r + i, 2 * c + j) for i in (0, 1) for j in (0, 1)] for r, c in places]
    result = fold(VisualTokens(image.reshape(-1, 1).float(), (grid,)), 2, token_order)
    assert result.tolist() == expected
    folded = Fold(2, token_order)(grid)
    assert (folded.rows, folded.cols) == ((cols, rows) if token_order == "col" else (rows, cols))


@pytest.mark.parametrize("cls", PROJECTORS, ids=lambda cls: cls.__name__)
def test_a_mix_of_sizes_equals_one_image_at_a_time(cls: type[Projector]) -> None:
    projector, grids = build(cls), grids_for(cls, *MIXED)
    tokens = tokens_of(*grids)
    with torch.no_grad():
        together = projector(tokens)
        parts = tokens.features.split([grid.num_tokens for grid in grids])
        alone = [projector(VisualTokens(part, (grid,))) for part, grid in zip(parts, grids, strict=True)]
    torch.testing.assert_close(together.features, torch.cat([result.features for result in alone]))
    assert together.grids == tuple(result.grids[0] for result in alone)


def test_a_mix_of_sizes_in_column_order_equals_one_image_at_a_time() -> None:
    torch.manual_seed(0)
    projector, tokens = Downsample(WIDTH, 10, token_order="col"), tokens_of(*MIXED)
    with torch.no_grad():
        parts = tokens.features.split([grid.num_tokens for grid in MIXED])
        alone = [projector(VisualTokens(p, (g,))).features for p, g in zip(parts, MIXED, strict=True)]
        torch.testing.assert_close(projector(tokens).features, torch.cat(alone))


@pytest.mark.parametrize("cls", PROJECTORS, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("grid", [Grid(4, 4), Grid(5, 5), Grid(3, 8), Grid(1, 1), Grid(2, 9)], ids=str)
def test_grid_map_promises_what_forward_returns(cls: type[Projector], grid: Grid) -> None:
    projector, (grid,) = build(cls), grids_for(cls, grid)
    with torch.no_grad():
        result = projector(tokens_of(grid, grid))
    promised = projector.grid_map(grid)
    assert result.grids == (promised, promised)
    assert result.features.shape == (2 * promised.num_tokens, projector.out_width)


@pytest.mark.parametrize("cls", PROJECTORS, ids=lambda cls: cls.__name__)
def test_grid_map_pickles(cls: type[Projector]) -> None:
    grid_map = build(cls).grid_map
    assert pickle.loads(pickle.dumps(grid_map))(Grid(5, 4)) == grid_map(Grid(5, 4))


@pytest.mark.parametrize("cls", [cls for cls in PROJECTORS if cls is not Identity], ids=lambda cls: cls.__name__)
def test_gradients_reach_every_parameter(cls: type[Projector]) -> None:
    projector = build(cls)
    projector(tokens_of(*grids_for(cls, *MIXED))).features.square().sum().backward()
    without = [name for name, p in projector.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without


@pytest.mark.parametrize("cls", PROJECTORS, ids=lambda cls: cls.__name__)
def test_gradients_of_a_mix_reach_every_token(cls: type[Projector]) -> None:
    tokens = tokens_of(*grids_for(cls, *MIXED))
    tokens.features.requires_grad_()
    build(cls)(tokens).features.square().sum().backward()
    assert tokens.features.grad is not None
    assert tokens.features.grad.any(dim=1).all()


def test_identity_returns_the_tokens() -> None:
    tokens = tokens_of(*MIXED)
    assert build(Identity)(tokens) is tokens


def test_identity_refuses_different_widths() -> None:
    with pytest.raises(ValueError, match=r"decoder's width 8, this one gives 6: set model\.encoder\.width 8"):
        Identity(6, 8)


def test_mlp_refuses_depth_zero() -> None:
    with pytest.raises(ValueError, match="depth must be at least 1, not 0"):
        MLP(6, 8, depth=0)


@pytest.mark.parametrize("grid", [Grid(4, 4, prefix=1), Grid(4, 4, row_end=1)], ids=str)
@pytest.mark.parametrize("cls", [Downsample, Downsample3x3], ids=lambda cls: cls.__name__)
def test_folding_refuses_tokens_that_are_not_patches(cls: type[Projector], grid: Grid) -> None:
    with pytest.raises(ValueError, match="takes patches only"):
        build(cls)(tokens_of(grid))


@pytest.mark.parametrize("cls", [Linear, MLP, Resampler], ids=lambda cls: cls.__name__)
def test_other_projectors_take_prefix_and_row_end_tokens(cls: type[Projector]) -> None:
    projector, grid = build(cls), Grid(2, 3, prefix=1, row_end=1)
    result = projector(tokens_of(grid, Grid(4, 4)))
    assert result.grids[0] == projector.grid_map(grid)


def test_resampler_gives_the_same_number_of_tokens_for_any_image() -> None:
    result = Resampler(WIDTH, 10, num_queries=5)(tokens_of(*MIXED))
    assert [grid.num_tokens for grid in result.grids] == [5] * len(MIXED)


def test_state_of_another_projector_is_refused_with_names() -> None:
    with pytest.raises(ValueError, match=r"slot 'projector' \(MLP\).*missing: layers\.4\.bias.*model\.stage\.fresh"):
        load_state(MLP(6, 10, depth=3), MLP(6, 10).state_dict(), "projector")


def test_a_transformer_sees_the_whole_image_and_nothing_else() -> None:
    projector = build(Transformer).eval()
    mixed = tokens_of(Grid(4, 4), Grid(3, 5))
    together = projector(mixed).features
    for part, features, grid in zip(together.split([16, 15]), mixed.features.split([16, 15]), mixed.grids, strict=True):
        torch.testing.assert_close(part, projector(VisualTokens(features, (grid,))).features, atol=1e-5, rtol=1e-4)
    changed = mixed.features.clone()
    changed[15] += 1  # the last token of the first image
    found = projector(VisualTokens(changed, mixed.grids)).features
    assert not torch.allclose(found[0], together[0], atol=1e-4)
    torch.testing.assert_close(found[16:], together[16:])
