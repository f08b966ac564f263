"""The images of a trace: the given ones, with the place of each crop in them."""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Sequence
from pathlib import PureWindowsPath

from PIL import Image

from vpt.boxes import PixelBox, rescale
from vpt.errors import ImageError
from vpt.images import ImageLimits, load_image
from vpt.trace.records import THUMBNAIL_SIDE, CallRecord, ImageRecord, Trace

# What a trace keeps is small; larger than this, it is not of our making.
_KEPT = ImageLimits(max_pixels=2 * THUMBNAIL_SIDE**2, max_bytes=8 * 2**20)


class Album:
    """The images of a trace, by their index in it.

    Attributes:
        trace: that it belongs to.
        given: index in the trace -> RGB, of the given images only.

    Args:
        trace: of one run.
        images: the given ones, in order, at any size; by default the trace's thumbnails.

    Raises:
        ImageError: if an image is missing, damaged or not the one of the trace.
    """

    def __init__(self, trace: Trace, images: Sequence[Image.Image] | None) -> None:
        self.trace = trace
        given = [i for i, record in enumerate(trace.images) if record.parent is None]
        if images is None:
            images = [_thumbnail(trace.images[i]) for i in given]
        if len(images) < len(given):
            raise ImageError(f"the trace has {len(given)} given images, but {len(images)} came")
        self.given = dict(zip(given, images, strict=False))
        for index, image in self.given.items():
            _check_shape(trace.images[index], image)
            self.given[index] = image.convert("RGB")

    def root(self, index: int) -> int:
        """The given image that an image stems from."""
        return self.trace.root(index)

    def number(self, index: int) -> int:
        """How a person counts the given image that an image stems from."""
        return list(self.given).index(self.root(index)) + 1

    def frame(self, index: int) -> PixelBox:
        """Where an image lies in the given one it stems from, in pixels."""
        record = self.trace.images[index]
        return record.box_xyxy_px or (0, 0, *record.size_wh)

    def cut(self, index: int, box_xyxy_px: PixelBox) -> Image.Image:
        """Cut a box out of the given image that an image stems from; never empty."""
        root = self.root(index)
        image = self.given[root]
        x0, y0, x1, y1 = rescale(box_xyxy_px, self.trace.images[root].size_wh, image.size)
        left, top = min(math.floor(x0), image.width - 1), min(math.floor(y0), image.height - 1)
        return image.crop((left, top, max(math.ceil(x1), left + 1), max(math.ceil(y1), top + 1)))

    def brought(self, call: CallRecord) -> Image.Image:
        """What a region call brought: the crop as the trace keeps it, or cut out again."""
        if call.result_image is not None:
            record = self.trace.images[call.result_image]
            if record.thumbnail is not None:
                return _thumbnail(record)
        return self.cut(call.image, call.box_xyxy_px or self.frame(call.image))


def fitted(picture: Image.Image, room_wh: tuple[int, int]) -> Image.Image:
    """A picture as large as the room allows; what is tiny grows 64-fold at most."""
    scale = min(room_wh[0] / picture.width, room_wh[1] / picture.height, 64)
    size_wh = max(round(picture.width * scale), 1), max(round(picture.height * scale), 1)
    if scale > 4:  # show the pixels as they are
        return picture.resize(size_wh, Image.Resampling.NEAREST)
    return picture.resize(size_wh, Image.Resampling.LANCZOS, reducing_gap=3)


def read_data_uri(uri: str, name: str) -> Image.Image:
    """Open a picture that a trace holds.

    Args:
        uri: ``data:image/...;base64,...``.
        name: for the message.

    Raises:
        ImageError: if it is damaged.
    """
    head, _, body = uri.partition(";base64,")
    try:
        if not head.startswith("data:image/"):
            raise ValueError("expected a data URI")
        return load_image(base64.b64decode(body, validate=True), limits=_KEPT, name=name).pixels
    except (binascii.Error, ValueError) as exc:
        raise ImageError(f"{name} is damaged: {exc}") from exc


def base_name(source: str) -> str:
    """Last part of a path of any system."""
    return PureWindowsPath(source).name or source


def _check_shape(record: ImageRecord, image: Image.Image) -> None:
    width, height = record.size_wh
    # Half a pixel of rounding on either side, in a picture of any size.
    if abs(image.width * height - image.height * width) > 1.5 * max(width, height):
        raise ImageError(
            f"expected {base_name(record.source)} of {width}x{height}, at any scale; got an "
            f"image of {image.width}x{image.height}; pass the given images in order"
        )


def _thumbnail(record: ImageRecord) -> Image.Image:
    name = base_name(record.source)
    if record.thumbnail is None:
        raise ImageError(
            f"the trace holds no picture of {name}; pass images=, or save traces "
            "after keep_thumbnails()"
        )
    return read_data_uri(record.thumbnail, f"the thumbnail of {name}")
