"""Generated scenes with known depth: things that stand in rooms and yards at several distances.

Everything about a scene follows from its seed. Distances are metres along the optical axis, as
depth maps have them; x points right, y up, z away from the camera, which stands above (0, 0, 0).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from vpt.boxes import Box

Float64Array = NDArray[np.float64]

SIZE_PX = 320
SHAPE_NAMES = ("sphere", "box", "cylinder", "cone")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (205, 40, 42),
    "orange": (242, 128, 30),
    "yellow": (238, 208, 48),
    "green": (48, 152, 66),
    "blue": (42, 84, 208),
    "purple": (136, 58, 176),
    "white": (238, 238, 236),
    "black": (38, 38, 42),
}
NUM_THINGS = (2, 8)
"""Fewest and most things in a scene."""

_DISTANCE_M = (2.2, 13.0)
_FLOORS = ((150, 128, 104), (128, 122, 116), (112, 92, 74), (98, 112, 84), (168, 160, 148))
_WALLS = ((186, 180, 168), (160, 166, 172), (178, 160, 148), (140, 138, 134), (198, 196, 188))
_SKIES = ((176, 198, 222), (206, 210, 214), (222, 204, 186))
_LEAST_SIDE_PX = 0.045  # of a thing's box, as a share of the picture's side
_MOST_OVERLAP = 0.25  # of two things' boxes, as a share of the smaller one
_LEAST_GAP = 0.035  # between the inverse distances of two things, as a share of their range
_TRIES = 60
_CORNERS = np.array(list(product((-1.0, 1.0), repeat=3))).T  # of a box around (0, 0, 0)


@dataclass(frozen=True)
class Camera:
    """Where the picture is taken from.

    Attributes:
        size_px: side of the square picture.
        focal_px: focal length.
        height_m: above the ground.
        pitch: downwards, in radians.
    """

    size_px: int
    focal_px: float
    height_m: float
    pitch: float

    def project(
        self, x: Float64Array, y: Float64Array, z: Float64Array
    ) -> tuple[Float64Array, Float64Array]:
        """Place points of the scene in the picture: columns and rows in pixels."""
        sine, cosine = math.sin(self.pitch), math.cos(self.pitch)
        y = y - self.height_m
        scale = self.focal_px / (z * cosine - y * sine)
        return self.size_px / 2 + x * scale, self.size_px / 2 - (y * cosine + z * sine) * scale


@dataclass(frozen=True)
class Thing:
    """Something that stands on the ground.

    Attributes:
        shape: one of :data:`SHAPE_NAMES`.
        color: key of :data:`COLORS`; no two things of a scene share both.
        center_m: its middle, ``(x, y, z)``.
        half_m: half its size along each axis before it is turned.
        yaw: its turn about the vertical, in radians.
    """

    shape: str
    color: str
    center_m: tuple[float, float, float]
    half_m: tuple[float, float, float]
    yaw: float

    @property
    def reach_m(self) -> float:
        """Radius of the circle on the ground that it stands in."""
        x, _, z = self.half_m
        return math.hypot(x, z) if self.shape == "box" else x


@dataclass(frozen=True)
class Surface:
    """Floor, wall, ceiling or sky.

    Attributes:
        color: RGB, 0 to 255.
        pattern: key of ``surfaces.PATTERNS``.
        contrast: of the pattern, 0 for none.
        period_m: how much of the surface one unit of the pattern takes.
    """

    color: tuple[int, int, int]
    pattern: str
    contrast: float
    period_m: float


@dataclass(frozen=True)
class Layout:
    """All that a picture of a scene shows.

    Attributes:
        camera: from where.
        things: farthest first.
        back_m: distance of the back wall, infinite under the sky.
        sides_m: of the left and the right wall from the middle, infinite where there is none.
        ceiling_m: height, infinite under the sky.
        floor: the ground.
        wall: of all walls.
        above: ceiling or sky.
        light: unit vector towards the light.
        ambient: share of the light that comes from everywhere.
        haze_m: distance in which haze swallows all but 1/e.
    """

    camera: Camera
    things: tuple[Thing, ...]
    back_m: float
    sides_m: tuple[float, float]
    ceiling_m: float
    floor: Surface
    wall: Surface
    above: Surface
    light: tuple[float, float, float]
    ambient: float
    haze_m: float


def draw_layout(rng: np.random.Generator, size_px: int = SIZE_PX) -> Layout:
    """Draw what stands where.

    Args:
        rng: decides everything.
        size_px: side of the picture.
    """
    angle = rng.uniform(50, 66)
    camera = Camera(
        size_px,
        size_px / 2 / math.tan(math.radians(angle / 2)),
        rng.uniform(1.1, 2.3),
        math.radians(rng.uniform(6, 22)),
    )
    walled = rng.random() < 0.6
    back = rng.uniform(7, 16) if walled else math.inf
    left, right = (
        rng.uniform(2.6, 6) if walled and rng.random() < 0.75 else math.inf for _ in range(2)
    )
    things: list[Thing] = []
    while len(things) < NUM_THINGS[0]:
        things = _place_things(rng, camera, min(back - 0.9, _DISTANCE_M[1]), (left, right))
    azimuth, height = rng.uniform(-2.4, 2.4), rng.uniform(0.6, 1.2)
    light = (
        math.sin(azimuth) * math.cos(height),
        math.sin(height),
        -math.cos(azimuth) * math.cos(height),
    )
    return Layout(
        camera=camera,
        things=tuple(sorted(things, key=lambda thing: -thing.center_m[2])),
        back_m=back,
        sides_m=(left, right),
        ceiling_m=rng.uniform(2.8, 4.2) if walled else math.inf,
        floor=_surface(rng, _FLOORS, ("cloudy", "checkered", "planked")),
        wall=_surface(rng, _WALLS, ("cloudy", "bricked", "cloudy")),
        above=_surface(rng, _WALLS if walled else _SKIES, ("cloudy",)),
        light=light,
        ambient=rng.uniform(0.35, 0.6),
        haze_m=rng.uniform(18, 120),
    )


def _surface(
    rng: np.random.Generator, colors: tuple[tuple[int, int, int], ...], patterns: tuple[str, ...]
) -> Surface:
    red, green, blue = colors[rng.integers(len(colors))]
    tone = rng.uniform(0.8, 1.15)
    color = (round(red * tone), round(green * tone), round(blue * tone))
    pattern = patterns[rng.integers(len(patterns))]
    return Surface(color, pattern, rng.uniform(0.04, 0.14), rng.uniform(0.5, 1.6))


def _place_things(
    rng: np.random.Generator, camera: Camera, farthest: float, sides: tuple[float, float]
) -> list[Thing]:
    """Place as many things as were drawn, or fewer where there is no room."""
    wanted = int(rng.integers(NUM_THINGS[0], NUM_THINGS[1] + 1))
    looks = rng.permutation(len(SHAPE_NAMES) * len(COLORS))[:wanted]
    colors = list(COLORS)
    placed: dict[Thing, Box] = {}
    for look in looks:
        shape, color = SHAPE_NAMES[look % len(SHAPE_NAMES)], colors[look // len(SHAPE_NAMES)]
        for _ in range(_TRIES):
            thing = _draw_thing(rng, camera, shape, color, farthest)
            box = bounding_box(thing, camera)
            if _has_room(thing, box, placed, camera, sides):
                placed[thing] = box
                break
    return list(placed)


def _draw_thing(
    rng: np.random.Generator, camera: Camera, shape: str, color: str, farthest: float
) -> Thing:
    near, far = 1 / _DISTANCE_M[0], 1 / farthest
    z = 1 / rng.uniform(far, near) if rng.random() < 0.6 else rng.uniform(_DISTANCE_M[0], farthest)
    reach = 0.9 * z * camera.size_px / 2 / camera.focal_px
    width = rng.uniform(0.22, 0.5) * (1 + z / 14)  # those far away are larger, to be seen
    height = width if shape == "sphere" else width * rng.uniform(0.7, 1.7)
    depth = width * rng.uniform(0.7, 1.3) if shape == "box" else width
    center = (rng.uniform(-reach, reach), height, z)
    return Thing(shape, color, center, (width, height, depth), rng.uniform(0, math.pi / 2))


def _has_room(
    thing: Thing,
    box: Box,
    placed: dict[Thing, Box],
    camera: Camera,
    sides: tuple[float, float],
) -> bool:
    """Whether a thing stands free, in the picture, and at a distance of its own."""
    x, _, z = thing.center_m
    if x - thing.reach_m < -sides[0] or x + thing.reach_m > sides[1]:
        return False
    side, size = _LEAST_SIDE_PX * camera.size_px, camera.size_px
    if min(box[2] - box[0], box[3] - box[1]) < side or _overlap(box, (0, 0, size, size)) < 0.92:
        return False
    least_gap = _LEAST_GAP * (1 / _DISTANCE_M[0] - 1 / _DISTANCE_M[1])
    for other, other_box in placed.items():
        apart = math.hypot(x - other.center_m[0], z - other.center_m[2])
        if apart < thing.reach_m + other.reach_m + 0.05:
            return False
        if abs(1 / z - 1 / other.center_m[2]) < least_gap:
            return False
        if _overlap(box, other_box) > _MOST_OVERLAP:
            return False
    return True


def bounding_box(thing: Thing, camera: Camera) -> Box:
    """A box that surely holds a thing: XYXY in pixels, may reach beyond the picture."""
    (x, y, z), reach, tall = thing.center_m, thing.reach_m, thing.half_m[1]
    right, up, ahead = _CORNERS
    columns, rows = camera.project(x + reach * right, y + tall * up, z + reach * ahead)
    return float(columns.min()), float(rows.min()), float(columns.max()), float(rows.max())


def _overlap(one: Box, other: Box) -> float:
    """Common area as a share of the smaller box."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return width * height / min(areas)
