"""Where rays meet the solids, and how the light falls there.

A ray leaves the camera in direction (dx, dy, dz), scaled so that its length parameter t is the depth in metres along
the viewing direction. As the camera is pitched but never turned, dx depends on the column only, and dy and dz depend on
the row only: most terms are outer sums of two short vectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from lit_vlm.worlds.scenes.world import HALF_VIEW, Camera, Shape, Thing, Vector

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Rays:
    """Rays through a rectangle of pixels.

    Attributes:
        dx: `[columns]`, to the right, per metre of depth.
        dy: `[rows, 1]`, up, per metre of depth.
        dz: `[rows, 1]`, away from the camera along the ground, per metre of depth.
        height: metres from the ground to the camera.
    """

    dx: Floats
    dy: Floats
    dz: Floats
    height: float

    @classmethod
    def of(cls, camera: Camera, size: int) -> Rays:
        """The rays through the middle of each pixel of a picture of `size` × `size`."""
        ticks = _ticks(size)
        sin, cos = math.sin(camera.pitch), math.cos(camera.pitch)
        up = ticks[::-1, None]
        return cls(ticks, up * cos - sin, up * sin + cos, camera.height)

    def crop(self, rows: slice, columns: slice) -> Rays:
        """The rays through a smaller rectangle of pixels."""
        return Rays(self.dx[columns], self.dy[rows], self.dz[rows], self.height)


@cache
def _ticks(size: int) -> Floats:
    ticks = (((np.arange(size) + 0.5) / size * 2 - 1) * HALF_VIEW).astype(np.float32)
    ticks.setflags(write=False)
    return ticks


def window(box: tuple[float, float, float, float], size: int) -> tuple[slice, slice]:
    """Rows and columns of the pixels whose middle may lie in a box given as shares of the picture."""
    left, top, right, bottom = (min(max(share, 0.0), 1.0) * size for share in box)
    return slice(math.floor(top), math.ceil(bottom)), slice(math.floor(left), math.ceil(right))


def depth(thing: Thing, rays: Rays) -> Floats:
    """Depth in metres at which each ray enters a thing, `[rows, columns]`; NaN or infinite where it misses it.

    Below the ground, which hides it, a cylinder, cone or cube is taken to go on.
    """
    return _DEPTHS[thing.look.shape](thing, rays)


def brightness(thing: Thing, rays: Rays, found: Floats, light: Vector) -> Floats:
    """Cosine between the surface's normal and the light, `[rows, columns]`, at the depths `found` by `depth`."""
    return _BRIGHTNESSES[thing.look.shape](thing, rays, found, light)


def _lid(thing: Thing, rays: Rays) -> Floats:
    """Depth at which each row meets the level plane at a thing's top, `[rows, 1]`; the camera stands above it."""
    return (thing.height - rays.height) / rays.dy


def _nearer_root(a: Floats, b: Floats, c: float) -> Floats:
    """The smaller t with a t² + 2 b t + c = 0, for a > 0; overwrites its arguments."""
    root = b * b
    root -= a * c
    np.sqrt(root, out=root)
    root += b
    root /= a
    return np.negative(root, out=root)


def _sphere_depth(thing: Thing, rays: Rays) -> Floats:
    radius, oy = thing.scale, rays.height - thing.scale
    a = rays.dx * rays.dx + (rays.dy * rays.dy + rays.dz * rays.dz)
    b = rays.dx * -thing.x + (rays.dy * oy - rays.dz * thing.z)
    return _nearer_root(a, b, thing.x**2 + oy**2 + thing.z**2 - radius**2)


def _sphere_brightness(thing: Thing, rays: Rays, found: Floats, light: Vector) -> Floats:
    lx, ly, lz = (part / thing.scale for part in light)
    cosine = rays.dx * lx + (rays.dy * ly + rays.dz * lz)
    cosine *= found
    cosine += (rays.height - thing.scale) * ly - thing.x * lx - thing.z * lz
    return cosine


def _cylinder_depth(thing: Thing, rays: Rays) -> Floats:
    lid = _lid(thing, rays)
    x, z = lid * rays.dx - thing.x, lid * rays.dz - thing.z
    x *= x
    x += z * z
    a = rays.dx * rays.dx + rays.dz * rays.dz
    b = rays.dx * -thing.x - rays.dz * thing.z
    found = _nearer_root(a, b, thing.x**2 + thing.z**2 - thing.radius**2)
    found[found < lid] = np.inf  # met above the rim, where there is no side
    np.copyto(found, lid, where=x <= thing.radius**2)
    return found


