"""Draw a trace so that a person can read it.

The picture has four parts, one under the other: what was asked; the images with every region the
model named, and beside them one panel per call with what it brought; the answer; the numbers.
"""

from __future__ import annotations

import base64
import binascii
import math
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from vpt.boxes import Box, GridBox, PixelBox, clamp, compose, crop_box_px, rescale
from vpt.errors import ImageError, PromptError
from vpt.images import load_image
from vpt.tokens import BRANCH_TOKENS, RELEASED_GRID_SIZE
from vpt.trace import CallRecord, Trace

if TYPE_CHECKING:
    from vpt.runtime import Runtime

MIN_WIDTH = 800  # letters get too small below

STOP_WORDS = {
    "stop": "the model finished",
    "length": "cut off at the token limit",
    "max_calls": "the model wanted another call, but the call budget was used up",
    "repeated_call": "the model repeated one call, so looking again was ended",
}
OUTCOME_WORDS = {"executed": "executed", "repeated": "repeated", "not_executed": "not executed"}

INK, QUIET, LINE, PAPER, SHADE = "#1b2430", "#66707f", "#d5dae1", "#ffffff", "#f1f3f6"
TITLE_PAPER, TITLE_INK, TITLE_QUIET = "#1b2430", "#ffffff", "#a9b4c4"
WARN_PAPER, WARN_INK = "#fff1cc", "#7a5200"
FAULT_PAPER, FAULT_INK = "#fde8e6", "#8c1d18"
CALL_COLOURS = (
    *("#e0245e", "#2f6fe4", "#178a3e", "#e26a00", "#8a2be2"),
    *("#00838f", "#a85500", "#c2189b", "#51606f", "#6b7d00"),
)

# Eleven steps of viridis, even in lightness (Smith and van der Walt, CC0,
# https://bids.github.io/colormap); between them colours are interpolated.
VIRIDIS = (
    *((68, 1, 84), (72, 36, 117), (65, 68, 135), (53, 95, 141), (42, 120, 142), (33, 145, 140)),
    *((34, 168, 132), (68, 191, 112), (122, 209, 81), (189, 223, 38), (253, 231, 37)),
)
HEAT_SHARE = 0.62  # of the colour, over the photo in grey

# Pillow's own font has Latin letters only. Others are taken where the system has them.
FALLBACK_FONTS = (
    *("DejaVuSans.ttf", "NotoSans-Regular.ttf", "NotoSansCJK-Regular.ttc", "arialuni.ttf"),
    *("msyh.ttc", "Arial Unicode.ttf", "PingFang.ttc", "NotoEmoji-Regular.ttf", "seguisym.ttf"),
)


def draw(
    trace: Trace,
    images: Sequence[Image.Image] | None = None,
    *,
    width: int = 1200,
    preprocess: Mapping[str, Mapping[str, Any]] | None = None,
    grid_size: int = RELEASED_GRID_SIZE,
) -> Image.Image:
    """Draw a trace.

    Args:
        trace: of one run.
        images: the given images, in order, at any size; by default the trace's thumbnails. Crops
            need not be among them: they are cut out again.
        width: of the result, in pixels.
        preprocess: branch -> settings that differ from the released ones, as for
            :func:`seen_box_px`; a trace does not hold them.
        grid_size: cells per side of the region grid; a trace does not hold it either.

    Returns:
        RGB, ``width`` wide and as tall as it takes.

    Raises:
        ImageError: if an image is missing, damaged or not the one of the trace.
        PromptError: if ``width`` is too small, or score maps do not fit their grids.
    """
    if width < MIN_WIDTH:
        raise PromptError(f"width must be at least {MIN_WIDTH} pixels, not {width}")
    scene = _Scene(trace, _given_images(trace, images), width, preprocess or {}, grid_size)
    blocks = [scene.title(), *scene.body(), *scene.end()]
    canvas = Image.new("RGB", (width, sum(block.height for block in blocks)), PAPER)
    top = 0
    for block in blocks:
        canvas.paste(block, (0, top))
        top += block.height
    return canvas


