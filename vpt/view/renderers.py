"""Drawings of a run: its images, the marks on them, and the results of calls and depth maps."""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PureWindowsPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageDraw

from vpt.boxes import Box, GridBox, PixelBox, clamp, compose, crop_box_px, iou, rescale
from vpt.branches.base import branch_class
from vpt.errors import ImageError, PromptError
from vpt.images import ImageLimits, fit_for_tower, load_image
from vpt.protocol.tokens import BRANCH_TOKENS, RELEASED_GRID_SIZE
from vpt.trace.records import THUMBNAIL_SIDE, CallRecord, ContentRecord, ImageRecord, Trace
from vpt.view.lettering import INK, PAPER, QUIET, SHADE, latin_font

CALL_COLOURS = (
    *("#e0245e", "#2f6fe4", "#178a3e", "#e26a00", "#8a2be2"),
    *("#00838f", "#a85500", "#c2189b", "#51606f", "#6b7d00"),
)
CHIP_HEIGHT = 24
MOST_CHIPS = 200  # on one image; more would cover it
BLANK = "#7f7f7f"  # what a look shows that was made blank
# Eleven steps of viridis, even in lightness (Smith and van der Walt, CC0,
# https://bids.github.io/colormap); between them colours are interpolated.
VIRIDIS = (
    *((68, 1, 84), (72, 36, 117), (65, 68, 135), (53, 95, 141), (42, 120, 142), (33, 145, 140)),
    *((34, 168, 132), (68, 191, 112), (122, 209, 81), (189, 223, 38), (253, 231, 37)),
)
HEAT_SHARE = 0.62  # of the colour, over the photo in grey
MOST_Z = 2.5  # at the ends of the colour scale of score maps
Z_ENDS = (f"z = -{MOST_Z}", f"z = +{MOST_Z}")
FLAT_TEXT = "flat: all scores are equal"

# What a trace keeps is small; larger than this, it is not of our making.
_KEPT = ImageLimits(max_pixels=2 * THUMBNAIL_SIDE**2, max_bytes=8 * 2**20)


# --- images -----------------------------------------------------------------------------------


