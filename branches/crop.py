"""The branch without weights: cut a box out of an image."""

from __future__ import annotations

from PIL import Image

from vpt.branches.base import BranchError


def crop(image: Image.Image, box_xyxy_px: tuple[int, int, int, int]) -> Image.Image:
    """Cut a box out of an image, pixel for pixel.

    Args:
        image: any mode; it is not changed.
        box_xyxy_px: left, top, right, bottom in pixels of ``image``; right and bottom are outside
            the box, so its size is ``(right - left, bottom - top)``.

    Returns:
        A new image with a copy of the pixels.

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
