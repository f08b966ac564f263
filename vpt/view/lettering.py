"""Set text on paper: in lines that fit, each character in a font that has it."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import groupby

from PIL import Image, ImageDraw, ImageFont

from vpt.view.wording import printable

INK, QUIET, PAPER, SHADE = "#1b2430", "#66707f", "#ffffff", "#f1f3f6"

# Pillow's own font has Latin letters only. Others are taken where the system has them.
FALLBACK_FONTS = (
    *("DejaVuSans.ttf", "NotoSans-Regular.ttf", "NotoSansCJK-Regular.ttc", "arialuni.ttf"),
    *("msyh.ttc", "Arial Unicode.ttf", "PingFang.ttc", "NotoEmoji-Regular.ttf", "seguisym.ttf"),
)


@dataclass(frozen=True)
class Text:
    """Text of one size in pixels; what exceeds ``max_lines`` ends in an ellipsis."""

    text: str
    size: int
    fill: str = QUIET
    max_lines: int = 1


def set_text(
    texts: Sequence[Text],
    width: int,
    *,
    margin_xy: tuple[int, int] = (0, 0),
    paper: str = PAPER,
    centred: bool = False,
) -> Image.Image:
    """Set texts one under the other: an RGB image, ``width`` wide and as tall as needed."""
    margin, top = margin_xy
    lines = [(line, text) for text in texts for line in _wrap(text, width - 2 * margin)]
    height = sum(_line_height(text) for _, text in lines)
    block = Image.new("RGB", (width, height + 2 * top), paper)
    pen = ImageDraw.Draw(block)
    for line, text in lines:
        left = max((width - _length(line, text.size)) / 2, 0) if centred else float(margin)
        for font, run in _runs(line, text.size):
            pen.text((left, top + text.size * 1.05), run, fill=text.fill, font=font, anchor="ls")
            left += font.getlength(run)
        top += _line_height(text)
    return block


def latin_font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font, which is always there."""
    return _fonts(size)[0]


def _line_height(text: Text) -> int:
    return round(text.size * 1.42)


def _wrap(text: Text, width: int) -> list[str]:
    """Break text into lines that fit."""
    most = max(4 * width // text.size, 1)  # more characters than this never fit a line
    whole = printable(text.text[: text.max_lines * most]).expandtabs(4).strip()
    lines: list[str] = []
    for paragraph in whole.split("\n"):
        if len(lines) > text.max_lines:
            break
        lines += _wrap_paragraph(paragraph, text.size, width, most)
    if len(lines) > text.max_lines or len(text.text) > text.max_lines * most:
        lines = lines[: text.max_lines]
        while lines[-1] and _length(lines[-1] + "…", text.size) > width:
            lines[-1] = lines[-1][:-1]
        lines[-1] += "…"
    return lines


def _wrap_paragraph(rest: str, size: int, width: int, most: int) -> list[str]:
    """Break at the last space that fits, or in the middle of a word wider than the paper."""
    lines: list[str] = []
    while True:
        ends = range(1, min(len(rest), most) + 1)
        fitting = bisect_right(ends, width, key=lambda end: math.ceil(_length(rest[:end], size)))
        end = max(fitting, 1)
        if end >= len(rest):
            return [*lines, rest]
        space = rest.rfind(" ", 1, end + 1)
        end = space if space > 0 else end
        lines.append(rest[:end])
        rest = rest[end:].lstrip(" ")


def _length(text: str, size: int) -> float:
    return sum(font.getlength(run) for font, run in _runs(text, size))


def _runs(text: str, size: int) -> list[tuple[ImageFont.FreeTypeFont, str]]:
    """Cut text where the font must change."""
    return [(_fonts(size)[choice], "".join(run)) for choice, run in groupby(text, _font_with)]


@lru_cache(maxsize=64)
def _fonts(size: int) -> tuple[ImageFont.FreeTypeFont, ...]:
    own = ImageFont.load_default(size)
    assert isinstance(own, ImageFont.FreeTypeFont)  # always so when a size is given
    return (own, *(ImageFont.truetype(name, size) for name in _installed_fonts()))


@cache
def _installed_fonts() -> list[str]:
    installed = []
    for name in FALLBACK_FONTS:
        with suppress(OSError):
            ImageFont.truetype(name, 16)
            installed.append(name)
    return installed


@lru_cache(maxsize=4096)
def _font_with(char: str) -> int:
    """Index of the first font that has a character; of the first if none has it."""
    if char.isascii():
        return 0
    for index, font in enumerate(_fonts(16)):
        if _glyph(font, char) != _glyph(font, "\U0010ffff"):  # a code point that no font has
            return index
    return 0


def _glyph(font: ImageFont.FreeTypeFont, char: str) -> tuple[tuple[int, int], bytes]:
    mask = font.getmask(char)
    return mask.size, bytes(mask)
