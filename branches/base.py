"""The interface of vision branches: images to pixels, pixels to features on a grid."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

BoxXYXY = tuple[float, float, float, float]
Tower = Callable[["Tensor", "Tensor"], "Tensor"]


class BranchError(Exception):
    """A branch cannot be built or fed."""


@dataclass(frozen=True)
class Features:
    """Features of one image; ``BranchError`` unless the values fill the grid."""

    values: Tensor  # [N, C], row-major over the grid
    grid_hw: tuple[int, int]  # N == h * w

    def __post_init__(self) -> None:
        height, width = self.grid_hw
        if self.values.ndim != 2 or len(self.values) != height * width:
            raise BranchError(
                f"a grid of {height}x{width} cells needs values of shape "
                f"[{height * width}, C]; got {list(self.values.shape)}"
            )


@dataclass(frozen=True)
class Backbone:
    """Parts of a model that a branch may use instead of weights of its own.

    Attributes:
        merge_size: patches per side that the tower merges into one token.
        hidden_size: ``D``.
    """

    tower: Tower | None = None  # None where nothing is encoded
    image_processor: Any = None  # None where nothing is preprocessed
    merge_size: int = 2
    hidden_size: int = 0


@runtime_checkable
class Branch(Protocol):
    """Features of images, without LLM, tokens or projectors.

    A branch with weights is an ``nn.Module`` that holds them as its attribute ``encoder``.
    """

    name: str  # "dino": the key in a table of branches
    feature_dim: int  # C of the features

    def preprocess(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Turn RGB images of any sizes into the keyword arguments of `encode`, in their order.

        Returns:
            CPU tensors by argument name, each for all images.
        """
        ...

    # `*args, **kwargs` of type Any let each branch name its own arguments, as `preprocess` does.
    def encode(self, *args: Any, **kwargs: Any) -> list[Features]:
        """Encode what `preprocess` returned: one `Features` per image, on the encoder's device.

        Pixels are moved to the encoder's device and dtype. Gradients are not switched off.
        """
        ...


class ModelBranch(Branch, Protocol):
    """A branch that a model calls by tokens of its own: the class that its table row names.

    :class:`vpt.branches.encoder.EncoderBranch` has most of this for an image encoder.
    """

    min_side: int  # pixels; smaller images are enlarged before `preprocess`
    preprocess_config: Mapping[str, Any]  # JSON-able settings of `preprocess`

    @classmethod
    def build(cls, settings: Mapping[str, Any], backbone: Backbone) -> ModelBranch:
        """Build the branch of a model, with fresh weights if it has any.

        Args:
            settings: ``{"encoder": ..., "preprocess": ...}`` of the model's ``branch_configs``;
                missing ones are as released.
        """
        ...

    def grid_hw(self, size_wh: tuple[int, int]) -> tuple[int, int]:
        """Grid of the features of an image of this size."""
        ...

    @classmethod
    def seen_box_px(
        cls, size_wh: tuple[int, int], preprocess: Mapping[str, Any] | None = None
    ) -> BoxXYXY:
        """Part of an image of this size that the features cover.

        Args:
            preprocess: settings of `preprocess_config` that differ from the released ones.

        Returns:
            XYXY in pixels of the image, not rounded; with padding it reaches beyond the image.
        """
        ...


def crop(image: Image.Image, box_xyxy_px: tuple[int, int, int, int]) -> Image.Image:
    """Cut a box out of an image, pixel for pixel; returns a copy.

    Args:
        image: any mode.
        box_xyxy_px: left, top, right, bottom in pixels of ``image``; right and bottom exclusive.

    Raises:
        BranchError: if the box is empty or reaches out of the image.
    """
    left, top, right, bottom = box_xyxy_px
    width, height = image.size
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise BranchError(
            f"cannot crop box {tuple(box_xyxy_px)} from an image of {width}x{height} px; "
            "expected 0 <= left < right <= width and 0 <= top < bottom <= height"
        )
    return image.crop(box_xyxy_px)


def branch_class(home: str) -> type[ModelBranch]:
    """Import the class of a branch, named as ``"module:class"``."""
    module, _, name = home.partition(":")
    found: type[ModelBranch] = getattr(importlib.import_module(module), name)
    return found


def check_complete(path_or_id: str | Path, missing: Iterable[str]) -> None:
    """Refuse a checkpoint that lacks weights of the encoder."""
    if names := sorted(missing):
        raise BranchError(
            f"{path_or_id} lacks {len(names)} weights of the encoder, {names[0]} among them; "
            "expected a whole checkpoint of its kind"
        )
