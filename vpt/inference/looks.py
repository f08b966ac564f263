"""The result of a call: a crop of an image, features of it, or what replaces them in a test."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

from vpt.boxes import PixelBox, crop_box_px
from vpt.branches import crop
from vpt.images import LoadedImage, from_pixels
from vpt.inference.request import Request
from vpt.model.processing import FeaturePiece, ImagePiece
from vpt.protocol.calls import PerceptionCall

_BLANK_RGB = (127, 127, 127)


@dataclass(frozen=True)
class Look:
    """The result of one call: a piece to append, and for a crop its box in the image cut."""

    piece: ImagePiece | FeaturePiece
    box_xyxy_px: PixelBox | None = None


class Looks:
    """The images of a stream, given and cut out, and the results of calls on them."""

    def __init__(self, request: Request, grid_size: int) -> None:
        self._images = list(request.images)
        self._request = request
        self._grid_size = grid_size
        self._show = SHOWN[request.replace_looks]

    @property
    def source(self) -> int:
        """Index of the image that calls of this turn concern."""
        return 0 if self._request.look_at == "first" else len(self._images) - 1

    def bring(self, call: PerceptionCall, source: int) -> Look:
        """Make the result of a call on an image; a crop becomes an image of the stream."""
        image, seed = self._images[source], self._request.sampling.seed
        if call.region is None:
            shown, _ = self._show(image, None, seed)
            return Look(FeaturePiece(call.branch, shown))
        box = crop_box_px(call.region, image.size_wh, grid_size=self._grid_size)
        shown, box_xyxy_px = self._show(image, box, seed)
        self._images.append(shown)
        return Look(ImagePiece(shown), box_xyxy_px)


_Shown = tuple[LoadedImage, PixelBox | None]


def _show(image: LoadedImage, box: PixelBox | None, seed: int) -> _Shown:
    """What the call asks for: the box of the image, or the image itself without one."""
    if box is None:
        return image, None
    return from_pixels(crop(image.pixels, box), image.source), box


def _show_blank(image: LoadedImage, box: PixelBox | None, seed: int) -> _Shown:
    """A gray picture of the same size."""
    shown, box = _show(image, box, seed)
    return from_pixels(Image.new("RGB", shown.size_wh, _BLANK_RGB), shown.source), box


def _show_elsewhere(image: LoadedImage, box: PixelBox | None, seed: int) -> _Shown:
    """A box of the same size at a random place, which image, box and seed decide."""
    if box is not None:
        (width, height), draw = image.size_wh, random.Random(f"{image.digest} {box} {seed}")
        x = draw.randint(0, width - (box[2] - box[0]))
        y = draw.randint(0, height - (box[3] - box[1]))
        box = x, y, x + box[2] - box[0], y + box[3] - box[1]
    return _show(image, box, seed)


SHOWN: dict[str | None, Callable[[LoadedImage, PixelBox | None, int], _Shown]] = {
    None: _show,
    "blank": _show_blank,
    "random": _show_elsewhere,
}
"""By ``Request.replace_looks``: what is shown of an image at a box, and the box that it shows."""