class Album:
    """The images of a trace, by their index in it; ``given`` has the given ones as RGB.

    Args:
        images: the given ones, in order, at any size; by default the trace's thumbnails.

    Raises:
        ImageError: if an image is missing, damaged or not the one of the trace.
    """

    def __init__(self, trace: Trace, images: Sequence[Image.Image] | None = None) -> None:
        self.trace = trace
        self._is_kept = images is None
        given = [i for i, record in enumerate(trace.images) if record.parent is None]
        if images is None:
            images = [_thumbnail(trace.images[i]) for i in given]
        if len(images) < len(given):
            raise ImageError(f"the trace has {len(given)} given images, but {len(images)} came")
        self.given = dict(zip(given, images, strict=False))
        for index, image in self.given.items():
            _check_shape(trace.images[index], image)
            self.given[index] = image.convert("RGB")

    def number(self, index: int) -> int:
        """Number, from 1, of the given image that an image stems from."""
        return list(self.given).index(self.trace.root(index)) + 1

    def frame(self, index: int) -> PixelBox:
        """Box of an image in the given one it stems from, in pixels."""
        record = self.trace.images[index]
        return record.box_xyxy_px or (0, 0, *record.size_wh)

    def cut(self, index: int, box_xyxy_px: PixelBox | None = None) -> Image.Image:
        """Cut a box, or the whole of an image, out of the given image; never empty."""
        root = self.trace.root(index)
        image, box = self.given[root], box_xyxy_px or self.frame(index)
        x0, y0, x1, y1 = rescale(box, self.trace.images[root].size_wh, image.size)
        left, top = min(math.floor(x0), image.width - 1), min(math.floor(y0), image.height - 1)
        return image.crop((left, top, max(math.ceil(x1), left + 1), max(math.ceil(y1), top + 1)))

    def image(self, index: int) -> Image.Image:
        """An image, given or cut out, as sharp as possible."""
        record = self.trace.images[index]
        if record.parent is None:
            return self.given[index]
        is_there = record.thumbnail is not None and (
            self._is_kept or record.object_share is not None
        )
        return _thumbnail(record) if is_there else self.cut(index)

    def as_seen(self, index: int, room_wh: tuple[int, int]) -> Image.Image:
        """An image resized as for the model, each pixel then enlarged to fit the room.

        It is the processor's image if the album has the image at full size, else close to it.
        Where the trace does not record the size, or the room is too small for it, the result is
        that of :func:`fitted`.
        """
        image, record = self.image(index), self.trace.images[index]
        if (
            (seen_wh := record.seen_wh) is None
            or seen_wh[0] > room_wh[0]
            or seen_wh[1] > room_wh[1]
        ):
            return fitted(image, room_wh)
        limit = self.trace.model.get("image_resolution")
        token_side = math.isqrt(seen_wh[0] * seen_wh[1] // max(record.num_tokens, 1))
        max_side = limit if type(limit) is int and limit > 0 else None
        image = fit_for_tower(image, min_side=token_side, max_side=max_side)
        return fitted(image.resize(seen_wh, Image.Resampling.BICUBIC), room_wh, pixelated_from=2)


def fitted(
    image: Image.Image, room_wh: tuple[int, int], *, pixelated_from: float = 4
) -> Image.Image:
    """Resize an image to the room; a tiny one grows 64-fold at most.

    Args:
        pixelated_from: scale from which the pixels are shown as squares.
    """
    scale = min(room_wh[0] / image.width, room_wh[1] / image.height, 64)
    size_wh = max(round(image.width * scale), 1), max(round(image.height * scale), 1)
    if scale >= pixelated_from:
        return image.resize(size_wh, Image.Resampling.NEAREST)
    return image.resize(size_wh, Image.Resampling.LANCZOS, reducing_gap=3)


def base_name(source: str) -> str:
    """Last part of a path of any system."""
    return PureWindowsPath(source).name or source


def _check_shape(record: ImageRecord, image: Image.Image) -> None:
    width, height = record.size_wh
    # Half a pixel of rounding on either side, in an image of any size.
    if abs(image.width * height - image.height * width) > 1.5 * max(width, height):
        raise ImageError(
            f"expected {base_name(record.source)} of {width}x{height}, at any scale; got an "
            f"image of {image.width}x{image.height}; pass the given images in order"
        )


def _thumbnail(record: ImageRecord) -> Image.Image:
    name = base_name(record.source)
    if record.thumbnail is None:
        raise ImageError(
            f"the trace holds no image of {name}; pass images=, in order, or save traces with "
            "their images"
        )
    return _read_data_uri(record.thumbnail, f"the thumbnail of {name}")


def _read_data_uri(uri: str, name: str) -> Image.Image:
    head, _, body = uri.partition(";base64,")
    try:
        if not head.startswith("data:image/"):
            raise ValueError("expected a data URI")
        return load_image(base64.b64decode(body, validate=True), limits=_KEPT, name=name).pixels
    except (binascii.Error, ValueError) as exc:
        raise ImageError(f"{name} is damaged: {exc}") from exc


# --- marks ------------------------------------------------------------------------------------


_MOST_FOUND = 5  # boxes of the detector that are drawn
_FOUND_COLOUR = "#444444"


@dataclass
class Mark:
    """A box on a given image.

    Attributes:
        kind: ``"region"`` that calls named, ``"box"`` that the model wrote, ``"found"`` by the
            detector, or ``"evidence"``.
        cells: XYXY, pixels of the cells that a region names; else of the box.
        outline: XYXY, pixels that were cut out of it, or of the box; ``None`` if nothing was cut.
        numbers: of the calls, from 1; of the box among all boxes of its kind, from 1.
        colour: ``"#rrggbb"``, of the first call; of a box, one that no call has, if possible.
    """

    kind: str
    cells: PixelBox
    outline: PixelBox | None
    numbers: list[int]
    colour: str
    score: float | None = None

    @property
    def label(self) -> str:
        """``"1, 3"`` for two calls, ``"b2"`` for a box, ``"f1 0.75"`` for one that was found."""
        start = {"box": "b", "found": "f"}.get(self.kind, "")
        score = "" if self.score is None else f" {self.score:.2f}"
        return start + ", ".join(map(str, self.numbers)) + score

    @property
    def anchor(self) -> PixelBox:
        """The box that its label belongs to."""
        return self.outline or self.cells


def call_colour(number: int) -> str:
    """Colour of a call, counted from 1."""
    return CALL_COLOURS[(number - 1) % len(CALL_COLOURS)]


def marks_on(album: Album, index: int) -> list[Mark]:
    """Regions named, boxes written and found on a given image; equal regions are one mark."""
    marks: dict[tuple[PixelBox, PixelBox | None], Mark] = {}
    for number, call in enumerate(album.trace.calls, 1):
        if call.region is None or album.trace.root(call.image) != index:
            continue
        cells, cut = _region_px(album, call)
        mark = marks.setdefault((cells, cut), Mark("region", cells, None, [], call_colour(number)))
        mark.numbers.append(number)
        if call.outcome == "executed":
            mark.outline = cut
    content = [one for one in album.trace.content if album.trace.root(one.image) == index]
    boxes = [box for one in content for box in one.boxes_xyxy_px or ()]
    written = [
        Mark("box", box, box, [number], call_colour(len(album.trace.calls) + number))
        for number, box in enumerate(boxes, 1)
    ]
    return [*marks.values(), *written, *_found_on(album, index)]


def _found_on(album: Album, index: int) -> list[Mark]:
    found = [one for one in album.trace.proposals if album.trace.root(one.image) == index]
    boxes = [compose(album.frame(one.image), one.box_xyxy_px) for one in found[:_MOST_FOUND]]
    return [
        Mark("found", box, box, [number], _FOUND_COLOUR, one.score)
        for number, (box, one) in enumerate(zip(boxes, found, strict=False), 1)
    ]


def _region_px(album: Album, call: CallRecord) -> tuple[PixelBox, PixelBox]:
    """Pixels of the named cells, and of what is cut out for them."""
    assert call.region is not None
    grid_size = album.trace.settings.get("grid_size", RELEASED_GRID_SIZE)
    frame, region = album.frame(call.image), GridBox(*call.region)
    size_wh = (frame[2] - frame[0], frame[3] - frame[1])
    cells, cut = (
        compose(frame, crop_box_px(region, size_wh, grid_size=grid_size, margin=margin))
        for margin in (0, 1)
    )
    return cells, call.box_xyxy_px or cut


def boxes_legend(marks: Sequence[Mark]) -> str:
    """``"b1 to b3: written by the model; f1 0.75: found"``; empty without boxes."""
    parts = []
    for kind, words in (("box", "written by the model"), ("found", "found")):
        labels = [mark.label for mark in marks if mark.kind == kind]
        if labels:
            parts.append(f"{' to '.join(dict.fromkeys(labels[:1] + labels[-1:]))}: {words}")
    return "; ".join(parts)


def marked_photo(
    album: Album, index: int, room_wh: tuple[int, int], drawn_box: Box | None = None
) -> Image.Image:
    """A given image with its marks, and a dashed frame around ``drawn_box`` (XYXY, its pixels)."""
    size_wh = album.trace.images[index].size_wh
    photo = fitted(album.given[index], room_wh).copy()
    marks = marks_on(album, index)

    def place(box: PixelBox) -> PixelBox:
        """In the photo, ends included."""
        x0, y0, x1, y1 = map(round, rescale(box, size_wh, photo.size))
        return x0, y0, max(x1 - 1, x0), max(y1 - 1, y0)

    tint = ImageDraw.Draw(photo, "RGBA")  # blends
    for mark in marks:
        if mark.kind == "region":
            tint.rectangle(place(mark.cells), (*ImageColor.getrgb(mark.colour)[:3], 70))
    pen = ImageDraw.Draw(photo)
    for mark in marks:
        if mark.outline is not None:
            x0, y0, x1, y1 = place(mark.outline)
            pen.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), outline=PAPER, width=5)
            pen.rectangle((x0, y0, x1, y1), outline=mark.colour, width=3)
    for mark, left_top in zip(marks, place_chips(marks, size_wh, photo.size), strict=False):
        draw_chip(pen, mark.label, mark.colour, left_top)
    if drawn_box is not None:
        _dash(pen, rescale(drawn_box, size_wh, photo.size))
    return photo


