"""Pictures and maps of scenes against geometry that is worked out another way."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest

from lit_vlm.worlds.scenes import Camera, Look, Scene, Thing, render, sample_scene
from lit_vlm.worlds.scenes.sampling import GAP, MAX_THINGS, MIN_VISIBLE_SHARE
from lit_vlm.worlds.scenes.world import FAR, HALF_VIEW, SHAPES, Shape

SIZE = 256
CAMERA = Camera(3.0, math.radians(25.0))
LIGHT = (0.0, math.sqrt(0.5), -math.sqrt(0.5))


def alone(*things: Thing, camera: Camera = CAMERA) -> Scene:
    return Scene(things, camera, LIGHT, (130.0, 130.0, 130.0), (190.0, 190.0, 190.0))


def pixel(point: tuple[float, float, float]) -> tuple[int, int]:
    column, row, _ = CAMERA.project(point)
    return math.floor(row * SIZE), math.floor(column * SIZE)


def points(scene: Scene, depth: np.ndarray) -> np.ndarray:
    """World coordinates of what each pixel shows, `[size, size, 3]`, from the camera's position and axes."""
    size = len(depth)
    sin, cos = math.sin(scene.camera.pitch), math.cos(scene.camera.pitch)
    ticks = ((np.arange(size) + 0.5) / size * 2 - 1) * HALF_VIEW
    right, down = np.meshgrid(ticks, ticks)
    forward, up = np.array([0.0, -sin, cos]), np.array([0.0, cos, sin])
    rays = right[..., None] * np.array([1.0, 0.0, 0.0]) - down[..., None] * up + forward
    return np.array([0.0, scene.camera.height, 0.0]) + depth[..., None] * rays


def outside(thing: Thing, found: np.ndarray) -> np.ndarray:
    """Metres by which points stick out of a solid; 0 on its surface."""
    x, y, z = found[..., 0] - thing.x, found[..., 1], found[..., 2] - thing.z
    half, level = thing.height / 2, np.hypot(x, z)
    if thing.look.shape == "sphere":
        return np.sqrt(x**2 + (y - half) ** 2 + z**2) - half
    if thing.look.shape == "cylinder":
        return np.maximum(level - thing.radius, np.abs(y - half) - half)
    if thing.look.shape == "cone":
        return level - thing.radius * (1 - y / thing.height)
    sin, cos = math.sin(thing.yaw), math.cos(thing.yaw)
    sides = np.maximum(np.abs(x * cos + z * sin), np.abs(z * cos - x * sin))
    return np.maximum(sides, np.abs(y - half)) - half


def test_the_nearest_point_of_a_sphere() -> None:
    thing = Thing(Look("sphere", "red", "large"), 0.4, 5.0)
    rendering = render(alone(thing), SIZE)
    eye, centre = np.array([0.0, CAMERA.height, 0.0]), np.array(thing.centre)
    nearest = centre + (eye - centre) / np.linalg.norm(eye - centre) * thing.scale
    row, column = pixel(tuple(nearest))
    forward = np.array([0.0, -math.sin(CAMERA.pitch), math.cos(CAMERA.pitch)])
    assert rendering.segmentation[row, column] == 1
    assert rendering.depth[row, column] == pytest.approx(float((nearest - eye) @ forward), abs=0.02)


def test_the_upper_corners_of_a_cube() -> None:
    thing = Thing(Look("cube", "blue", "large"), -0.5, 5.0, math.radians(30.0))
    rendering = render(alone(thing), SIZE)
    half = thing.height / 2
    for along, across in product((-0.93, 0.93), repeat=2):  # a little inside the lid, so that rounding does not miss it
        x = thing.x + half * (along * math.cos(thing.yaw) - across * math.sin(thing.yaw))
        z = thing.z + half * (along * math.sin(thing.yaw) + across * math.cos(thing.yaw))
        corner = (x, thing.height, z)
        assert rendering.segmentation[pixel(corner)] == 1
        assert rendering.depth[pixel(corner)] == pytest.approx(CAMERA.project(corner)[2], abs=0.04)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_pixel_of_a_solid_lies_on_its_surface(shape: Shape) -> None:
    thing = Thing(Look(shape, "green", "small"), 0.7, 4.4, 0.5)
    scene = alone(thing)
    rendering = render(scene, SIZE)
    mask = rendering.segmentation == 1
    assert mask.sum() > 500
    found = points(scene, rendering.depth)[mask]
    assert np.abs(outside(thing, found)).max() < 2e-3
    assert found[:, 1].min() > -1e-3


