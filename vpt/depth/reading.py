"""What a depth map says about points: how near each is, and which is the nearest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vpt.depth.maps import Floats
from vpt.errors import DataError
from vpt.protocol.tokens import RELEASED_PIXELS


@dataclass(frozen=True)
class MapAnswer:
    """The points of a question on a map.

    Attributes:
        depths: name of a point -> value of the map there, 0 (farthest) to 1 (nearest).
        nearest: name of the point with the greatest value; ``None`` if two share it.
        lead: by how much it is before the second.
    """

    depths: Mapping[str, float]
    nearest: str | None
    lead: float


def depth_at(depth: Floats, x: float, y: float, num_pixels: int = RELEASED_PIXELS) -> float:
    """Value of a map at a point.

    Args:
        depth: ``[H, W]`` of any size.
        x: column on a grid over the whole image.
        y: row on it.
        num_pixels: side of that grid; by default that of box tokens.
    """
    height, width = depth.shape
    row, column = int((y + 0.5) * height / num_pixels), int((x + 0.5) * width / num_pixels)
    return float(depth[min(row, height - 1), min(column, width - 1)])


def answer_from_map(
    depth: Floats, points: Mapping[str, tuple[float, float]], num_pixels: int = RELEASED_PIXELS
) -> MapAnswer:
    """Read which point is the nearest off a map.

    Args:
        depth: ``[H, W]`` of any size, 0 (farthest) to 1 (nearest).
        points: name -> ``(x, y)``, column and row on a grid over the whole image.
        num_pixels: side of that grid; by default that of box tokens.

    Raises:
        DataError: for fewer than two points, or one beside the image.
    """
    if len(points) < 2:
        raise DataError(f"expected at least two points to compare, got {len(points)}")
    depths = {}
    for name, (x, y) in points.items():
        if not (0 <= x < num_pixels and 0 <= y < num_pixels):
            raise DataError(f"point {name} is at {x}, {y}; expected 0 to {num_pixels - 1}")
        depths[name] = depth_at(depth, x, y, num_pixels)
    first, second = sorted(depths, key=lambda name: -depths[name])[:2]
    lead = depths[first] - depths[second]
    return MapAnswer(depths, first if lead > 0 else None, lead)