def _cylinder_brightness(thing: Thing, rays: Rays, found: Floats, light: Vector) -> Floats:
    lx, lz = light[0] / thing.radius, light[2] / thing.radius
    cosine = rays.dx * lx + rays.dz * lz
    cosine *= found
    cosine -= thing.x * lx + thing.z * lz
    cosine[found == _lid(thing, rays)] = light[1]
    return cosine


def _cone_depth(thing: Thing, rays: Rays) -> Floats:
    # x² + z² = (slope · distance below the tip)². Rays are flatter than the cone, so both roots lie on one side of the
    # tip, and the nearer one is where the ray enters.
    slope, oy = thing.radius / thing.height, rays.height - thing.height
    a = rays.dx * rays.dx + (rays.dz * rays.dz - (slope * rays.dy) ** 2)
    b = rays.dx * -thing.x - (rays.dz * thing.z + rays.dy * (slope**2 * oy))
    found = _nearer_root(a, b, thing.x**2 + thing.z**2 - (slope * oy) ** 2)
    found[found < _lid(thing, rays)] = np.inf  # met on the mirror image above the tip
    return found


def _cone_brightness(thing: Thing, rays: Rays, found: Floats, light: Vector) -> Floats:
    slope = thing.radius / thing.height
    length = math.sqrt(1 + slope**2)
    across = rays.dx * light[0] + rays.dz * light[2]
    across *= found
    across -= thing.x * light[0] + thing.z * light[2]
    below = found * (-slope * length * rays.dy)
    below += (thing.height - rays.height) * slope * length
    across /= np.maximum(below, 1e-3, out=below)  # at the very tip there is no normal
    across += light[1] * slope / length
    return across


def _turned(thing: Thing, rays: Rays) -> tuple[Floats, Floats, float, float]:
    """Directions and camera position along the two level axes of a turned cube."""
    sin, cos = math.sin(thing.yaw), math.cos(thing.yaw)
    along = rays.dx * cos + rays.dz * sin
    across = rays.dx * -sin + rays.dz * cos
    return along, across, -thing.x * cos - thing.z * sin, thing.x * sin - thing.z * cos


def _cube_depth(thing: Thing, rays: Rays) -> Floats:
    along, across, o_along, o_across = _turned(thing, rays)
    near_along, far_along = _slab(along, o_along, thing.height / 2)
    near_across, far_across = _slab(across, o_across, thing.height / 2)
    found = np.maximum(near_along, near_across, out=near_along)
    np.maximum(found, _lid(thing, rays), out=found)
    found[found > np.minimum(far_along, far_across, out=far_along)] = np.inf
    return found


def _slab(direction: Floats, origin: float, half: float) -> tuple[Floats, Floats]:
    """Depths at which rays enter and leave the space between two parallel planes; overwrites `direction`."""
    inverse = np.reciprocal(direction, out=direction)
    middle: Floats = np.multiply(inverse, -origin, dtype=np.float32)
    reach: Floats = np.abs(inverse, out=inverse)
    reach *= half
    return middle - reach, middle + reach


def _cube_brightness(thing: Thing, rays: Rays, found: Floats, light: Vector) -> Floats:
    along, across, o_along, o_across = _turned(thing, rays)
    sin, cos = math.sin(thing.yaw), math.cos(thing.yaw)
    # Of two opposite faces the camera sees the one on its own side.
    on_along = math.copysign(1.0, o_along) * (light[0] * cos + light[2] * sin)
    on_across = math.copysign(1.0, o_across) * (light[2] * cos - light[0] * sin)
    along *= found
    along += o_along
    across *= found
    across += o_across
    cosine = np.full(found.shape, on_across, np.float32)
    cosine[np.abs(along) > np.abs(across)] = on_along
    cosine[found == _lid(thing, rays)] = light[1]
    return cosine


_DEPTHS: dict[Shape, Callable[[Thing, Rays], Floats]] = {
    "sphere": _sphere_depth,
    "cube": _cube_depth,
    "cylinder": _cylinder_depth,
    "cone": _cone_depth,
}
_BRIGHTNESSES: dict[Shape, Callable[[Thing, Rays, Floats, Vector], Floats]] = {
    "sphere": _sphere_brightness,
    "cube": _cube_brightness,
    "cylinder": _cylinder_brightness,
    "cone": _cone_brightness,
}
