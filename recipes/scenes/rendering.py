"""Pictures and depth maps of generated scenes, by casting a ray through every pixel."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from recipes.scenes.layout import COLORS, SIZE_PX, Layout, Surface, Thing, bounding_box, draw_layout
from recipes.scenes.shapes import FAR, SHAPES, Floats, Vectors
from recipes.scenes.surfaces import PATTERNS, grain_tile
from vpt.boxes import PixelBox

SPLITS = ("train", "heldout")
"""Scenes of two splits have nothing to do with each other, whatever their seeds and numbers."""

_FARTHEST_M = 80.0  # the sky, and what lies beyond
_LEAST_VISIBLE = 0.5
_LEAST_PIXELS = 60
_FLOOR, _WALL, _ABOVE = range(3)


@dataclass(frozen=True)
class SceneObject:
    """A thing as the picture shows it.

    Attributes:
        shape: ``"sphere"``, ``"box"``, ``"cylinder"`` or ``"cone"``.
        color: key of ``scenes.COLORS``; no two objects of a scene share shape and color.
        box: XYXY in pixels, ends exclusive, of what is visible.
        point: ``(x, y)`` of a pixel that surely shows it, near its middle.
        distance_m: from the camera along the optical axis, median of what is visible.
        nearness: value of the depth map, 0 to 1, median of what is visible.
        visible: share of it that nothing hides, 0.5 to 1.
    """

    shape: str
    color: str
    box: PixelBox
    point: tuple[int, int]
    distance_m: float
    nearness: float
    visible: float


@dataclass(frozen=True, eq=False)
class Scene:
    """A picture, its depth map, and what is in it.

    Attributes:
        image: RGB, square.
        depth: ``[H, W]`` float32, 0 (farthest) to 1 (nearest): inverse distance, stretched to
            the range of the scene, as Depth Anything's grey maps are.
        objects: nearest first.
    """

    image: Image.Image
    depth: Floats
    objects: tuple[SceneObject, ...]


@dataclass(frozen=True, eq=False)
class _Canvas:
    """A picture in the making: rays, and what they have met so far."""

    columns: Floats  # [1, W] x of the rays
    rows_y: Floats  # [H, 1] y of the rays
    rows_z: Floats  # [H, 1] z of the rays
    distance: Floats  # [H, W]
    color: Floats  # [3, H, W], 0 to 255
    owner: NDArray[np.int16]  # [H, W], index of the thing, -1 for none


def draw_scene(seed: int, number: int, split: str = "train", size_px: int = SIZE_PX) -> Scene:
    """Draw a scene; the same arguments give the same scene.

    Args:
        seed: of a set of scenes.
        number: of the scene in its set.
        split: one of :data:`SPLITS`.
        size_px: side of the picture.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split), number])
    while True:
        scene = render(draw_layout(rng, size_px), rng)
        if scene is not None:
            return scene


def render(layout: Layout, rng: np.random.Generator) -> Scene | None:
    """Take the picture.

    Args:
        layout: what stands where.
        rng: of the grain.

    Returns:
        The scene, or ``None`` if something in it is mostly hidden.
    """
    with np.errstate(all="ignore"):  # rays along a surface meet it at infinity
        canvas = _background(layout)
        for thing in layout.things:
            _shade_ground(canvas, layout, thing)
        whole = [_draw_thing(canvas, layout, i, thing) for i, thing in enumerate(layout.things)]
        nearness = 1 / np.minimum(canvas.distance, np.float32(_FARTHEST_M))
    nearness -= nearness.min()
    nearness /= nearness.max()
    objects = []
    for index, thing in enumerate(layout.things):
        seen = _seen(canvas, layout, nearness, index, thing, whole[index])
        if seen is None:
            return None
        objects.append(seen)
    objects.sort(key=lambda seen: seen.distance_m)
    return Scene(_develop(canvas, layout, rng), nearness, tuple(objects))