def seen_box_px(
    branch: str, size_wh: tuple[int, int], preprocess: Mapping[str, Any] | None = None
) -> Box:
    """Say over which part of an image the features of a branch lie.

    Qwen2-VL's tower sees the whole image. DINOv2's preprocessing resizes the shortest edge and
    cuts the centre out; SAM's resizes the longest edge and pads on the right and at the bottom.

    Args:
        branch: a key of ``BRANCH_TOKENS``.
        size_wh: ``(W, H)`` of the image.
        preprocess: settings that differ from ``RELEASED_PREPROCESS`` in ``branches/dino.py`` or
            ``branches/sam.py``.

    Returns:
        XYXY in pixels of the image, not rounded. With padding it reaches beyond the image.

    Raises:
        PromptError: for an unknown branch.
    """
    if branch not in BRANCH_TOKENS:
        raise PromptError(f"unknown branch {branch!r}; available: {', '.join(BRANCH_TOKENS)}")
    settings = {**_released_preprocess().get(branch, {}), **(preprocess or {})}
    if branch == "reencode":  # the sizes in its settings are areas: they cut nothing
        return (0.0, 0.0, float(size_wh[0]), float(size_wh[1]))
    width, height = _resized(size_wh, settings)
    box: Box = (0, 0, width, height)
    if settings.get("do_center_crop"):
        crop_width, crop_height = _sides(settings["crop_size"])
        # Rounded down, as transformers' numpy center_crop does; negative where it pads.
        left, top = (width - crop_width) // 2, (height - crop_height) // 2
        box = (left, top, left + crop_width, top + crop_height)
    elif settings.get("do_pad"):
        box = (0, 0, *_sides(settings["pad_size"]))
    return rescale(box, (width, height), size_wh)


def settings_of(runtime: Runtime) -> dict[str, Any]:
    """What :func:`draw` needs to know of a runtime: keyword arguments for it."""
    branches: Any = runtime.model.branches
    return {
        "preprocess": {name: branch.preprocess_config for name, branch in branches.items()},
        "grid_size": runtime.vocabulary.grid_size,
    }


def printable(text: str) -> str:
    """Make control characters visible, as escapes; new lines and tabs stay.

    What a model writes may hold escape sequences that would change a terminal, or marks that
    turn the direction of the text around them.
    """
    return "".join(char if _is_harmless(char) else _escape(char) for char in text)


def call_words(call: CallRecord) -> str:
    """Name a call as a person would: ``"region x 2-5, y 1-4"``, or the encoder."""
    if call.region is not None:
        x_min, y_min, x_max, y_max = call.region
        return f"region x {_span(x_min, x_max)}, y {_span(y_min, y_max)}"
    row = BRANCH_TOKENS.get(call.branch)
    return row.encoder if row else call.branch


