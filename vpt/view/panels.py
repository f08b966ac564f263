"""The panels of a picture: what each call brought, and each depth map the model wrote."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from vpt.boxes import rescale
from vpt.protocol.tokens import BRANCH_TOKENS
from vpt.trace.records import CallRecord, ContentRecord
from vpt.view.album import Album, fitted
from vpt.view.depth import depth_picture, why_no_picture
from vpt.view.heat import colour_bar, heat_over, score_map, seen_of_call
from vpt.view.lettering import INK, PAPER, QUIET, SHADE, Text, latin_font, set_text
from vpt.view.marks import CHIP_HEIGHT, call_colour, chip_width, draw_chip
from vpt.view.wording import OUTCOME_WORDS, call_words, content_words, count_words, printable

BAR_HEIGHT = 30
GAP = 20
LINE = "#d5dae1"
FAULT_INK = "#8c1d18"


def draw_panels(album: Album, width: int) -> list[Image.Image]:
    """One panel per call and per depth map, in the order of their turns.

    Args:
        album: of the run.
        width: of each panel.

    Raises:
        ImageError: if a decoded map is damaged.
        PromptError: if score maps do not fit their grids.
    """
    maps = [one for one in album.trace.content if one.kind == "depth"]
    found = [(one.turn, 0, _MapPanel(album, one, width).draw()) for one in maps]
    for number, call in enumerate(album.trace.calls, 1):
        found.append((call.turn, 1, _CallPanel(album, number, call, width).draw()))
    return [panel for _, _, panel in sorted(found, key=lambda entry: entry[:2])]


def num_panels(album: Album) -> int:
    """How many panels :func:`draw_panels` draws."""
    return len(album.trace.calls) + sum(one.kind == "depth" for one in album.trace.content)


@dataclass(frozen=True)
class _MapPanel:
    """A depth map the model wrote, with words under it."""

    album: Album
    content: ContentRecord
    width: int

    def draw(self) -> Image.Image:
        one = self.content
        area = _empty_area(self.album, self.width)
        room = area.height - BAR_HEIGHT
        picture = depth_picture(one, self.album.trace.images[one.image].size_wh)
        if picture is None:
            write_centred(area, why_no_picture(one))
        else:
            paste_centred(area, fitted(picture, (area.width, room)), room)
            area.paste(colour_bar(("far", "near"), (area.width, BAR_HEIGHT)), (0, room))
        _frame(area)
        number = self.album.number(one.image)
        facts = f"{count_words(one.end - one.start, 'token')}  ·  {one.ms:,.0f} ms"
        words = [
            Text(content_words(one), 17, INK, 2),
            Text(f"written  ·  {facts}", 14, QUIET if one.is_whole else FAULT_INK, 2),
            Text(f"of image {number}, by the model's account", 14),
        ]
        return grid([area, set_text(words, self.width)], 1, gap=10)


@dataclass(frozen=True)
class _CallPanel:
    """What one call brought, with words under it."""

    album: Album
    number: int
    call: CallRecord
    width: int

    @property
    def is_executed(self) -> bool:
        return self.call.outcome == "executed"

    @property
    def is_encoded(self) -> bool:
        return self.is_executed and self.call.branch in BRANCH_TOKENS

    def draw(self) -> Image.Image:
        area = self._area()
        _frame(area)
        chip, left = str(self.number), chip_width(str(self.number)) + 9
        head = Image.new("RGB", (self.width, CHIP_HEIGHT + 2), PAPER)
        head.paste(set_text([Text(call_words(self.call), 17, INK)], self.width - left), (left, 0))
        draw_chip(ImageDraw.Draw(head), chip, call_colour(self.number), (0, 0))
        facts = Text(self._facts(), 14, QUIET if self.is_executed else FAULT_INK)
        words = set_text([facts, Text(self._place(), 14)], self.width)
        return grid([area, grid([head, words], 1, gap=0)], 1, gap=10)

    def _area(self) -> Image.Image:
        area = _empty_area(self.album, self.width)
        if not self.is_executed:
            write_centred(area, OUTCOME_WORDS.get(self.call.outcome, self.call.outcome))
        elif self.is_encoded:
            self._paste_heat(area)
        elif self.call.box_xyxy_px is not None:
            picture = self.album.cut(self.call.image, self.call.box_xyxy_px)
            paste_centred(area, fitted(picture, area.size), area.height)
        return area

    def _paste_heat(self, area: Image.Image) -> None:
        """The score map over the image, and its colour bar."""
        image, room = self.call.image, area.height - BAR_HEIGHT
        picture = self.album.cut(image, self.album.frame(image))
        photo, scores = fitted(picture, (area.width, room)), score_map(self.call)
        if scores is None:
            bar = Image.new("RGB", (area.width, BAR_HEIGHT), SHADE)
            write_centred(bar, "no score map")
        else:
            seen = rescale(
                seen_of_call(self.album.trace, self.call),
                self.album.trace.images[image].size_wh,
                photo.size,
            )
            photo, low, high = heat_over(photo, scores, seen)
            bar = colour_bar((f"{low:.3g}", f"{high:.3g}"), (area.width, BAR_HEIGHT))
        paste_centred(area, photo, room)
        area.paste(bar, (0, room))

    def _facts(self) -> str:
        call = self.call
        if not self.is_executed:
            return OUTCOME_WORDS.get(call.outcome, call.outcome)
        siblings = sum(other.turn == call.turn for other in self.album.trace.calls)
        shared = f" (all {siblings})" if siblings > 1 else ""
        tokens = count_words(call.num_tokens, "token")
        return f"executed  ·  {tokens}  ·  {call.encode_ms + call.run_ms:,.0f} ms{shared}"

    def _place(self) -> str:
        """Where it looked."""
        call = self.call
        if call.image >= len(self.album.trace.images):
            return ""
        record, number = self.album.trace.images[call.image], self.album.number(call.image)
        if (box := call.box_xyxy_px or record.box_xyxy_px) is not None:
            return f"box {', '.join(map(str, box))} of image {number}"
        words, (width, height) = f"image {number}", record.size_wh
        if self.is_encoded:
            x0, y0, x1, y1 = seen_of_call(self.album.trace, self.call)
            if x1 - x0 < width - 1 or y1 - y0 < height - 1:
                words += ", the framed part"
        return words + (", known features" if call.reused else "")


def _empty_area(album: Album, width: int) -> Image.Image:
    """Room for a picture, in about the shape of the first image."""
    first = next(iter(album.given.values()), None)
    shape = min(max(first.height / first.width, 0.6), 1.0) if first else 0.75
    return Image.new("RGB", (width, round(width * shape)), SHADE)


def _frame(area: Image.Image) -> None:
    ImageDraw.Draw(area).rectangle((0, 0, area.width - 1, area.height - 1), outline=LINE)


def grid(cells: Sequence[Image.Image], columns: int, gap: int = GAP) -> Image.Image:
    """Put images of one width row by row."""
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    heights = [max(cell.height for cell in row) for row in rows]
    width = len(rows[0]) * (rows[0][0].width + gap) - gap
    block = Image.new("RGB", (width, sum(heights) + gap * (len(rows) - 1)), PAPER)
    top = 0
    for row, height in zip(rows, heights, strict=True):
        for column, cell in enumerate(row):
            block.paste(cell, (column * (cell.width + gap), top))
        top += height + gap
    return block


def paste_centred(area: Image.Image, picture: Image.Image, height: int) -> None:
    """Put a picture into the upper part of an area, ``height`` high."""
    area.paste(picture, ((area.width - picture.width) // 2, (height - picture.height) // 2))


def write_centred(area: Image.Image, words: str) -> None:
    """Write a line into the middle of an area."""
    pen, centre = ImageDraw.Draw(area), (area.width / 2, area.height / 2)
    pen.text(centre, printable(words), QUIET, latin_font(16), anchor="mm")
