"""Shapes that rays can hit: how far, and which way the surface faces there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Vectors = tuple[Floats | np.float32, Floats | np.float32, Floats | np.float32]

FAR = np.float32(np.inf)


@dataclass(frozen=True)
class Hits:
    """Where rays meet a shape.

    Attributes:
        distance: ``[H, W]``, in lengths of the ray; infinite where it misses.
        normal: three of ``[H, W]``: x, y, z of the outward normal, of any length.
    """

    distance: Floats
    normal: Vectors


def _nearer_root(a: Floats, b: Floats, c: Floats) -> tuple[Floats, Floats]:
    """Both solutions of ``a t^2 + 2 b t + c = 0``, nan where there is none."""
    root = np.sqrt(b * b - a * c)
    return (-b - root) / a, (-b + root) / a


def _hit_sphere(origin: Vectors, ray: Vectors, half: Vectors) -> Hits:
    """``half[0]`` is the radius."""
    (ox, oy, oz), (dx, dy, dz), radius = origin, ray, half[0]
    near, _ = _nearer_root(
        dx * dx + dy * dy + dz * dz,
        ox * dx + oy * dy + oz * dz,
        ox * ox + oy * oy + oz * oz - radius * radius,
    )
    distance = np.where(near > 0, near, FAR)
    safe = np.where(near > 0, near, np.float32(0))
    return Hits(distance, (ox + safe * dx, oy + safe * dy, oz + safe * dz))


def _hit_box(origin: Vectors, ray: Vectors, half: Vectors) -> Hits:
    enters, leaves = [], []
    for o, d, size in zip(origin, ray, half, strict=True):
        one, other = (-size - o) / d, (size - o) / d
        enters.append(np.minimum(one, other))
        leaves.append(np.maximum(one, other))
    enter = np.maximum(np.maximum(enters[0], enters[1]), enters[2])
    leave = np.minimum(np.minimum(leaves[0], leaves[1]), leaves[2])
    distance = np.where((enter < leave) & (enter > 0), enter, FAR)
    x, y, z = (
        np.where(enter == entered, -np.sign(d), np.float32(0))
        for entered, d in zip(enters, ray, strict=True)
    )
    return Hits(distance, (x, y, z))


def _hit_cylinder(origin: Vectors, ray: Vectors, half: Vectors) -> Hits:
    """``half[0]`` is the radius; the lid shows, the bottom never does."""
    (ox, oy, oz), (dx, dy, dz), (radius, height, _) = origin, ray, half
    near, _ = _nearer_root(
        dx * dx + dz * dz, ox * dx + oz * dz, ox * ox + oz * oz - radius * radius
    )
    side = np.where((near > 0) & (np.abs(oy + near * dy) <= height), near, FAR)
    lid = (height - oy) / dy
    inside = (ox + lid * dx) ** 2 + (oz + lid * dz) ** 2 <= radius * radius
    lid = np.where((lid > 0) & (dy < 0) & inside, lid, FAR)
    is_lid = lid < side
    distance = np.minimum(side, lid)
    safe = np.where(np.isfinite(side), side, np.float32(0))
    zero = np.float32(0)
    return Hits(
        distance,
        (
            np.where(is_lid, zero, ox + safe * dx),
            np.where(is_lid, np.float32(1), zero),
            np.where(is_lid, zero, oz + safe * dz),
        ),
    )


def _hit_cone(origin: Vectors, ray: Vectors, half: Vectors) -> Hits:
    """``half[0]`` is the radius at the bottom; the tip is up, the bottom never shows."""
    (ox, oy, oz), (dx, dy, dz), (radius, height, _) = origin, ray, half
    slope = (radius / (2 * height)) ** 2
    below = height - oy  # of the origin under the tip
    roots = _nearer_root(
        dx * dx + dz * dz - slope * dy * dy,
        ox * dx + oz * dz + slope * below * dy,
        ox * ox + oz * oz - slope * below * below,
    )
    distance = FAR
    for root in roots:
        under = below - root * dy
        hit = (root > 0) & (under >= 0) & (under <= 2 * height)
        distance = np.minimum(distance, np.where(hit, root, FAR))
    safe = np.where(np.isfinite(distance), distance, np.float32(0))
    return Hits(distance, (ox + safe * dx, slope * (below - safe * dy), oz + safe * dz))


SHAPES: dict[str, Callable[[Vectors, Vectors, Vectors], Hits]] = {
    "sphere": _hit_sphere,
    "box": _hit_box,
    "cylinder": _hit_cylinder,
    "cone": _hit_cone,
}
"""Name -> where rays meet it: origin and ray as seen from its middle, and half its size."""