def test_background_is_the_ground_or_the_backdrop() -> None:
    scene = sample_scene("ground")
    rendering = render(scene, SIZE)
    free = rendering.segmentation == 0
    heights = points(scene, rendering.depth)[..., 1]
    assert np.allclose(heights[free & (rendering.depth < FAR)], 0, atol=1e-3)
    assert (heights[rendering.depth == FAR] > -1e-3).all()
    assert (rendering.depth <= FAR).all()


def test_segmentation_shows_what_is_nearest() -> None:
    for seed in range(25):
        scene = sample_scene(f"order-{seed}")
        rendering = render(scene)
        single = [render(alone(thing, camera=scene.camera)) for thing in scene.things]
        depths = np.stack([render(alone(camera=scene.camera)).depth, *(one.depth for one in single)])
        masks = np.stack([np.ones_like(depths[0], bool), *(one.segmentation == 1 for one in single)])
        assert np.array_equal(rendering.segmentation, np.where(masks, depths, np.inf).argmin(axis=0))
        assert np.array_equal(rendering.depth, depths.min(axis=0))


def test_every_thing_is_seen_whole_or_hidden_by_others_only_in_part() -> None:
    for seed in range(150):
        scene = sample_scene(f"seen-{seed}")
        seen = render(scene).segmentation
        for index, thing in enumerate(scene.things):
            outline = render(alone(thing, camera=scene.camera)).segmentation == 1
            assert not outline[[0, -1]].any()
            assert not outline[:, [0, -1]].any()
            # The limit is kept on a coarser grid.
            assert (seen == index + 1).sum() >= (MIN_VISIBLE_SHARE - 0.08) * outline.sum()
            assert (seen == index + 1).sum() >= 10


def test_things_keep_apart_and_scenes_hold_one_to_six() -> None:
    scenes = [sample_scene(f"apart-{seed}") for seed in range(200)]
    assert {len(scene.things) for scene in scenes} == set(range(1, MAX_THINGS + 1))
    for scene in scenes:
        for i, a in enumerate(scene.things):
            for b in scene.things[:i]:
                assert math.hypot(a.x - b.x, a.z - b.z) >= a.radius + b.radius + GAP


def test_a_thing_scale_shrinks_things_where_they_stand() -> None:
    for seed in range(60):
        usual, small = (sample_scene(f"small-{seed}", max_things=1, thing_scale=scale) for scale in (1.0, 0.5))
        (thing,), (shrunk,) = usual.things, small.things
        assert (shrunk.x, shrunk.z, shrunk.yaw, shrunk.look) == (thing.x, thing.z, thing.yaw, thing.look)
        assert (shrunk.radius, shrunk.height) == (thing.radius / 2, thing.height / 2)
        areas = [int((render(scene).segmentation == 1).sum()) for scene in (usual, small)]
        assert 0 < areas[1] <= 0.4 * areas[0]  # a quarter, and what a grid of pixels does to a few of them


@pytest.mark.parametrize("scale", [0.0, 1.5])
def test_a_scale_that_places_are_not_drawn_for_is_refused(scale: float) -> None:
    with pytest.raises(ValueError, match="it must be above 0 and at most 1"):
        sample_scene(1, thing_scale=scale)


def test_small_things_are_hidden_in_part_at_most() -> None:
    for seed in range(60):
        scene = sample_scene(f"seen-{seed}", thing_scale=0.5)
        seen = render(scene).segmentation
        for index, thing in enumerate(scene.things):
            outline = render(alone(thing, camera=scene.camera)).segmentation == 1
            assert (seen == index + 1).sum() >= 0.25 * outline.sum() > 0


def test_a_scene_of_given_looks() -> None:
    looks = [Look("cube", "red", "large")] * MAX_THINGS
    assert [thing.look for thing in sample_scene(0, looks).things] == looks
    for wrong in ([], [*looks, looks[0]]):
        with pytest.raises(ValueError, match="looks has"):
            sample_scene(0, wrong)


def test_a_picture_has_its_size_and_depends_on_the_scene_only() -> None:
    first, again = render(sample_scene(3), 64), render(sample_scene(3), 64)
    assert first.image.shape == (64, 64, 3)
    assert (first.image.dtype, first.depth.dtype, first.segmentation.dtype) == (np.uint8, np.float32, np.uint8)
    for name in ("image", "depth", "segmentation"):
        assert np.array_equal(getattr(first, name), getattr(again, name))
    assert not np.array_equal(first.image, render(sample_scene(4), 64).image)
    with pytest.raises(ValueError, match="size is 31; a picture of a scene takes at least 32"):
        render(sample_scene(3), 31)
