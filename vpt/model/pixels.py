"""Images of a dataset row -> arguments of the model's forward, and how many tokens each takes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vpt.errors import PromptError, RegionError
from vpt.images import LoadedImage, fit_for_tower, from_pixels, load_image, locate_image
from vpt.model.config import VPTConfig
from vpt.model.modeling import build_branch
from vpt.model.processing import VPTProcessor
from vpt.model.projectors import PROJECTOR_STEMS, token_grid
from vpt.protocol.rows import split_crop_suffix

FORWARD_ARGUMENTS = {
    "image": ("pixel_values", "image_grid_thw"),
    "reencode": ("clip_pixel_values", "clip_images_grid_thw"),
    "dino": ("detection_images",),
    "sam": ("seg_images",),
}
"""Kind of image -> names of its pixels in :meth:`VPTForConditionalGeneration.forward`."""


def open_row_image(path: str, root: Path | None = None) -> LoadedImage:
    """Open an image of a row, its crop suffix understood.

    Args:
        path: as in the row.
        root: folder of relative paths.

    Raises:
        ImageError: if it cannot be read.
        RegionError: if the box is empty. One that reaches out of the image is filled with
            black, as released.
    """
    plain, box = split_crop_suffix(path)
    image = load_image(locate_image(plain, root))
    if box is None:
        return image
    if box[2] <= box[0] or box[3] <= box[1]:
        raise RegionError(f"{path} names an empty box; expected x0 < x1 and y0 < y1")
    return from_pixels(image.pixels.crop(box), path)


class Pixels:
    """Opens and preprocesses images as the model of a configuration wants them.

    Args:
        config: of the model.
        processor: of the model.
        open_image: path in a row, or whatever stands for one -> image.
    """

    def __init__(
        self,
        config: VPTConfig,
        processor: VPTProcessor,
        open_image: Callable[[Any], LoadedImage],
    ) -> None:
        self.config = config
        self.processor = processor
        self.open_image = open_image
        with torch.device("meta"):  # only their preprocessing is used here
            self._branches = {name: build_branch(name, config) for name in config.branches}
        self._fixed: dict[str, int] = {}
        self._opened: dict[Hashable, LoadedImage] = {}

    def __call__(
        self, images: Sequence[tuple[str, Hashable]]
    ) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
        """Open and preprocess images.

        Args:
            images: kind, a key of :data:`FORWARD_ARGUMENTS`, and path of each.

        Returns:
            Arguments of forward, in which images of one kind keep their order; and per kind how
            many placeholder tokens each image takes.

        Raises:
            PromptError: if the model lacks a branch.
            ImageError: if an image cannot be read.
        """
        opened = self._open(images)
        pixels: dict[str, Tensor] = {}
        sizes: dict[str, list[int]] = {}
        for kind in dict.fromkeys(kind for kind, _ in opened):
            of_kind = [image for other, image in opened if other == kind]
            values, sizes[kind] = self._preprocess(kind, of_kind)
            pixels |= zip(FORWARD_ARGUMENTS[kind], values, strict=True)
        return pixels, sizes

    def count(self, images: Sequence[tuple[str, Hashable]]) -> dict[str, list[int]]:
        """How many placeholder tokens images take, as ``__call__`` says, but sooner.

        Every image is opened all the same, so that what cannot be read is known before training.
        """
        sizes: dict[str, list[int]] = {}
        for kind, image in self._open(images):
            sizes.setdefault(kind, []).append(self._count(kind, image))
        return sizes

    def _open(self, images: Sequence[tuple[str, Hashable]]) -> list[tuple[str, LoadedImage]]:
        """Open images, once each, and not again those of the row before.

        Several branches may see one image, and rows about one image often stand together.
        """
        for kind, _ in images:
            if kind != "image" and kind not in self._branches:
                have = ", ".join(self._branches) or "none"
                raise PromptError(
                    f"the row has images for {kind!r}, but the model lacks that branch; "
                    f"it has: {have}"
                )
        known = self._opened
        self._opened = {
            source: known[source] if source in known else self.open_image(source)
            for source in dict.fromkeys(source for _, source in images)
        }
        return [(kind, self._opened[source]) for kind, source in images]

    def _count(self, kind: str, image: LoadedImage) -> int:
        if kind in self._fixed:
            return self._fixed[kind]
        if self._branches.get(kind) is not None:  # one size for all, or they would not be stacked
            _, (self._fixed[kind],) = self._preprocess(kind, [image])
            return self._fixed[kind]
        fitted = self.processor.fit(image, self.config.max_side(kind))
        image_processor = self.processor.image_processor
        num_patches = image_processor.get_number_of_image_patches(fitted.height, fitted.width, {})
        return num_patches // image_processor.merge_size**2

    def _preprocess(
        self, kind: str, images: Sequence[LoadedImage]
    ) -> tuple[tuple[Tensor, ...], list[int]]:
        """Pixels of images of one kind, and how many tokens each will take."""
        max_side = self.config.max_side(kind)
        encoder = self._branches.get(kind)
        if encoder is None:
            pixel_values, grid_thw = self.processor.preprocess_images(images, max_side)
            merge = self.processor.image_processor.merge_size
            return (pixel_values, grid_thw), (grid_thw.prod(-1) // merge**2).tolist()
        fitted = [fit_for_tower(image.pixels, max_side=max_side) for image in images]
        pixel_values = encoder.preprocess(fitted)["pixel_values"]
        patch = encoder.encoder.config.patch_size
        height, width = pixel_values.shape[-2:]
        h, w = token_grid(PROJECTOR_STEMS[kind], (height // patch, width // patch))
        return (pixel_values,), [h * w] * len(images)


def join_pixels(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Arguments of forward for a batch, of those of its rows."""
    names = [name for names in FORWARD_ARGUMENTS.values() for name in names]
    parts = {name: [pixels[name] for pixels in rows if name in pixels] for name in names}
    return {name: torch.cat(values) for name, values in parts.items() if values}