@dataclass(frozen=True)
class _Scene:
    """A trace on its way onto paper.

    Attributes:
        trace: to be drawn.
        images: the given ones.
        width: of the paper.
        preprocess: branch -> settings.
        grid_size: cells per side of the region grid.
    """

    trace: Trace
    images: Sequence[Image.Image]
    width: int
    preprocess: Mapping[str, Mapping[str, Any]]
    grid_size: int

    def px(self, length: float) -> int:
        """A length on paper 1200 wide."""
        return max(round(length * self.width / 1200), 1)

    @cached_property
    def pad(self) -> int:
        return self.px(28)

    def title(self) -> Image.Image:
        """What was asked, and of whom."""
        model = self.trace.model.get("name") or "unnamed model"
        under = f"{model}  ·  perception: {self.trace.perception}"
        lines = _wrap(self.trace.question, self.px(26), self.width - 2 * self.pad, 12)
        texts = [_Line(line, self.px(26), TITLE_INK) for line in lines]
        quiet = _wrap(under, self.px(15), self.width - 2 * self.pad, 2)
        texts += [_Line(line, self.px(15), TITLE_QUIET) for line in quiet]
        return self._text_block(texts, TITLE_PAPER)

    def body(self) -> Iterator[Image.Image]:
        """Images and panels: side by side where the shape of the images allows it."""
        calls, gap = list(enumerate(self.trace.calls)), self.px(20)
        inner = self.width - 2 * self.pad
        if not self.images:
            yield from self._rows(calls, 3, inner)
            return
        aspect = max(image.width / image.height for image in self.images)
        if not calls or aspect > 2.2:
            yield self._framed(self._photos(inner, self.px(460), columns=len(self.images)))
            columns = max(2, min(4, len(calls)))
            yield from self._rows(calls, columns, inner)
            return
        column = (inner - gap) // 2
        photos = self._photos(column, self.px(600), columns=min(len(self.images), 2))
        panel_columns = 1 if len(calls) == 1 else 2
        row = self._rows_of(calls[:panel_columns], panel_columns, column)
        # Half a row more than the images are high looks better than one row under them.
        num_rows = max(round((photos.height + gap) / (row.height + gap)), 1)
        beside = self._rows_of(calls[: num_rows * panel_columns], panel_columns, column)
        block = Image.new("RGB", (inner, max(photos.height, beside.height)), PAPER)
        block.paste(photos, (0, 0))
        block.paste(beside, (column + gap, 0))
        yield self._framed(block)
        yield from self._rows(calls[num_rows * panel_columns :], 4, inner)

    def end(self) -> Iterator[Image.Image]:
        """The answer, what went wrong, and the numbers."""
        inner = self.width - 2 * self.pad
        yield Image.new("RGB", (self.width, self.px(16)), PAPER)
        if self.trace.model.get("trained") is False:
            note = "untrained model: the answer means nothing"
            yield self._text_block([_Line(note, self.px(17), WARN_INK)], WARN_PAPER)
        lines = _wrap(self.trace.answer, self.px(22), inner, 60)
        texts = [_Line("Answer", self.px(14), QUIET)]
        texts += [_Line(line, self.px(22), INK) for line in lines]
        if not self.trace.answer.strip():
            texts[1:] = [_Line("(nothing)", self.px(22), QUIET)]
        yield self._text_block(texts, SHADE)
        if self.trace.malformed:
            said = [f"turn {m.turn + 1}: {m.text}  ({m.reason})" for m in self.trace.malformed]
            texts = [_Line("Malformed calls, read as text", self.px(14), FAULT_INK)]
            for line in (
                wrapped for one in said[:20] for wrapped in _wrap(one, self.px(15), inner, 3)
            ):
                texts.append(_Line(line, self.px(15), FAULT_INK))
            if len(said) > 20:
                texts.append(_Line(f"… and {len(said) - 20} more", self.px(15), FAULT_INK))
            yield self._text_block(texts, FAULT_PAPER)
        lines = _wrap(self._numbers(), self.px(15), inner, 4)
        yield self._text_block([_Line(line, self.px(15), QUIET) for line in lines], PAPER)

    def _numbers(self) -> str:
        counts, trace = self.trace.counts, self.trace
        return "  ·  ".join(
            (
                f"end: {STOP_WORDS.get(trace.stop_reason, trace.stop_reason or 'not ended')}",
                f"{counts.prompt_tokens} prompt + {counts.appended_tokens} appended + "
                f"{counts.generated_tokens} generated tokens",
                _count(len(trace.calls), "call"),
                f"{trace.timings.total:,.0f} ms",
            )
        )

    # Blocks

    def _text_block(self, lines: Sequence[_Line], paper: str) -> Image.Image:
        above = self.px(16)
        height = sum(line.height for line in lines) + 2 * above
        block = Image.new("RGB", (self.width, height), paper)
        pen, top = ImageDraw.Draw(block), above
        for line in lines:
            line.draw(pen, self.pad, top)
            top += line.height
        return block

    def _framed(self, content: Image.Image) -> Image.Image:
        block = Image.new("RGB", (self.width, content.height + self.pad + self.px(8)), PAPER)
        block.paste(content, (self.pad, self.pad))
        return block

    def _rows(
        self, calls: Sequence[tuple[int, CallRecord]], columns: int, width: int
    ) -> Iterator[Image.Image]:
        if calls:
            yield self._framed(self._rows_of(calls, columns, width))

    def _rows_of(
        self, calls: Sequence[tuple[int, CallRecord]], columns: int, width: int
    ) -> Image.Image:
        """Panels of one width, row by row."""
        gap = self.px(20)
        panel_width = (width - gap * (columns - 1)) // columns
        panels = [self._panel(number, call, panel_width) for number, call in calls]
        height = max(panel.height for panel in panels)
        num_rows = -(-len(panels) // columns)
        block = Image.new("RGB", (width, num_rows * (height + gap) - gap), PAPER)
        for index, panel in enumerate(panels):
            row, column = divmod(index, columns)
            block.paste(panel, (column * (panel_width + gap), row * (height + gap)))
        return block

    # Images with the regions on them

    def _photos(self, width: int, max_height: int, columns: int) -> Image.Image:
        gap = self.px(20)
        columns = min(columns, 4)
        cell = (width - gap * (columns - 1)) // columns
        photos = [self._photo(index, cell, max_height) for index in self._given]
        rows = [photos[start : start + columns] for start in range(0, len(photos), columns)]
        heights = [max(photo.height for photo in row) for row in rows]
        block = Image.new("RGB", (width, sum(heights) + gap * (len(rows) - 1)), PAPER)
        top = 0
        for row, height in zip(rows, heights, strict=True):
            for column, photo in enumerate(row):
                block.paste(photo, (column * (cell + gap), top))
            top += height + gap
        return block

    def _photo(self, index: int, width: int, max_height: int) -> Image.Image:
        """One given image, its regions, and a line of words."""
        record, image = self.trace.images[index], self._picture(index)
        shown_wh = _fit(image.size, (width, max_height))
        marks = self._marks(index)
        words = [f"image {self._given.index(index) + 1}", printable(_base_name(record.source))]
        words += [f"{record.size_wh[0]}x{record.size_wh[1]}", f"{record.num_tokens} tokens"]
        texts = [
            _Line(line, self.px(14), QUIET)
            for line in _wrap("  ·  ".join(words), self.px(14), width, 2)
        ]
        if marks:
            key = "tinted: the cells it named; outlined: what was cut out, one cell wider"
            texts += [_Line(line, self.px(14), QUIET) for line in _wrap(key, self.px(14), width, 2)]
        below = self.px(8) + sum(text.height for text in texts)
        block = Image.new("RGB", (width, shown_wh[1] + below), PAPER)
        left = (width - shown_wh[0]) // 2
        block.paste(_resize(image, shown_wh), (left, 0))
        self._draw_marks(block, marks, record.size_wh, (left, 0), shown_wh)
        pen, top = ImageDraw.Draw(block), shown_wh[1] + self.px(8)
        for text in texts:
            text.draw(pen, max((width - text.length) // 2, 0), top)
            top += text.height
        return block

    def _marks(self, index: int) -> list[_Mark]:
        """Regions named on a given image; equal ones are one mark with several numbers."""
        marks: dict[tuple[PixelBox, PixelBox], _Mark] = {}
        for number, call in enumerate(self.trace.calls):
            if call.region is None or self._root(call.image) != index:
                continue
            frame = self._frame(call.image)
            size_wh = (frame[2] - frame[0], frame[3] - frame[1])
            cells, cut = (
                compose(
                    frame,
                    crop_box_px(
                        GridBox(*call.region), size_wh, grid_size=self.grid_size, margin=margin
                    ),
                )
                for margin in (0, 1)
            )
            cut = call.box_xyxy_px or cut
            mark = marks.setdefault((cells, cut), _Mark(cells, cut, number, []))
            mark.numbers.append(number + 1)
        return list(marks.values())

    def _draw_marks(
        self,
        block: Image.Image,
        marks: Sequence[_Mark],
        size_wh: tuple[int, int],
        origin: tuple[int, int],
        shown_wh: tuple[int, int],
    ) -> None:
        def place(box: PixelBox) -> tuple[int, int, int, int]:
            x0, y0, x1, y1 = (round(v) for v in rescale(box, size_wh, shown_wh))
            return x0 + origin[0], y0 + origin[1], x1 + origin[0] - 1, y1 + origin[1] - 1

        tint = Image.new("RGBA", block.size)
        for mark in marks:
            red, green, blue = _rgb(_colour(mark.first))
            layer = Image.new("RGBA", block.size)
            ImageDraw.Draw(layer).rectangle(_ordered(place(mark.cells)), (red, green, blue, 70))
            tint = Image.alpha_composite(tint, layer)
        block.paste(tint.convert("RGB"), (0, 0), tint.getchannel("A"))
        pen, stroke = ImageDraw.Draw(block), self.px(3)
        for mark in marks:
            box = _ordered(place(mark.cut))
            pen.rectangle(_grown(box, 1), outline=PAPER, width=stroke + 2)
            pen.rectangle(box, outline=_colour(mark.first), width=stroke)
        taken: list[Box] = []
        for mark in marks:
            self._draw_numbers(pen, mark, _ordered(place(mark.cut)), block.size, taken)

    def _draw_numbers(
        self,
        pen: ImageDraw.ImageDraw,
        mark: _Mark,
        box: tuple[int, int, int, int],
        size_wh: tuple[int, int],
        taken: list[Box],
    ) -> None:
        """Put a mark's numbers at a free corner of its box."""
        text = ", ".join(map(str, mark.numbers))
        width, height = self._chip_size(text)
        x0, y0, x1, y1 = box
        corners = [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]
        places = [(x - width // 2, y - height // 2) for x, y in corners]
        places += [(x0 - width // 2, y) for y in range(y0, max(y1, y0 + 1), height)]
        chips = []
        for x, y in places:
            x, y = min(max(x, 0), size_wh[0] - width), min(max(y, 0), size_wh[1] - height)
            chips.append((x, y, x + width, y + height))
        free = [chip for chip in chips if not any(_touch(chip, other) for other in taken)]
        chip = (free or chips)[0]
        taken.append(chip)
        self._draw_chip(pen, text, _colour(mark.first), chip[0], chip[1])

    def _chip_size(self, text: str) -> tuple[int, int]:
        height = self.px(24)
        return max(height, math.ceil(_length(text, self.px(15))) + self.px(12)), height

    def _draw_chip(
        self, pen: ImageDraw.ImageDraw, text: str, colour: str, left: int, top: int
    ) -> None:
        width, height = self._chip_size(text)
        box = (left, top, left + width - 1, top + height - 1)
        pen.rounded_rectangle(box, self.px(6), fill=colour, outline=PAPER, width=self.px(1.5))
        x = left + (width - _length(text, self.px(15))) / 2
        _write(pen, (x, top + height * 0.5 + self.px(15) * 0.36), text, self.px(15), PAPER)

    # Panels

    def _panel(self, number: int, call: CallRecord, width: int) -> Image.Image:
        """What one call brought, and words under it."""
        area_height = round(width * self._panel_shape)
        lines = self._caption(call, width)
        below = self.px(10) + self.px(26) + sum(line.height for line in lines[1:])
        block = Image.new("RGB", (width, area_height + below), PAPER)
        pen = ImageDraw.Draw(block)
        pen.rectangle((0, 0, width - 1, area_height - 1), fill=SHADE)
        if call.outcome != "executed":
            self._centre(pen, OUTCOME_WORDS.get(call.outcome, call.outcome), (width, area_height))
        elif call.branch in BRANCH_TOKENS:
            self._paste_heat(block, call, (width, area_height))
        elif call.box_xyxy_px is not None:
            picture = self._cut(self._root(call.image), call.box_xyxy_px)
            _paste_centred(block, picture, (width, area_height))
        pen.rectangle((0, 0, width - 1, area_height - 1), outline=LINE)
        top = area_height + self.px(10)
        chip = str(number + 1)
        self._draw_chip(pen, chip, _colour(number), 0, top)
        lines[0].draw(pen, self._chip_size(chip)[0] + self.px(9), top)
        top += self.px(26)
        for line in lines[1:]:
            line.draw(pen, 0, top)
            top += line.height
        return block

    @cached_property
    def _panel_shape(self) -> float:
        if not self.images:
            return 0.75
        return min(max(self.images[0].height / self.images[0].width, 0.6), 1.0)

    def _caption(self, call: CallRecord, width: int) -> list[_Line]:
        """Three lines of words under a panel; the first stands beside the number."""
        room = width - self._chip_size("10")[0] - self.px(9)
        name = _wrap(call_words(call), self.px(17), room, 1)
        facts = [OUTCOME_WORDS.get(call.outcome, call.outcome)]
        if call.outcome == "executed":
            siblings = sum(other.turn == call.turn for other in self.trace.calls)
            shared = f" (all {siblings})" if siblings > 1 else ""
            facts.append(_count(call.num_tokens, "token"))
            facts.append(f"{call.encode_ms + call.run_ms:,.0f} ms{shared}")
        is_plain = call.outcome == "executed"
        lines = [_Line(name[0], self.px(17), INK)]
        for line in _wrap("  ·  ".join(facts), self.px(14), width, 1):
            lines.append(_Line(line, self.px(14), QUIET if is_plain else FAULT_INK))
        for line in _wrap(self._place_words(call), self.px(14), width, 1):
            lines.append(_Line(line, self.px(14), QUIET))
        return lines

    def _place_words(self, call: CallRecord) -> str:
        if call.image >= len(self.trace.images):
            return ""
        root = self._given.index(self._root(call.image)) + 1
        if (box := call.box_xyxy_px or self.trace.images[call.image].box_xyxy_px) is not None:
            return f"box {', '.join(map(str, box))} of image {root}"
        words = f"image {root}"
        if call.branch in BRANCH_TOKENS and call.outcome == "executed":
            width, height = self.trace.images[call.image].size_wh
            x0, y0, x1, y1 = self._seen(call)
            if x1 - x0 < width - 1 or y1 - y0 < height - 1:
                words += ", the framed part"
        return words + (", known features" if call.reused else "")

    def _seen(self, call: CallRecord) -> Box:
        size_wh = self.trace.images[call.image].size_wh
        return seen_box_px(call.branch, size_wh, self.preprocess.get(call.branch))

    def _paste_heat(self, block: Image.Image, call: CallRecord, size_wh: tuple[int, int]) -> None:
        """The score map over the image, and its colour bar."""
        picture = self._picture(call.image)
        bar_height = self.px(30)
        shown_wh = _fit(picture.size, (size_wh[0], size_wh[1] - bar_height))
        photo = _resize(picture, shown_wh)
        left, top = (size_wh[0] - shown_wh[0]) // 2, (size_wh[1] - bar_height - shown_wh[1]) // 2
        pen = ImageDraw.Draw(block)
        under = (0, size_wh[1] - bar_height, size_wh[0], size_wh[1])
        scores = _score_map(call)
        if scores is None:
            block.paste(photo, (left, top))
            self._centre(pen, "no score map", under)
            return
        seen = rescale(self._seen(call), self.trace.images[call.image].size_wh, shown_wh)
        heated, low, high = heat_over(photo, scores, seen)
        block.paste(heated, (left, top))
        self._draw_bar(block, low, high, under)

    def _draw_bar(
        self, block: Image.Image, low: float, high: float, box: tuple[int, int, int, int]
    ) -> None:
        size, pen = self.px(13), ImageDraw.Draw(block)
        texts = (f"{low:.3g}", f"{high:.3g}")
        x0, y0, x1, y1 = box
        middle, gap = (y0 + y1) / 2, self.px(8)
        baseline = middle + size * 0.36
        start = x0 + gap + math.ceil(_length(texts[0], size)) + gap
        stop = x1 - gap - math.ceil(_length(texts[1], size)) - gap
        _write(pen, (x0 + gap, baseline), texts[0], size, QUIET)
        _write(pen, (stop + gap, baseline), texts[1], size, QUIET)
        if stop > start:
            ramp = np.linspace(0, 1, stop - start)[None, :]
            bar = Image.fromarray(_colours(np.repeat(ramp, self.px(10), axis=0)))
            block.paste(bar, (start, round(middle) - self.px(5)))

    def _centre(
        self,
        pen: ImageDraw.ImageDraw,
        text: str,
        box: tuple[int, int] | tuple[int, int, int, int],
    ) -> None:
        x0, y0, x1, y1 = box if len(box) == 4 else (0, 0, *box)
        size = self.px(16)
        x = (x0 + x1 - _length(text, size)) / 2
        _write(pen, (x, (y0 + y1) / 2 + size * 0.36), text, size, QUIET)

    # Which image, which part

    @cached_property
    def _given(self) -> list[int]:
        return [i for i, record in enumerate(self.trace.images) if record.parent is None]

    def _root(self, index: int) -> int:
        """The given image that an image stems from."""
        while (parent := self.trace.images[index].parent) is not None:
            index = parent
        return index

    def _frame(self, index: int) -> PixelBox:
        """Where an image lies in the given one it stems from."""
        record = self.trace.images[index]
        return record.box_xyxy_px or (0, 0, *record.size_wh)

    def _picture(self, index: int) -> Image.Image:
        root = self._root(index)
        if root == index:
            return self.images[self._given.index(index)]
        return self._cut(root, self._frame(index))

    def _cut(self, root: int, box_xyxy_px: PixelBox) -> Image.Image:
        image = self.images[self._given.index(root)]
        x0, y0, x1, y1 = rescale(box_xyxy_px, self.trace.images[root].size_wh, image.size)
        left, top = min(math.floor(x0), image.width - 1), min(math.floor(y0), image.height - 1)
        return image.crop((left, top, max(math.ceil(x1), left + 1), max(math.ceil(y1), top + 1)))


@dataclass(frozen=True)
class _Mark:
    """A region on an image: cells, cut box, index of the first call and numbers of all."""

    cells: PixelBox
    cut: PixelBox
    first: int
    numbers: list[int]


@dataclass(frozen=True)
class _Line:
    """A line of text of one size and colour."""

    text: str
    size: int
    fill: str

    @property
    def height(self) -> int:
        return round(self.size * 1.42)

    @property
    def length(self) -> int:
        return math.ceil(_length(self.text, self.size))

    def draw(self, pen: ImageDraw.ImageDraw, left: float, top: float) -> None:
        _write(pen, (left, top + self.size * 1.05), self.text, self.size, self.fill)


def heat_over(
    photo: Image.Image, scores: NDArray[np.float32], seen_box: Box
) -> tuple[Image.Image, float, float]:
    """Lay a score map over a photo, in the place where its features lie.

    Args:
        photo: RGB.
        scores: ``[h, w]`` finite or not; what is not finite is drawn as the lowest.
        seen_box: XYXY in pixels of the photo, the extent of the map; may reach beyond the photo.

    Returns:
        The photo in grey under the colours, pale where the map does not reach; the lowest and
        the highest score on it, which are the ends of the colour scale.
    """
    x0, y0, x1, y1 = clamp(seen_box, photo.size)
    left, top = min(round(x0), photo.width - 1), min(round(y0), photo.height - 1)
    right, bottom = max(round(x1), left + 1), max(round(y1), top + 1)
    rows, columns = scores.shape

    def cells(
        low: float, high: float, start: float, end: float, number: int
    ) -> tuple[float, float]:
        """From pixels to the map's cells; never empty, never outside."""
        scale = number / (end - start)
        first = min(max((low - start) * scale, 0), number - 1e-3)
        return first, min(max((high - start) * scale, first + 1e-3), number)

    u0, u1 = cells(left, right, seen_box[0], seen_box[2], columns)
    v0, v1 = cells(top, bottom, seen_box[1], seen_box[3], rows)
    part = scores[math.floor(v0) : math.ceil(v1), math.floor(u0) : math.ceil(u1)]
    finite = part[np.isfinite(part)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    clean = np.clip(np.where(np.isfinite(scores), scores, low), low, high).astype(np.float32)
    smooth = Image.fromarray(clean).resize(
        (right - left, bottom - top), Image.Resampling.BILINEAR, box=(u0, v0, u1, v1)
    )
    share = (np.asarray(smooth) - low) / (high - low) if high > low else np.zeros(smooth.size[::-1])
    grey = photo.convert("L").convert("RGB")
    result = Image.blend(grey, Image.new("RGB", photo.size, PAPER), 0.55)
    inside = grey.crop((left, top, right, bottom))
    result.paste(Image.blend(inside, Image.fromarray(_colours(share)), HEAT_SHARE), (left, top))
    if (right - left, bottom - top) != photo.size:
        frame = (left, top, right - 1, bottom - 1)
        ImageDraw.Draw(result).rectangle(frame, outline=INK, width=max(photo.width // 200, 1))
    return result, low, high


def _score_map(call: CallRecord) -> NDArray[np.float32] | None:
    if call.scores is None or call.grid_hw is None:
        return None
    if len(call.scores) != math.prod(call.grid_hw) or not call.scores:
        raise PromptError(
            f"the trace holds {len(call.scores)} scores for a grid of "
            f"{call.grid_hw[0]}x{call.grid_hw[1]}; expected one per place"
        )
    return np.asarray(call.scores, dtype=np.float32).reshape(call.grid_hw)


def _colours(share: NDArray[Any]) -> NDArray[np.uint8]:
    """Viridis of values in [0, 1], ``[H, W]`` to ``[H, W, 3]``."""
    steps = np.linspace(0, 1, len(VIRIDIS))
    table = np.asarray(VIRIDIS, dtype=np.float64)
    mixed = [np.interp(share, steps, table[:, channel]) for channel in range(3)]
    return np.stack(mixed, axis=-1).round().astype(np.uint8)


def _given_images(trace: Trace, images: Sequence[Image.Image] | None) -> list[Image.Image]:
    """The given images as RGB, from the caller or from thumbnails, each checked."""
    records = [record for record in trace.images if record.parent is None]
    if images is None:
        images = [_thumbnail(record.thumbnail, record.source) for record in records]
    if len(images) < len(records):
        raise ImageError(f"the trace has {len(records)} given images, but {len(images)} came")
    for record, image in zip(records, images, strict=False):
        width, height = record.size_wh
        # Half a pixel of rounding on either side, in a picture of any size.
        if abs(image.width * height - image.height * width) > 1.5 * max(width, height):
            raise ImageError(
                f"expected {_base_name(record.source)} of {width}x{height}, at any scale; got an "
                f"image of {image.width}x{image.height}; pass the given images in order"
            )
    return [image.convert("RGB") for image in images[: len(records)]]


def _thumbnail(uri: str | None, source: str) -> Image.Image:
    if uri is None:
        raise ImageError(
            f"the trace holds no picture of {_base_name(source)}; pass images=, or save traces "
            "after keep_thumbnails()"
        )
    head, _, body = uri.partition(";base64,")
    try:
        if not head.startswith("data:image/"):
            raise ValueError("expected a data URI")
        return load_image(base64.b64decode(body, validate=True)).pixels
    except (binascii.Error, ValueError) as exc:
        raise ImageError(f"the thumbnail of {_base_name(source)} is damaged: {exc}") from exc


@cache
def _released_preprocess() -> dict[str, dict[str, Any]]:
    """The branches' own tables, imported late because transformers comes with them."""
    from branches import dino, sam

    return {"dino": dino.RELEASED_PREPROCESS, "sam": sam.RELEASED_PREPROCESS}


def _resized(size_wh: tuple[int, int], settings: Mapping[str, Any]) -> tuple[int, int]:
    """Size after a branch's resizing, rounded as transformers does."""
    width, height = size_wh
    size = settings.get("size")
    if not settings.get("do_resize", True) or not size:
        return size_wh
    if "shortest_edge" in size:
        short, edge = min(width, height), size["shortest_edge"]
        return max(edge * width // short, 1), max(edge * height // short, 1)
    if "longest_edge" in size:
        scale = size["longest_edge"] / max(width, height)
        return max(int(width * scale + 0.5), 1), max(int(height * scale + 0.5), 1)
    return _sides(size)


def _sides(size: Mapping[str, int] | int) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size["width"], size["height"])


def _fit(size_wh: tuple[int, int], room_wh: tuple[int, int]) -> tuple[int, int]:
    """Largest size of the same shape within the room; what is tiny grows 64-fold at most."""
    scale = min(room_wh[0] / size_wh[0], room_wh[1] / size_wh[1], 64)
    return max(round(size_wh[0] * scale), 1), max(round(size_wh[1] * scale), 1)


def _resize(image: Image.Image, size_wh: tuple[int, int]) -> Image.Image:
    if size_wh[0] > 4 * image.width:  # show the pixels as they are
        return image.resize(size_wh, Image.Resampling.NEAREST)
    return image.resize(size_wh, Image.Resampling.LANCZOS, reducing_gap=3)


def _paste_centred(block: Image.Image, picture: Image.Image, room_wh: tuple[int, int]) -> None:
    shown = _resize(picture, _fit(picture.size, room_wh))
    block.paste(shown, ((room_wh[0] - shown.width) // 2, (room_wh[1] - shown.height) // 2))


def _colour(index: int) -> str:
    return CALL_COLOURS[index % len(CALL_COLOURS)]


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def _ordered(box: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """At least one pixel, ends included."""
    x0, y0, x1, y1 = box
    return x0, y0, max(x0, x1), max(y0, y1)


def _grown(box: tuple[int, int, int, int], by: int) -> tuple[int, int, int, int]:
    x0, y0, x1, y1 = box
    return x0 - by, y0 - by, x1 + by, y1 + by


def _touch(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _span(low: int, high: int) -> str:
    return str(low) if low == high else f"{low}-{high}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _base_name(source: str) -> str:
    return source.replace("\\", "/").rstrip("/").rpartition("/")[2] or source


def _is_harmless(char: str) -> bool:
    if char in "\n\t":
        return True
    # Controls, lone surrogates, and the marks that turn text around (UAX 9).
    is_turning = "\u202a" <= char <= "\u202e" or "\u2066" <= char <= "\u2069"
    return unicodedata.category(char) not in ("Cc", "Cs") and not is_turning


def _escape(char: str) -> str:
    return f"\\x{ord(char):02x}" if ord(char) < 256 else f"\\u{ord(char):04x}"


# Text on paper


def _wrap(text: str, size: int, width: int, max_lines: int) -> list[str]:
    """Break text into lines that fit; what does not find place becomes an ellipsis."""
    room = max_lines * max(width // max(size // 4, 1), 1)  # more than this never fits
    lines: list[str] = []
    for paragraph in printable(text[:room]).expandtabs(4).strip().split("\n"):
        lines += _wrap_paragraph(paragraph, size, width)
        if len(lines) > max_lines:
            break
    if len(lines) > max_lines or len(text) > room:
        lines = lines[:max_lines]
        while lines[-1] and _length(lines[-1] + "…", size) > width:
            lines[-1] = lines[-1][:-1]
        lines[-1] += "…"
    return lines


def _wrap_paragraph(paragraph: str, size: int, width: int) -> list[str]:
    lines, line = [], ""
    for word in paragraph.split(" "):
        longer = f"{line} {word}" if line else word
        if _length(longer, size) <= width:
            line = longer
            continue
        if line:
            lines.append(line)
        line = word
        while _length(line, size) > width and len(line) > 1:  # a word wider than the paper
            fitting = _num_fitting(line, size, width)
            lines.append(line[:fitting])
            line = line[fitting:]
    return [*lines, line]


def _num_fitting(text: str, size: int, width: int) -> int:
    low, high = 1, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if _length(text[:middle], size) <= width else (low, middle - 1)
    return low


def _write(
    pen: ImageDraw.ImageDraw, baseline_xy: tuple[float, float], text: str, size: int, fill: str
) -> None:
    """Write one line; every character in the first font that has it."""
    x, y = baseline_xy
    for font, run in _runs(text, size):
        pen.text((x, y), run, fill=fill, font=font, anchor="ls")
        x += font.getlength(run)


def _length(text: str, size: int) -> float:
    return sum(font.getlength(run) for font, run in _runs(text, size))


def _runs(text: str, size: int) -> list[tuple[ImageFont.FreeTypeFont, str]]:
    """Cut text where the font must change."""
    fonts = _fonts(size)
    runs: list[tuple[int, str]] = []
    for char in text:
        choice = 0 if char.isascii() else _font_with(char)
        if runs and runs[-1][0] == choice:
            runs[-1] = (choice, runs[-1][1] + char)
        else:
            runs.append((choice, char))
    return [(fonts[choice], run) for choice, run in runs]


@lru_cache(maxsize=64)
def _fonts(size: int) -> tuple[ImageFont.FreeTypeFont, ...]:
    own = ImageFont.load_default(size)
    assert isinstance(own, ImageFont.FreeTypeFont)  # always so when a size is given
    return (own, *(ImageFont.truetype(name, size) for name in _fallback_names()))


@cache
def _fallback_names() -> tuple[str, ...]:
    return tuple(name for name in FALLBACK_FONTS if _is_installed(name))


def _is_installed(name: str) -> bool:
    try:
        ImageFont.truetype(name, 16)
    except OSError:
        return False
    return True


@lru_cache(maxsize=4096)
def _font_with(char: str) -> int:
    """Index of the first font that has a character; of the first if none has it."""
    for index, font in enumerate(_fonts(16)):
        if _glyph(font, char) != _glyph(font, "\U0010ffff"):  # a code point that no font has
            return index
    return 0


def _glyph(font: ImageFont.FreeTypeFont, char: str) -> tuple[tuple[int, int], bytes]:
    mask = font.getmask(char)
    return mask.size, bytes(mask)
