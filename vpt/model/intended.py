"""Images that a model is meant for: a description, and a cheap test of whether an image is one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vpt.errors import CheckpointError
from vpt.images import LoadedImage
from vpt.released import PHOTO_MODEL

NUM_FEATURES = 9
_SIDES_PX = (112, 28)  # longer side at which edges are measured
_BRIGHTNESS = (2, 25, 50, 75, 98)  # percentiles


@dataclass(frozen=True, eq=False)
class IntendedInputs:
    """The images that a model was trained on, as K normal distributions of their features.

    An image is of these kinds if its squared Mahalanobis distance from one of them is within the
    limit of that one. ``python -m recipes.embedded.inputs`` fits them for the shipped model.

    Attributes:
        description: of the images, for people.
        mean: ``[K, 9]``, of :func:`image_features`.
        precision: ``[K, 9, 9]``, inverse of the covariance.
        limit: ``[K]``, largest squared distance.
    """

    description: str
    mean: NDArray[np.float64]
    precision: NDArray[np.float64]
    limit: NDArray[np.float64]
    _distances: WeakKeyDictionary[LoadedImage, float] = field(
        default_factory=WeakKeyDictionary, init=False, repr=False
    )

    @classmethod
    def read(cls, setting: Any) -> IntendedInputs:
        """Read ``intended_inputs`` of a configuration; ``CheckpointError`` if it is malformed.

        Of a single kind, the numbers may be without the dimension of the kinds.
        """
        fields = ("description", "mean", "precision", "limit")
        try:
            description, *numbers = (setting[name] for name in fields)
            mean, precision, limit = (np.array(one, dtype=np.float64) for one in numbers)
            if not limit.ndim:
                mean, precision, limit = mean[None], precision[None], limit[None]
            shapes = mean.shape, precision.shape, limit.shape
            kinds = len(limit)
            is_whole = (
                isinstance(description, str)
                and set(setting) == set(fields)
                and shapes == ((kinds, NUM_FEATURES), (kinds, NUM_FEATURES, NUM_FEATURES), (kinds,))
                and kinds > 0
                and all(np.isfinite(one).all() for one in (mean, precision, limit))
            )
        except (KeyError, TypeError, ValueError):
            is_whole = False
        if not is_whole:
            raise CheckpointError(
                "intended_inputs must have a description, a mean of 9 numbers, a precision of 9 "
                "rows of 9 numbers and a limit, or equally long lists of these, not "
                f"{repr(setting)[:80]}; copy it from where the model was saved, or remove it"
            )
        return cls(description, mean, precision, limit)

    def to_dict(self) -> dict[str, Any]:
        """The setting that :meth:`read` reads."""
        return {
            "description": self.description,
            "mean": self.mean.tolist(),
            "precision": self.precision.tolist(),
            "limit": self.limit.tolist(),
        }

    def distance(self, pixels: Image.Image) -> float:
        """Squared Mahalanobis distance of an RGB image as a share of the limit: above 1 is too far.

        From the kind to which it is nearest by this measure.
        """
        offsets = image_features(pixels) - self.mean  # [K, 9]
        squares = np.einsum("ki,kij,kj->k", offsets, self.precision, offsets)
        return float((squares / self.limit).min())

    def _distance_once(self, image: LoadedImage) -> float:
        """Of an image that is asked about again, the distance is known."""
        if image not in self._distances:
            self._distances[image] = self.distance(image.pixels)
        return self._distances[image]

    def warnings(self, images: Sequence[LoadedImage]) -> list[str]:
        """A sentence for each image that is of another kind."""
        others = [one for one in images if not self._distance_once(one) <= 1]
        texts = (
            f"{one.source} is unlike the images that this model is meant for "
            f"({self.description}); do not rely on the answer. For photos use a released model, "
            f"such as {PHOTO_MODEL}; `vpt --list-models` lists all"
            for one in others
        )
        return list(dict.fromkeys(texts))


def image_features(pixels: Image.Image) -> NDArray[np.float64]:
    """Nine numbers of an RGB image of any size.

    Mean and standard deviation of ``log(1 + d)``, where d is the difference of two neighbouring
    pixels in the channel in which they differ most: at 112 and at 28 pixels a side. Then five
    percentiles of the brightest channel at 112 pixels.
    """
    features: list[float] = []
    for side_px in _SIDES_PX:
        pixels = _shrink(pixels, side_px)
        values = np.asarray(pixels, np.float64)  # [H, W, 3]
        if side_px == _SIDES_PX[0]:
            brightness = np.percentile(values.max(-1), _BRIGHTNESS)
        steps = [np.abs(np.diff(values, axis=axis)).max(-1).ravel() for axis in (0, 1)]
        edges = np.log1p(np.concatenate([*steps, [0.0]]))  # a single pixel has no neighbours
        features += [edges.mean(), edges.std()]
    return np.array([*features, *brightness])


def _shrink(pixels: Image.Image, side_px: int) -> Image.Image:
    scale = min(side_px / max(pixels.size), 1)
    width, height = (max(round(side * scale), 1) for side in pixels.size)
    return pixels.resize((width, height), Image.Resampling.BOX)
