"""Pictures of scenes, with exact depth and segmentation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lit_vlm.worlds.scenes import surfaces
from lit_vlm.worlds.scenes.surfaces import Floats, Rays
from lit_vlm.worlds.scenes.world import FAR, Colour, Scene, Thing, Vector

MIN_SIZE = 32
"""Pixels; below it small things would vanish."""

RGB: dict[Colour, Vector] = {
    "red": (222, 48, 44),
    "green": (52, 168, 62),
    "blue": (42, 84, 222),
    "yellow": (250, 222, 48),
    "purple": (152, 60, 190),
    "cyan": (60, 208, 216),
    "white": (252, 252, 250),
    "black": (52, 52, 56),
}
AMBIENT = 0.42
"""Brightness of a surface that the light does not reach; one that faces it has 1."""
TILE = 1.0
"""Metres; side of the squares on the ground."""
TILE_CONTRAST = 0.16
SHADOW = 0.45
"""Share of the light that is missing in the middle of a shadow."""


@dataclass(frozen=True)
class Rendering:
    """A picture with its ground truth.

    Attributes:
        image: uint8 `[size, size, 3]`, RGB.
        depth: float32 `[size, size]`, metres along the viewing direction through the middle of each pixel.
        segmentation: uint8 `[size, size]`; 0 is background, i + 1 the scene's thing i.
    """

    image: NDArray[np.uint8]
    depth: Floats
    segmentation: NDArray[np.uint8]


def render(scene: Scene, size: int = 96) -> Rendering:
    """Draw a scene.

    Args:
        scene: what to draw.
        size: height and width in pixels.

    Raises:
        ValueError: if `size` is less than 32.
    """
    if size < MIN_SIZE:
        raise ValueError(f"size is {size}; a picture of a scene takes at least {MIN_SIZE} pixels")
    rays = Rays.of(scene.camera, size)
    ground = ground_depth(rays)
    depth = np.repeat(ground, size, axis=1)
    segmentation = np.zeros((size, size), np.uint8)
    with np.errstate(divide="ignore", invalid="ignore"):
        light = _light_on_ground(scene, rays, ground)
        for index, thing in enumerate(scene.things):
            rows, columns = surfaces.window(scene.camera.box(thing.x, thing.z, thing.radius, thing.height), size)
            part = rays.crop(rows, columns)
            found = surfaces.depth(thing, part)
            front = found < depth[rows, columns]  # false where a ray misses
            cosine = surfaces.brightness(thing, part, found, scene.light)
            np.maximum(cosine, 0.0, out=cosine)
            cosine *= 1 - AMBIENT
            cosine += AMBIENT
            np.copyto(depth[rows, columns], found, where=front)
            np.copyto(light[rows, columns], cosine, where=front)
            segmentation[rows, columns][front] = index + 1
    return Rendering(_colour(scene, segmentation, light, int((ground >= FAR).sum())), depth, segmentation)


def extent(scene: Scene, size: int) -> tuple[slice, slice]:
    """Rows and columns of a picture of `size` × `size` that hold all things, with a sixteenth of `size` around them."""
    boxes = [surfaces.window(scene.camera.box(one.x, one.z, one.radius, one.height), size) for one in scene.things]
    rows, columns = (_around(spans, size) for spans in zip(*boxes, strict=True))
    return rows, columns


def _around(spans: Sequence[slice], size: int) -> slice:
    """From the first start to the last stop, and a margin."""
    margin = size // 16
    return slice(max(0, min(s.start for s in spans) - margin), min(size, max(s.stop for s in spans) + margin))


def _colour(scene: Scene, segmentation: NDArray[np.uint8], light: Floats, backdrop_rows: int) -> NDArray[np.uint8]:
    entries = segmentation.copy()
    behind = entries[:backdrop_rows]
    behind[behind == 0] = len(scene.things) + 1
    colours = [scene.ground, *(RGB[thing.look.colour] for thing in scene.things), scene.backdrop]
    image = np.empty((*segmentation.shape, 3), np.uint8)
    for channel, values in enumerate(np.array(colours, np.float32).T.copy()):
        np.multiply(values.take(entries), light, out=image[..., channel], casting="unsafe")
    return image


def ground_depth(rays: Rays) -> Floats:
    """Depth in metres of the empty scene, `[rows, 1]`: the ground, or the backdrop where the ground is beyond it."""
    # Rows above the horizon never meet the ground.
    return np.where(rays.dy * -FAR > rays.height, rays.height / -rays.dy, np.float32(FAR)).astype(np.float32)


def _light_on_ground(scene: Scene, rays: Rays, ground: Floats) -> Floats:
    """Brightness of the empty scene with squares and shadows, `[rows, columns]`."""
    # Cutting off decimals rounds down only what is positive, hence the shift by an even number of squares.
    tiles = (ground * rays.dx / TILE + 64).astype(np.int16)
    tiles += (ground * rays.dz / TILE).astype(np.int16)
    tiles &= 1
    contrast = TILE_CONTRAST * (1 - ground / FAR)  # none where squares are narrower than pixels
    light: Floats = tiles * contrast
    light += 1 - contrast
    size = len(rays.dx)
    for thing in scene.things:
        _cast_shadow(scene, thing, rays, ground, light, size)
    return light


def _cast_shadow(scene: Scene, thing: Thing, rays: Rays, ground: Floats, light: Floats, size: int) -> None:
    """Darken a round spot, halfway between a thing and the tip of its shadow."""
    reach = thing.height / 2 / scene.light[1]
    x, z = thing.x - scene.light[0] * reach, thing.z - scene.light[2] * reach
    radius = 1.4 * thing.radius
    rows, columns = surfaces.window(scene.camera.box(x, z, radius, 0.0), size)
    spot = ground[rows] * rays.dx[columns]
    spot -= x
    spot *= spot
    spot += (ground[rows] * rays.dz[rows] - z) ** 2
    spot *= -2 * SHADOW / radius**2
    spot += 2 * SHADOW
    np.clip(spot, 0.0, SHADOW, out=spot)
    np.subtract(1.0, spot, out=spot)
    light[rows, columns] *= spot