def _background(layout: Layout) -> _Canvas:
    """Ground, walls and what is above: where rays meet them depends on the row or the column."""
    camera = layout.camera
    size = camera.size_px
    steps = ((np.arange(size, dtype=np.float32) + 0.5 - size / 2) / camera.focal_px).astype("f4")
    sine, cosine = np.float32(math.sin(camera.pitch)), np.float32(math.cos(camera.pitch))
    x, y, z = steps[None, :], (-steps * cosine - sine)[:, None], (cosine - steps * sine)[:, None]
    floor = np.where(y < 0, camera.height_m / -y, FAR)
    above = np.where(y > 0, (layout.ceiling_m - camera.height_m) / y, FAR)
    back = layout.back_m / z
    side = np.where(x < 0, layout.sides_m[0] / -x, layout.sides_m[1] / x)
    by_row = np.minimum(np.minimum(floor, above), back)
    distance = np.minimum(by_row, side).astype(np.float32)  # [H, W]
    is_side = side < by_row
    kind = np.where(by_row == floor, _FLOOR, np.where(np.isinf(by_row), _ABOVE, _WALL))
    kind = np.where((by_row == above) & (by_row < back), _ABOVE, kind)
    kind = np.where(is_side, _WALL, kind)  # [H, W]
    reach = np.minimum(distance, np.float32(_FARTHEST_M))
    along = np.where(is_side, reach * z, reach * x)
    across = np.where(kind == _WALL, camera.height_m + reach * y, reach * z)
    facing = {
        _FLOOR: layout.light[1],
        _WALL: max(-layout.light[2], 0.15),
        _ABOVE: 0.35 if math.isfinite(layout.ceiling_m) else 1.0,
    }
    surfaces = {_FLOOR: layout.floor, _WALL: layout.wall, _ABOVE: layout.above}
    tone = np.empty((size, size), np.float32)
    for row, surface in surfaces.items():
        mask = kind == row
        bright = layout.ambient + (1 - layout.ambient) * facing[row]
        tone[mask] = bright * _tone(surface, along[mask], across[mask], reach[mask])
    tone = np.where(is_side, np.float32(0.88) * tone, tone)  # lit otherwise than the back wall
    colors = np.array([surface.color for surface in surfaces.values()], np.float32)
    color = np.stack([channel.take(kind) for channel in colors.T])
    color *= tone
    owner = np.full((size, size), -1, np.int16)
    return _Canvas(x, y, z, distance, color, owner)


def _tone(surface: Surface, u: Floats, v: Floats, distance: Floats) -> Floats:
    """Brightness of points of a surface, about 1; patterns fade with the distance."""
    period = np.float32(surface.period_m)
    pattern = PATTERNS[surface.pattern](u / period, v / period)
    return 1 + np.float32(surface.contrast) * pattern / (1 + distance * np.float32(0.12))


def _window(thing: Thing, layout: Layout, margin: float = 0.0) -> tuple[slice, slice]:
    """Rows and columns of the picture that a thing can take, or a shadow around it."""
    size = layout.camera.size_px
    x0, y0, x1, y1 = bounding_box(thing, layout.camera)
    wide, tall = margin * (x1 - x0), margin * (y1 - y0)
    left, right = max(math.floor(x0 - wide), 0), min(math.ceil(x1 + wide) + 1, size)
    top, bottom = max(math.floor(y0 - tall), 0), min(math.ceil(y1 + tall) + 1, size)
    return slice(top, bottom), slice(left, right)


def _shade_ground(canvas: _Canvas, layout: Layout, thing: Thing) -> None:
    """Darken the ground around a thing, more on the side that the light does not reach."""
    rows, columns = _window(thing, layout, margin=0.7)
    distance = canvas.distance[rows, columns]
    height = layout.camera.height_m + distance * canvas.rows_y[rows]
    x, _, z = thing.center_m
    reach = thing.reach_m
    x -= 0.45 * reach * layout.light[0]
    z -= 0.45 * reach * layout.light[2]
    across = distance * canvas.columns[:, columns] - np.float32(x)
    along = distance * canvas.rows_z[rows] - np.float32(z)
    square = (across * across + along * along) / np.float32((1.25 * reach) ** 2)
    dark = np.where(height < 1e-3, np.float32(0.5) * np.exp(-square * square), np.float32(0))
    canvas.color[:, rows, columns] *= 1 - dark


