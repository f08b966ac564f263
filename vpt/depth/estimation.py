"""Depth maps of photos, by any depth model that transformers knows."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from PIL import Image

from vpt.depth.maps import Floats
from vpt.errors import CheckpointError, ImageError

DEFAULT_MODEL = "depth-anything/Depth-Anything-V2-Small-hf"
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")

_LEAST_RANGE = 1e-5  # of what a model gives, as a share of its largest value


class DepthEstimator:
    """A depth model that gives inverse depth, as Depth Anything, DPT and MiDaS do.

    Args:
        model: of ``AutoModelForDepthEstimation``.
        processor: its image processor.
        gives_distances: as ZoeDepth does; they are then inverted.
    """

    def __init__(self, model: Any, processor: Any, *, gives_distances: bool = False) -> None:
        self._model = model.eval()
        self._processor = processor
        self._gives_distances = gives_distances

    @classmethod
    def load(
        cls,
        path_or_id: str | os.PathLike[str] = DEFAULT_MODEL,
        *,
        gives_distances: bool = False,
        **hub_kwargs: Any,
    ) -> DepthEstimator:
        """Load a depth model.

        Args:
            path_or_id: folder, or id on the hub.
            gives_distances: as ZoeDepth does, instead of inverse ones.
            **hub_kwargs: ``revision``, ``cache_dir``, ``token``, ``local_files_only``.

        Raises:
            CheckpointError: if it cannot be loaded, or is no depth model.
        """
        from transformers import AutoImageProcessor, AutoModelForDepthEstimation

        try:
            processor = AutoImageProcessor.from_pretrained(path_or_id, **hub_kwargs)
            model = AutoModelForDepthEstimation.from_pretrained(path_or_id, **hub_kwargs)
        except (OSError, ValueError) as exc:
            raise CheckpointError(
                f"cannot load the depth model {str(path_or_id)!r}: {str(exc).splitlines()[0]}"
            ) from exc
        return cls(model, processor, gives_distances=gives_distances)

    def estimate(self, image: Image.Image) -> Floats:
        """Depth of a photo, stretched to its own range as Depth Anything's grey maps are.

        Args:
            image: RGB.

        Returns:
            ``[H, W]`` float32 in the size of the photo, 0 (farthest) to 1 (nearest).

        Raises:
            ImageError: if the model gives one value for the whole photo, or none.
        """
        inputs = self._processor(images=image, return_tensors="pt").to(self._model.device)
        with torch.inference_mode():
            predicted = self._model(**inputs).predicted_depth  # [1, h, w]
            if self._gives_distances:
                predicted = 1 / predicted.clamp_min(1e-6)
            resized = torch.nn.functional.interpolate(
                predicted[:, None].float(), image.size[::-1], mode="bilinear", align_corners=False
            )[0, 0]
        depth = resized.cpu().numpy()
        low, high = float(depth.min()), float(depth.max())
        clear = high - low > _LEAST_RANGE * max(abs(low), abs(high))  # more than rounding leaves
        if not (np.isfinite(low) and np.isfinite(high) and clear):
            raise ImageError("the depth model sees no depth in the picture; try another picture")
        return ((depth - low) / (high - low)).astype(np.float32)
