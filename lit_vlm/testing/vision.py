"""Contract tests of encoders and projectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from lit_vlm.core.batch import Grid, Images, VisualTokens
from lit_vlm.encoders import Encoder
from lit_vlm.projectors import Projector
from lit_vlm.testing.rules import all_train, blocks_run_once, broken, built, near, numbers, pickled, same_when_loaded
from lit_vlm.testing.tiny import Size, random_images


def check_encoder(
    factory: Callable[[], Encoder], sizes: Sequence[Size] | None = None, unread: Sequence[str] = ()
) -> None:
    """Check the rules of an encoder.

    Args:
        factory: makes a tiny encoder with random weights.
        sizes: (height, width) of pictures that it takes; default: several where it takes any size, and its square where
            it takes one.
        unread: endings of names of parameters that get no gradient, as published classes have some.

    Raises:
        AssertionError: naming the rule that the encoder breaks.
    """
    encoder = built(factory, Encoder)
    taken = list(sizes or _sizes(encoder))
    images = random_images(taken)
    grids = tuple(pickled(encoder, "patch_grid", encoder.patch_grid)(*size) for size in taken)
    with torch.no_grad():
        tokens = encoder(images)
    _check_tokens(encoder, tokens, grids, encoder.width, "patch_grid promises")
    for index, features in enumerate(tokens.features.split([grid.num_tokens for grid in grids])):
        with torch.no_grad():
            alone = encoder(_one_of(images, index)).features
        near(encoder, features, alone, f"picture {index} is another in company", "Pictures do not see each other")
    dummy = encoder.dummy_images()
    _check_tokens(encoder, encoder(dummy), tuple(encoder.patch_grid(*size) for size in dummy.sizes), encoder.width,
                  "patch_grid promises of its dummy picture")  # fmt: skip
    same_when_loaded(encoder, factory, lambda part: part(images).features)
    all_train(encoder.train(), encoder(images).features.float().square().sum(), "from pictures", unread)
    blocks_run_once(encoder, lambda: encoder(images), "encoder")


def check_projector(
    factory: Callable[[int, int], Projector],
    in_width: int = 32,
    out_width: int = 48,
    grids: Sequence[Grid] = (Grid(4, 4), Grid(2, 6)),
) -> None:
    """Check the rules of a projector.

    Args:
        factory: makes the projector from the widths of encoder and decoder.
        in_width: width of the encoder's tokens.
        out_width: width of the decoder's tokens.
        grids: grids of tokens that it takes, one per image.

    Raises:
        AssertionError: naming the rule that the projector breaks.
    """
    projector = built(lambda: factory(in_width, out_width), Projector)
    generator = torch.Generator().manual_seed(0)
    lengths = [grid.num_tokens for grid in grids]
    features = torch.randn(sum(lengths), in_width, generator=generator)
    grid_map = pickled(projector, "grid_map", projector.grid_map)
    promised = tuple(grid_map(grid) for grid in grids)
    given = features.clone().requires_grad_()
    tokens = projector(VisualTokens(given, tuple(grids)))
    _check_tokens(projector, tokens, promised, out_width, "grid_map promises")
    parts = tokens.features.split([grid.num_tokens for grid in promised])
    for one, grid, found in zip(features.split(lengths), grids, parts, strict=True):
        alone = projector(VisualTokens(one, (grid,))).features
        near(projector, found, alone, f"an image of {grid} is another in company", "Images do not see each other")
    same_when_loaded(
        projector,
        lambda: factory(in_width, out_width),
        lambda part: part(VisualTokens(features, tuple(grids))).features,
    )
    tokens.features.float().square().sum().backward()
    if given.grad is None or not given.grad.any(1).all():
        broken(projector, "some visual tokens have no gradient", "An encoder learns through all that it gives")
    whole = VisualTokens(features, tuple(grids))
    if any(True for _ in projector.parameters()):
        all_train(projector, projector(whole).features.float().square().sum(), "from images")
    blocks_run_once(projector, lambda: projector(whole), "projector")


def _one_of(images: Images, index: int) -> Images:
    parts = images.pixels.split([3 * height * width for height, width in images.sizes])
    return Images(parts[index], (images.sizes[index],))


def _sizes(encoder: Encoder) -> list[Size]:
    side, step = encoder.pixels.size, encoder.pixels.multiple
    if side is not None:
        return [(side, side)] * 2
    return [(2 * step, 3 * step), (4 * step, 2 * step), (2 * step, 3 * step), (step, step)]


def _check_tokens(
    part: Encoder | Projector, tokens: VisualTokens, grids: tuple[Grid, ...], width: int, promise: str
) -> None:
    if tokens.grids != grids:
        broken(part, f"gives {numbers(tokens.grids)} where {promise} {numbers(grids)}",
               "The collator makes room for what the grid says, before any pixel is seen")  # fmt: skip
    if tuple(tokens.features.shape) != (sum(grid.num_tokens for grid in grids), width):
        broken(part, f"features are {tuple(tokens.features.shape)}, width is {width}", "Features are `[t, width]`")
    if not tokens.features.isfinite().all():
        broken(part, "some features are not finite", "Features are numbers")
