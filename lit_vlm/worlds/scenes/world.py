"""Scenes: a few coloured solids on a ground plane, seen by a camera.

World axes in metres: x to the right, y up from the ground, z away from the camera, which stands at (0, height, 0). The
ground is y = 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

Shape = Literal["sphere", "cube", "cylinder", "cone"]
Colour = Literal["red", "green", "blue", "yellow", "purple", "cyan", "white", "black"]
Size = Literal["small", "large"]
Wording = Literal["varied", "plain"]
Vector = tuple[float, float, float]
"""A point or direction (x, y, z), or a colour (red, green, blue)."""

SHAPES: tuple[Shape, ...] = get_args(Shape)
COLOURS: tuple[Colour, ...] = get_args(Colour)
SIZES: tuple[Size, ...] = get_args(Size)

HALF_VIEW = 0.55
"""Tangent of half the angle of view, across as well as down: 57.6° in all."""
FAR = 14.0
"""Metres along the viewing direction to the backdrop, a plane that faces the camera."""

UNIT_RADIUS: dict[Shape, float] = {"sphere": 1.0, "cube": 0.8 * math.sqrt(2.0), "cylinder": 0.85, "cone": 1.0}
UNIT_HEIGHT: dict[Shape, float] = {"sphere": 2.0, "cube": 1.6, "cylinder": 1.7, "cone": 2.0}
SCALE: dict[Size, float] = {"small": 0.4, "large": 0.72}
"""Metres per unit of `UNIT_RADIUS` and `UNIT_HEIGHT`."""


@dataclass(frozen=True)
class Look:
    """Shape, colour and size: what is known of a thing apart from its place."""

    shape: Shape
    colour: Colour
    size: Size


@dataclass(frozen=True)
class Thing:
    """A solid that stands on the ground.

    Attributes:
        look: shape, colour and size.
        x: metres to the right of the camera.
        z: metres away from the camera, along the ground.
        yaw: turn about the vertical axis in radians; only a cube shows it.
        against_usual: its height and width over those that `SCALE` gives its size.
    """

    look: Look
    x: float
    z: float
    yaw: float = 0.0
    against_usual: float = 1.0

    @property
    def scale(self) -> float:
        """Radius of a sphere or cone of this size, in metres."""
        return SCALE[self.look.size] * self.against_usual

    @property
    def radius(self) -> float:
        """Radius in metres of the smallest upright cylinder about the thing."""
        return UNIT_RADIUS[self.look.shape] * self.scale

    @property
    def height(self) -> float:
        """Metres from the ground to the top."""
        return UNIT_HEIGHT[self.look.shape] * self.scale

    @property
    def centre(self) -> Vector:
        """The point halfway up its axis."""
        return self.x, self.height / 2, self.z


@dataclass(frozen=True)
class Camera:
    """Where the picture is taken from.

    Attributes:
        height: metres above the ground.
        pitch: how far it looks down, in radians.
    """

    height: float
    pitch: float

    def project(self, point: Vector) -> Vector:
        """Place in the picture and depth of a point.

        Returns:
            (column, row, depth): column and row as shares of the picture from its upper left corner, 0 to 1 inside it;
            depth in metres along the viewing direction.
        """
        x, y, z = point
        sin, cos = math.sin(self.pitch), math.cos(self.pitch)
        depth = z * cos - (y - self.height) * sin
        up = (y - self.height) * cos + z * sin
        return 0.5 + x / depth / (2 * HALF_VIEW), 0.5 - up / depth / (2 * HALF_VIEW), depth

    def box(self, x: float, z: float, radius: float, height: float) -> tuple[float, float, float, float]:
        """Bounds in the picture of an upright cylinder on the ground; a little wider than its outline.

        Returns:
            (left, top, right, bottom) as shares of the picture.
        """
        # The camera stands above every thing, so what is farther or higher is also higher in the picture.
        top, bottom = self.project((0.0, height, z + radius)), self.project((0.0, 0.0, z - radius))
        near, far = bottom[2] - height * math.sin(self.pitch), top[2] + height * math.sin(self.pitch)
        left = (x - radius) / (near if x < radius else far)
        right = (x + radius) / (near if x > -radius else far)
        return 0.5 + left / (2 * HALF_VIEW), top[1], 0.5 + right / (2 * HALF_VIEW), bottom[1]


@dataclass(frozen=True)
class Scene:
    """Everything that a picture is made from.

    Attributes:
        things: the solids; none intersects another.
        camera: where the picture is taken from.
        light: unit vector towards the light, which is far away.
        ground: colour of the ground, 0 to 255.
        backdrop: colour of what is behind it.
        wording: how text speaks of the scene. `varied`: things go by any name that fits them alone, and relations are
            told by a word such as "left". `plain`: things go by size, colour and shape; of two opposites (left and
            right, up and down, closer and farther) only the first is used; differences of place and distance are
            larger.
    """

    things: tuple[Thing, ...]
    camera: Camera
    light: Vector
    ground: Vector
    backdrop: Vector
    wording: Wording = "varied"
