"""The re-encode branch: the backbone's own vision tower looks once more (released name "clip")."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from vpt.branches.base import Backbone, BoxXYXY, BranchError, Features, Tower
from vpt.branches.encoder import check_images

_EDGES = ("shortest_edge", "longest_edge")  # transformers' names; both are pixels in all


class ReencodeBranch:
    """The backbone's tower as a branch. It holds no weights, so it adds none to a checkpoint.

    Args:
        tower: ``(pixel_values, image_grid_thw) -> [sum(t*h*w) / merge_size**2, D]``, the merged
            tokens of all images end to end, on its own device. ``None`` where nothing is encoded.
        image_processor: a ``Qwen2VLImageProcessorPil``; ``None`` where nothing is preprocessed.
        merge_size: patches per side that the tower merges into one token.
        feature_dim: ``D``.

    Raises:
        BranchError: if the image processor has another ``merge_size``.
    """

    name = "reencode"

    def __init__(
        self, tower: Tower | None, image_processor: Any, *, merge_size: int, feature_dim: int
    ) -> None:
        if image_processor is not None and image_processor.merge_size != merge_size:
            raise BranchError(
                f"the tower merges {merge_size}x{merge_size} patches but the image processor is "
                f"set to merge_size={image_processor.merge_size}; give both the same"
            )
        self._tower = tower
        self._image_processor = image_processor
        self.merge_size = merge_size
        self.feature_dim = feature_dim

    @classmethod
    def build(cls, settings: Mapping[str, Any], backbone: Backbone) -> ReencodeBranch:
        """Build the branch of a model.

        Args:
            settings: ``{"preprocess": {"size": {"shortest_edge": ..., "longest_edge": ...}}}``,
                least and most pixels of an image; without it those of the image processor.

        Raises:
            BranchError: for other settings.
        """
        processor = backbone.image_processor
        size = _read_size(settings)
        if size and processor is not None:
            processor = copy.copy(processor)
            processor.size = size
        return cls(
            backbone.tower,
            processor,
            merge_size=backbone.merge_size,
            feature_dim=backbone.hidden_size,
        )

    @property
    def preprocess_config(self) -> dict[str, Any]:
        """Settings of the image processor."""
        settings: dict[str, Any] = self._image_processor.to_dict()
        return settings

    @property
    def min_side(self) -> int:
        """Pixels of one token: the tower takes no smaller image."""
        return int(self._image_processor.patch_size * self._image_processor.merge_size)

    def preprocess(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Resize, normalise and cut RGB images into patches, as for a first look.

        Returns:
            ``pixel_values`` ``[sum(t*h*w), P]`` float32, ``P`` the values of a patch, and
            ``image_grid_thw`` ``[B, 3]`` int64, in patches.
        """
        pixels = self._image_processor(images=check_images(images), return_tensors="pt")
        return {
            "pixel_values": pixels["pixel_values"].to(torch.float32),
            "image_grid_thw": pixels["image_grid_thw"].to(torch.int64),
        }

    def encode(self, pixel_values: Tensor, image_grid_thw: Tensor) -> list[Features]:
        """Run the tower and split its tokens by image.

        Args:
            pixel_values: ``[sum(t*h*w), P]``.
            image_grid_thw: ``[B, 3]``, patches; ``t`` is 1 for images.

        Returns:
            B features of ``[(h // merge_size) * (w // merge_size), D]``.

        Raises:
            BranchError: if a grid is a video's or cannot be merged, or does not fit the tokens.
        """
        assert self._tower is not None
        tokens = self._tower(pixel_values, image_grid_thw)  # [sum(h * w), D]
        return split_tower_tokens(tokens, image_grid_thw, self.merge_size)

    def grid_hw(self, size_wh: tuple[int, int]) -> tuple[int, int]:
        """Grid of the tokens of an image of this size."""
        size = self._image_processor.size
        height, width = smart_resize(
            size_wh[1],
            size_wh[0],
            factor=self.min_side,
            min_pixels=size["shortest_edge"],
            max_pixels=size["longest_edge"],
        )
        return height // self.min_side, width // self.min_side

    @classmethod
    def seen_box_px(
        cls, size_wh: tuple[int, int], preprocess: Mapping[str, Any] | None = None
    ) -> BoxXYXY:
        """The whole image: the sizes in the settings are areas, and cut nothing."""
        return (0.0, 0.0, float(size_wh[0]), float(size_wh[1]))


def _read_size(settings: Mapping[str, Any]) -> dict[str, int] | None:
    """The size that the settings of a branch name, if they do."""
    preprocess = settings.get("preprocess") or {}
    size = preprocess.get("size") or {}
    known = set(settings) <= {"preprocess"} and set(preprocess) <= {"size"}
    if known and size == {}:
        return None
    is_size = isinstance(size, Mapping) and set(size) == set(_EDGES)
    edges = [size[edge] for edge in _EDGES] if is_size else []
    if not known or [type(edge) for edge in edges] != [int, int] or not 0 < edges[0] <= edges[1]:
        raise BranchError(
            "expected settings of the own tower as in {'preprocess': {'size': {'shortest_edge': "
            f"3136, 'longest_edge': 78400}}}}, least and most pixels; got {dict(settings)}"
        )
    return dict(zip(_EDGES, edges, strict=True))


def split_tower_tokens(tokens: Tensor, image_grid_thw: Tensor, merge_size: int) -> list[Features]:
    """Split ``[sum(t*h*w) / merge_size**2, D]`` tokens of a tower by image."""
    grids = []
    for frames, height, width in image_grid_thw.tolist():
        if frames != 1 or height % merge_size or width % merge_size:
            raise BranchError(
                f"expected image grids (1, h, w) with h and w multiples of {merge_size}; "
                f"got {(frames, height, width)}"
            )
        grids.append((height // merge_size, width // merge_size))
    counts = [height * width for height, width in grids]
    if len(tokens) != sum(counts):
        raise BranchError(
            f"the grids {grids} need {sum(counts)} tokens but the tower returned {len(tokens)}"
        )
    return [Features(values, hw) for values, hw in zip(tokens.split(counts), grids, strict=True)]