def place_chips(
    marks: Sequence[Mark], size_wh: tuple[int, int], shown_wh: tuple[int, int]
) -> list[tuple[int, int]]:
    """Left and top of the labels of marks, in pixels as shown, without overlap if there is room.

    Marks after `MOST_CHIPS` have no label.
    """
    taken: list[PixelBox] = []
    for mark in marks[:MOST_CHIPS]:
        x0, y0, x1, y1 = map(round, rescale(mark.anchor, size_wh, shown_wh))
        centres = [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]
        centres += [(x0, y) for y in range(y0 + CHIP_HEIGHT // 2, y1, CHIP_HEIGHT)]
        width, chips = chip_width(mark.label), []
        for x, y in centres:
            left = max(min(x - width // 2, shown_wh[0] - width), 0)
            top = max(min(y - CHIP_HEIGHT // 2, shown_wh[1] - CHIP_HEIGHT), 0)
            chips.append((left, top, left + width, top + CHIP_HEIGHT))
        free = (chip for chip in chips if not any(iou(chip, other) for other in taken))
        taken.append(next(free, chips[0]))
    return [chip[:2] for chip in taken]


def chip_width(text: str) -> int:
    """Width of a chip that holds the text."""
    return max(CHIP_HEIGHT, math.ceil(latin_font(15).getlength(text)) + 12)


def draw_chip(pen: ImageDraw.ImageDraw, text: str, colour: str, left_top: tuple[int, int]) -> None:
    """Draw text on a small coloured field."""
    left, top = left_top
    right, bottom = left + chip_width(text), top + CHIP_HEIGHT
    pen.rounded_rectangle((left, top, right - 1, bottom - 1), 6, colour, PAPER, width=2)
    centre = ((left + right) / 2, (top + bottom) / 2)
    pen.text(centre, text, PAPER, latin_font(15), anchor="mm")


def _dash(pen: ImageDraw.ImageDraw, box: Box, length: int = 9) -> None:
    """A dashed frame that is seen on any ground."""
    x0, y0, x1, y1 = map(round, box)
    x1, y1 = max(x1 - 1, x0), max(y1 - 1, y0)
    pen.rectangle((x0, y0, x1, y1), outline=PAPER, width=3)
    for x in range(x0, x1, 2 * length):
        for y in (y0, max(y1 - 2, y0)):
            pen.rectangle((x, y, min(x + length, x1), y + 2), fill=INK)
    for y in range(y0, y1, 2 * length):
        for x in (x0, max(x1 - 2, x0)):
            pen.rectangle((x, y, x + 2, min(y + length, y1)), fill=INK)


# --- score maps -------------------------------------------------------------------------------


def seen_box_px(
    branch: str, size_wh: tuple[int, int], preprocess: Mapping[str, Any] | None = None
) -> Box:
    """The part of an image that the features of a branch cover.

    Args:
        preprocess: settings of the branch that differ from the released ones.

    Returns:
        XYXY in pixels of the image, not rounded. With padding it reaches beyond the image.

    Raises:
        PromptError: for an unknown branch.
    """
    if branch not in BRANCH_TOKENS:
        raise PromptError(f"unknown branch {branch!r}; available: {', '.join(BRANCH_TOKENS)}")
    return branch_class(BRANCH_TOKENS[branch].home).seen_box_px(size_wh, preprocess)


def score_map(call: CallRecord) -> NDArray[np.float32] | None:
    """The scores of a call as ``[h, w]``; a ``PromptError`` if they do not fit the grid."""
    if not call.scores or call.grid_hw is None:
        return None
    if len(call.scores) != math.prod(call.grid_hw):
        raise PromptError(
            f"the trace holds {len(call.scores)} scores for a grid of "
            f"{call.grid_hw[0]}x{call.grid_hw[1]}; expected one per place"
        )
    return np.asarray(call.scores, dtype=np.float32).reshape(call.grid_hw)


def seen_of_call(trace: Trace, call: CallRecord) -> Box:
    """The part of its image that a call's features cover, as of :func:`seen_box_px`."""
    preprocess = trace.model.get("preprocess", {}).get(call.branch)
    return seen_box_px(call.branch, trace.images[call.image].size_wh, preprocess)


def heat_over(
    photo: Image.Image, scores: NDArray[np.float32], seen_box: Box
) -> tuple[Image.Image, bool]:
    """Draw the z-scores of a score map over the part of a photo that its features cover.

    Args:
        photo: RGB.
        scores: ``[h, w]``; what is not finite is drawn as the lowest.
        seen_box: XYXY in pixels of the photo, the extent of the map; may reach beyond the photo.

    Returns:
        The photo in grey under one square of colour per cell, pale where the map does not reach;
        whether the map is flat, and the photo therefore without colours.
    """
    x0, y0, x1, y1 = clamp(seen_box, photo.size)
    left, top = min(round(x0), photo.width - 1), min(round(y0), photo.height - 1)
    right, bottom = max(round(x1), left + 1), max(round(y1), top + 1)
    # The same part in cells of the map; never empty, never outside.
    grid_wh = np.array(scores.shape[::-1])
    origin, end = np.array(seen_box).reshape(2, 2)
    scale = grid_wh / (end - origin)
    u0, v0 = np.clip((np.array((left, top)) - origin) * scale, 0, grid_wh - 1e-3)
    u1, v1 = np.clip((np.array((right, bottom)) - origin) * scale, (u0 + 1e-3, v0 + 1e-3), grid_wh)
    part = scores[math.floor(v0) : math.ceil(v1), math.floor(u0) : math.ceil(u1)]
    z = z_scores(scores, part)
    grey = photo.convert("L").convert("RGB")
    result = Image.blend(grey, Image.new("RGB", photo.size, PAPER), 0.55)
    inside = grey.crop((left, top, right, bottom))
    if z is not None:
        cells = coloured(np.clip(z / (2 * MOST_Z) + 0.5, 0, 1)).resize(
            inside.size, Image.Resampling.NEAREST, box=(u0, v0, u1, v1)
        )
        inside = Image.blend(inside, cells, HEAT_SHARE)
    result.paste(inside, (left, top))
    if inside.size != photo.size:
        frame = (left, top, right - 1, bottom - 1)
        ImageDraw.Draw(result).rectangle(frame, outline=INK, width=max(photo.width // 200, 1))
    return result, z is None


def z_scores(
    scores: NDArray[np.float32], part: NDArray[np.float32] | None = None
) -> NDArray[np.float64] | None:
    """Standard deviations from the mean of the map, or of a part of it.

    Returns:
        As ``scores``, with the lowest of the part for what is not finite; ``None`` if the scores
        of the part are equal, but for rounding.
    """
    part = scores if part is None else part
    finite = part[np.isfinite(part)].astype(np.float64)
    if not finite.size or np.ptp(finite) <= 1e-5 * np.abs(finite).max():
        return None
    filled = np.where(np.isfinite(scores), scores, finite.min()).astype(np.float64)
    return (filled - finite.mean()) / finite.std()


def colour_bar(ends: tuple[str, str], size_wh: tuple[int, int]) -> Image.Image:
    """Draw the colour scale, with a text at its low and its high end."""
    bar, font = Image.new("RGB", size_wh, SHADE), latin_font(13)
    pen, middle = ImageDraw.Draw(bar), size_wh[1] // 2
    pen.text((8, middle), ends[0], QUIET, font, anchor="lm")
    pen.text((size_wh[0] - 8, middle), ends[1], QUIET, font, anchor="rm")
    start, end = (math.ceil(font.getlength(text)) + 16 for text in ends)
    if (length := size_wh[0] - start - end) > 0:
        ramp = np.broadcast_to(np.linspace(0, 1, length), (10, length))
        bar.paste(coloured(ramp), (start, middle - 5))
    return bar


def coloured(share: NDArray[Any]) -> Image.Image:
    """Draw values in [0, 1], ``[H, W]``, in viridis: low is violet, high is yellow."""
    steps = np.linspace(0, 1, len(VIRIDIS))
    mixed = [np.interp(share, steps, channel) for channel in zip(*VIRIDIS, strict=True)]
    return Image.fromarray(np.stack(mixed, axis=-1).round().astype(np.uint8))


# --- looks ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DrawnLook:
    """The result of a call, or a depth map that the model wrote, as images.

    Attributes:
        kind: ``"crop"``, ``"heat"`` (a score map over the photo), ``"plain"`` (features without a
            score map) or ``"depth"``.
        photo: what was looked at, RGB.
        picture: crop at the size that the model saw, map or the photo again; as large as the photo.
        ends: texts for the ends of the colour scale of a map.
        note: what is unusual; else empty.
    """

    kind: str
    photo: Image.Image
    picture: Image.Image
    ends: tuple[str, str] | None = None
    note: str = ""


def draw_look(album: Album, one: CallRecord | ContentRecord, room_wh: tuple[int, int]) -> DrawnLook:
    """Draw the result of an executed call, or a decoded depth map, to fit the room.

    Raises:
        ImageError: if an image of the trace is damaged.
        PromptError: if scores do not fit their grid.
    """
    if isinstance(one, ContentRecord):
        return _depth_look(album, one, room_wh)
    replaced = album.trace.settings.get("replace_looks")
    is_crop, blank = one.box_xyxy_px is not None, "made blank" if replaced == "blank" else ""
    if one.result_image is not None:
        photo = album.as_seen(one.result_image, room_wh)
    else:
        photo = fitted(album.cut(one.image, one.box_xyxy_px), room_wh)
    if blank:
        photo = Image.new("RGB", photo.size, BLANK)
    if is_crop:
        note = "cut elsewhere" if replaced == "random" else blank
        return DrawnLook("crop", photo, photo, note=note)
    scores = score_map(one)
    if scores is None:
        return DrawnLook("plain", photo, photo, note=blank or "no score map")
    size_wh = album.trace.images[one.image].size_wh
    seen = rescale(seen_of_call(album.trace, one), size_wh, photo.size)
    picture, is_flat = heat_over(photo, scores, seen)
    if is_flat:
        return DrawnLook("heat", photo, picture, note=blank or FLAT_TEXT)
    return DrawnLook("heat", photo, picture, Z_ENDS, blank)


def _depth_look(album: Album, one: ContentRecord, room_wh: tuple[int, int]) -> DrawnLook:
    """A depth map in the colours of the score maps and the shape of its image."""
    assert one.picture is not None
    photo = fitted(album.cut(one.image), room_wh)
    grey = np.asarray(_read_data_uri(one.picture, "the depth map").convert("L"))
    picture = coloured(grey / 255).resize(photo.size, Image.Resampling.BILINEAR)
    return DrawnLook("depth", photo, picture, ("far", "near"))


def why_no_map(content: ContentRecord) -> str:
    """The reason why a depth map cannot be drawn; empty if it can."""
    if content.picture is not None:
        return ""
    return "codes only: no depth tokenizer" if content.is_whole else "cut off at the token limit"
