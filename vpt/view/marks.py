"""Places marked on a photo: regions with their calls' numbers, and boxes the model wrote."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageColor, ImageDraw

from vpt.boxes import GridBox, PixelBox, compose, crop_box_px, iou, rescale
from vpt.protocol.tokens import RELEASED_GRID_SIZE
from vpt.view.album import Album
from vpt.view.lettering import PAPER, latin_font

CALL_COLOURS = (
    *("#e0245e", "#2f6fe4", "#178a3e", "#e26a00", "#8a2be2"),
    *("#00838f", "#a85500", "#c2189b", "#51606f", "#6b7d00"),
)
CHIP_HEIGHT = 24
MOST_CHIPS = 200  # on one image; more would cover it


@dataclass
class Mark:
    """A region or a written box on a given image.

    Attributes:
        cells: XYXY, pixels of the cells that were named; of a box, its own.
        cut: XYXY, pixels that were cut out; of a box, its own.
        numbers: of the calls that named it, from 1; of a box, its own.
        colour: of its first call; of a box, one that no call has, if there are enough.
        is_box: whether the model wrote it as a box.
    """

    cells: PixelBox
    cut: PixelBox
    numbers: list[int]
    colour: str
    is_box: bool = False

    @property
    def words(self) -> str:
        """What stands at it: ``"1, 3"`` for two calls, ``"b2"`` for a box."""
        return ("b" if self.is_box else "") + ", ".join(map(str, self.numbers))


def call_colour(number: int) -> str:
    """Colour of a call, counted from 1."""
    return CALL_COLOURS[(number - 1) % len(CALL_COLOURS)]


def marks_on(album: Album, index: int) -> list[Mark]:
    """Regions named on a given image; equal ones are one mark with several numbers."""
    trace = album.trace
    grid_size = trace.settings.get("grid_size", RELEASED_GRID_SIZE)
    marks: dict[tuple[PixelBox, PixelBox], Mark] = {}
    for number, call in enumerate(trace.calls, 1):
        if call.region is None or album.root(call.image) != index:
            continue
        frame, region = album.frame(call.image), GridBox(*call.region)
        size_wh = (frame[2] - frame[0], frame[3] - frame[1])
        cells, cut = (
            compose(frame, crop_box_px(region, size_wh, grid_size=grid_size, margin=margin))
            for margin in (0, 1)
        )
        cut = call.box_xyxy_px or cut
        mark = marks.setdefault((cells, cut), Mark(cells, cut, [], call_colour(number)))
        mark.numbers.append(number)
    return list(marks.values())


def boxes_on(album: Album, index: int) -> list[Mark]:
    """Boxes the model wrote on a given image, numbered from 1 in the order they were written."""
    written = [one for one in album.trace.content if album.root(one.image) == index]
    boxes = [box for one in written for box in one.boxes_xyxy_px or ()]
    first = len(album.trace.calls)
    return [
        Mark(box, box, [number], call_colour(first + number), is_box=True)
        for number, box in enumerate(boxes, 1)
    ]


def draw_marks(
    block: Image.Image, marks: Sequence[Mark], size_wh: tuple[int, int], shown_box: PixelBox
) -> None:
    """Draw marks.

    Args:
        block: to draw on, RGB.
        marks: in the order of their calls.
        size_wh: ``(W, H)`` of the given image.
        shown_box: XYXY, where on the block that image is.
    """
    left, top, right, bottom = shown_box

    def place(box: PixelBox) -> PixelBox:
        """On the block, ends included."""
        x0, y0, x1, y1 = map(round, rescale(box, size_wh, (right - left, bottom - top)))
        return left + x0, top + y0, left + max(x1 - 1, x0), top + max(y1 - 1, y0)

    tint = ImageDraw.Draw(block, "RGBA")  # blends
    for mark in marks:
        if mark.is_box:
            continue
        tint.rectangle(place(mark.cells), (*ImageColor.getrgb(mark.colour)[:3], 70))
    pen = ImageDraw.Draw(block)
    for mark in marks:
        x0, y0, x1, y1 = place(mark.cut)
        pen.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), outline=PAPER, width=5)
        pen.rectangle((x0, y0, x1, y1), outline=mark.colour, width=3)
    taken: list[PixelBox] = []
    for mark in marks[:MOST_CHIPS]:
        taken.append(_free_place(place(mark.cut), chip_width(mark.words), block.size, taken))
        draw_chip(pen, mark.words, mark.colour, taken[-1][:2])


def _free_place(
    box: PixelBox, width: int, size_wh: tuple[int, int], taken: Sequence[PixelBox]
) -> PixelBox:
    """Where at a box its chip can lie: at a corner, or down the left side, or over another."""
    x0, y0, x1, y1 = box
    centres = [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]
    centres += [(x0, y) for y in range(y0 + CHIP_HEIGHT // 2, y1, CHIP_HEIGHT)]
    chips: list[PixelBox] = []
    for x, y in centres:
        left = min(max(x - width // 2, 0), size_wh[0] - width)
        top = min(max(y - CHIP_HEIGHT // 2, 0), size_wh[1] - CHIP_HEIGHT)
        chips.append((left, top, left + width, top + CHIP_HEIGHT))
    free = (chip for chip in chips if not any(iou(chip, other) for other in taken))
    return next(free, chips[0])


def chip_width(text: str) -> int:
    """Width of a chip that holds the text."""
    return max(CHIP_HEIGHT, math.ceil(latin_font(15).getlength(text)) + 12)


def draw_chip(pen: ImageDraw.ImageDraw, text: str, colour: str, left_top: tuple[int, int]) -> None:
    """Draw numbers on a small coloured field."""
    left, top = left_top
    right, bottom = left + chip_width(text), top + CHIP_HEIGHT
    pen.rounded_rectangle((left, top, right - 1, bottom - 1), 6, colour, PAPER, width=2)
    centre = ((left + right) / 2, (top + bottom) / 2)
    pen.text(centre, text, PAPER, latin_font(15), anchor="mm")
