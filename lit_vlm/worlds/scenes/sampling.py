"""Random scenes in which every thing can be seen."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np

from lit_vlm.worlds.scenes import surfaces
from lit_vlm.worlds.scenes.render import ground_depth
from lit_vlm.worlds.scenes.surfaces import Rays
from lit_vlm.worlds.scenes.world import (
    COLOURS,
    HALF_VIEW,
    SCALE,
    SHAPES,
    SIZES,
    UNIT_RADIUS,
    Camera,
    Look,
    Scene,
    Thing,
    Vector,
)

MAX_THINGS = 6
MIN_VISIBLE_SHARE = 0.5
"""Share of each thing's outline, on a grid of 48 × 48 rays, that other things leave visible, at least."""
GAP = 0.15
"""Metres between the upright cylinders about two things, at least."""
NEAREST, FARTHEST = 3.5, 8.8
"""Range in metres of a thing's z."""
PROBE = 48
TRIES_PER_THING, TRIES_PER_SCENE = 30, 100


def sample_looks(rng: random.Random, count: int) -> list[Look]:
    """`count` random looks; shape, colour and size are drawn independently."""
    return [Look(rng.choice(SHAPES), rng.choice(COLOURS), rng.choice(SIZES)) for _ in range(count)]


def sample_scene(
    seed: int | str, looks: Sequence[Look] | None = None, max_things: int = MAX_THINGS, thing_scale: float = 1.0
) -> Scene:
    """A scene that depends on its arguments only, on every machine.

    Things do not intersect, lie wholly in the picture, and may hide parts of each other, though at least
    `MIN_VISIBLE_SHARE` of each is seen. Where a thing stands does not depend on what it is.

    Args:
        seed: another seed gives another scene.
        looks: what to place, 1 to 6 things; default: 1 to `max_things` random ones.
        max_things: see `looks`.
        thing_scale: height and width of all things against the usual ones; where they stand does not depend on it, but
            for those that would hide each other at one scale alone.

    Raises:
        ValueError: if there are no looks, or more than 6, no room for them was found, or things would be larger than
            usual.
    """
    if not 0 < thing_scale <= 1:  # places are drawn for the widest thing of the usual sizes
        raise ValueError(f"thing_scale is {thing_scale}; it must be above 0 and at most 1")
    rng = random.Random(f"scene-{seed}")
    if looks is None:
        looks = sample_looks(rng, rng.randint(1, max_things))
    if not 1 <= len(looks) <= MAX_THINGS:
        raise ValueError(f"looks has {len(looks)} entries; a scene holds 1 to {MAX_THINGS} things")
    for _ in range(TRIES_PER_SCENE):
        camera = Camera(rng.uniform(2.8, 3.4), math.radians(rng.uniform(24.0, 29.0)))
        things = _place(rng, camera, looks, thing_scale)
        if things is not None:
            return Scene(things, camera, _light(rng), _grey(rng, 118, 150), _grey(rng, 168, 205))
    raise ValueError(f"looks: found no room for {looks}")


def _place(rng: random.Random, camera: Camera, looks: Sequence[Look], thing_scale: float) -> tuple[Thing, ...] | None:
    view = _View(camera)
    for look in looks:
        for _ in range(TRIES_PER_THING):
            x, z = _spot(rng, camera)
            if view.add(Thing(look, x, z, rng.uniform(0.0, math.pi / 2), thing_scale)):
                break
        else:
            return None
    return tuple(view.things)


def _spot(rng: random.Random, camera: Camera) -> tuple[float, float]:
    """A place where the widest thing would be seen whole, so that size and place are independent."""
    z = rng.uniform(NEAREST, FARTHEST)
    radius = max(UNIT_RADIUS.values()) * SCALE["large"]
    reach = HALF_VIEW * (z - radius) * math.cos(camera.pitch) - radius
    return rng.uniform(-reach, reach), z


class _View:
    """The things placed so far and what is seen of each."""

    def __init__(self, camera: Camera) -> None:
        self.things: list[Thing] = []
        self._camera = camera
        self._rays = Rays.of(camera, PROBE)
        self._depth = np.repeat(ground_depth(self._rays), PROBE, axis=1)
        self._owner = np.zeros((PROBE, PROBE), np.uint8)
        self._outlines = np.zeros(MAX_THINGS + 1, np.int64)
        self._visible = np.zeros(MAX_THINGS + 1, np.int64)

    def add(self, thing: Thing) -> bool:
        """Place a thing, unless it is too close to another or one of them would be hidden too much."""
        for other in self.things:
            if math.hypot(thing.x - other.x, thing.z - other.z) < thing.radius + other.radius + GAP:
                return False
        box = self._camera.box(thing.x, thing.z, thing.radius, thing.height)
        rows, columns = surfaces.window(box, PROBE)
        with np.errstate(divide="ignore", invalid="ignore"):
            found = surfaces.depth(thing, self._rays.crop(rows, columns))
        outline = found < ground_depth(self._rays)[rows]
        front = found < self._depth[rows, columns]
        number = len(self.things) + 1
        visible = self._visible - np.bincount(self._owner[rows, columns][front], minlength=MAX_THINGS + 1)
        visible[number] = np.count_nonzero(front)
        outlines = self._outlines.copy()
        outlines[number] = np.count_nonzero(outline)
        if not outlines[number] or (visible[1:] < MIN_VISIBLE_SHARE * outlines[1:]).any():
            return False
        self.things.append(thing)
        self._visible, self._outlines = visible, outlines
        np.copyto(self._depth[rows, columns], found, where=front)
        self._owner[rows, columns][front] = number
        return True


def _light(rng: random.Random) -> Vector:
    """A light from above and behind the camera, so that the sides that are seen are lit."""
    azimuth, elevation = math.radians(rng.uniform(-65.0, 65.0)), math.radians(rng.uniform(40.0, 60.0))
    level = math.cos(elevation)
    return level * math.sin(azimuth), math.sin(elevation), -level * math.cos(azimuth)


def _grey(rng: random.Random, low: float, high: float) -> Vector:
    """A grey, tinted so little that it is none of the colours that things have."""
    grey = rng.uniform(low, high)
    return grey + rng.uniform(-9.0, 9.0), grey + rng.uniform(-9.0, 9.0), grey + rng.uniform(-9.0, 9.0)