def _draw_thing(canvas: _Canvas, layout: Layout, index: int, thing: Thing) -> int:
    """Draw a thing where nothing nearer stands; returns its pixels, hidden ones included."""
    rows, columns = _window(thing, layout)
    sine, cosine = np.float32(math.sin(thing.yaw)), np.float32(math.cos(thing.yaw))
    x, y, z = canvas.columns[:, columns], canvas.rows_y[rows], canvas.rows_z[rows]
    ray = (x * cosine - z * sine, y + 0 * x, x * sine + z * cosine)
    cx, cy, cz = (np.float32(value) for value in thing.center_m)
    height = np.float32(layout.camera.height_m)
    origin: Vectors = (-cx * cosine + cz * sine, height - cy, -cx * sine - cz * cosine)
    half = [np.float32(value) for value in thing.half_m]
    hits = SHAPES[thing.shape](origin, ray, (half[0], half[1], half[2]))
    old = canvas.distance[rows, columns]
    met = np.isfinite(hits.distance)
    front = met & (hits.distance < old)
    nx, ny, nz = (np.broadcast_to(part, front.shape)[front] for part in hits.normal)
    length = np.sqrt(nx * nx + ny * ny + nz * nz)
    light = layout.light
    turned = (light[0] * cosine - light[2] * sine, light[1], light[0] * sine + light[2] * cosine)
    facing = (nx * turned[0] + ny * turned[1] + nz * turned[2]) / length
    shade = layout.ambient + (1 - layout.ambient) * np.maximum(facing, 0)
    shade *= 0.85 + 0.15 * ny / length  # the ground keeps light from what faces it
    distance = hits.distance[front]
    u, v = (ray[0][front] + ray[2][front]) * distance, ray[1][front] * distance
    shade *= 1 + np.float32(0.05) * PATTERNS["cloudy"](u, v)
    paint = shade * np.asarray(COLORS[thing.color], np.float32)[:, None]  # [3, N]
    if thing.shape == "sphere":
        paint += 70 * np.maximum(facing, 0) ** 24
    canvas.color[:, rows, columns][:, front] = paint
    canvas.distance[rows, columns][front] = distance
    canvas.owner[rows, columns][front] = index
    return int(met.sum())


def _seen(
    canvas: _Canvas, layout: Layout, nearness: Floats, index: int, thing: Thing, num_whole: int
) -> SceneObject | None:
    """Describe a thing by its visible pixels, ``None`` if they are too few."""
    rows, columns = _window(thing, layout)
    top, left = rows.start, columns.start
    ys, xs = np.nonzero(canvas.owner[rows, columns] == index)
    if len(xs) < max(_LEAST_PIXELS, _LEAST_VISIBLE * num_whole):
        return None
    xs, ys = xs + left, ys + top
    middle = int(np.argmin((xs - xs.mean()) ** 2 + (ys - ys.mean()) ** 2))
    return SceneObject(
        shape=thing.shape,
        color=thing.color,
        box=(int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1),
        point=(int(xs[middle]), int(ys[middle])),
        distance_m=round(float(np.median(canvas.distance[ys, xs])), 4),
        nearness=round(float(np.median(nearness[ys, xs])), 4),
        visible=round(len(xs) / num_whole, 4),
    )


def _develop(canvas: _Canvas, layout: Layout, rng: np.random.Generator) -> Image.Image:
    """Haze, darker corners, grain, and 8 bits."""
    size = layout.camera.size_px
    picture = canvas.color
    haze = np.asarray(layout.above.color, np.float32)[:, None, None]
    reach = np.minimum(canvas.distance, np.float32(_FARTHEST_M))
    off = np.linspace(-1, 1, size, dtype=np.float32) ** 2
    tone = np.float32(rng.uniform(0.9, 1.15)) * (1 - np.float32(0.13) * (off[:, None] + off))
    picture -= haze
    picture *= np.exp(reach * np.float32(-1 / layout.haze_m))
    picture += haze
    picture *= tone
    picture += np.float32(rng.uniform(1, 4)) * _grain(
        size, *rng.integers(len(grain_tile()), size=2)
    )
    np.clip(picture, 0, 255, out=picture)
    return Image.fromarray(np.ascontiguousarray(picture.astype(np.uint8).transpose(1, 2, 0)))


def _grain(size: int, top: int, left: int) -> Floats:
    """A piece of the grain, ``[H, W]``, from a place of its own for each picture."""
    tile = grain_tile()
    steps = np.arange(size)
    return tile.take((steps + top) % len(tile), 0).take((steps + left) % len(tile), 1)
