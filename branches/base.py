"""What every vision branch promises: images to pixels, pixels to features on a grid."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor


class BranchError(Exception):
    """A branch cannot be built or fed: says what was expected, what came and what to do."""


@dataclass(frozen=True)
class Features:
    """What one branch saw in one image.

    Raises:
        BranchError: if the number of rows is not the number of cells of the grid.
    """

    values: Tensor  # [N, C], row-major over the grid
    grid_hw: tuple[int, int]  # N == h * w

    def __post_init__(self) -> None:
        height, width = self.grid_hw
        if self.values.ndim != 2 or len(self.values) != height * width:
            raise BranchError(
                f"a grid of {height}x{width} cells needs values of shape "
                f"[{height * width}, C]; got {list(self.values.shape)}"
            )


@runtime_checkable
class Branch(Protocol):
    """A second pair of eyes. It knows of images, not of an LLM, tokens or projectors.

    A branch with weights is an ``nn.Module`` that holds them as its attribute ``encoder``.
    """

    name: str  # "dino": the key in a table of branches
    feature_dim: int  # C of the features

    def preprocess(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Turn RGB images into the keyword arguments of `encode`.

        Args:
            images: one or more RGB images, any sizes.

        Returns:
            CPU tensors by argument name; together they stand for the images in order.
        """
        ...

    # `*args, **kwargs` of type Any let each branch name its own arguments, as `preprocess` does.
    def encode(self, *args: Any, **kwargs: Any) -> list[Features]:
        """Encode what `preprocess` returned.

        Pixels are moved to the encoder's device and dtype here. Gradients are not switched off:
        whoever trains decides.

        Returns:
            One `Features` per image, in order, on the encoder's device.
        """
        ...


def check_complete(path_or_id: str | Path, missing: Iterable[str]) -> None:
    """Refuse an encoder that would run on weights drawn at random.

    Args:
        path_or_id: for the message.
        missing: names of weights the checkpoint does not have.

    Raises:
        BranchError: if there are any.
    """
    if names := sorted(missing):
        raise BranchError(
            f"{path_or_id} lacks {len(names)} weights of the encoder, {names[0]} among them; "
            "expected a whole checkpoint of its kind"
        )
