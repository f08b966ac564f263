"""What small models drew before they answered, beside what is there, on one picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from vpt.boxes import rescale
from vpt.depth.maps import Floats, fit_map, read_map
from vpt.depth.tokenizer import DepthTokenizer
from vpt.images import load_image
from vpt.protocol.tokens import RELEASED_PIXELS
from vpt.runtime import Answer
from vpt.view.lettering import INK, PAPER, latin_font
from vpt.view.renderers import coloured

_NUM_COLUMNS = 8
_SIDE_PX = 160
_GAP_PX = 4
_LABEL_PX = 92
_WORDS_PX = 22
_TRUE, _WRITTEN = "#1fa34a", "#e0245e"


def draw_maps(
    entries: Sequence[Mapping[str, Any]],
    answers: Sequence[Answer],
    folder: Path,
    tokenizer: DepthTokenizer,
) -> Image.Image:
    """Marked pictures, their true maps, what codes keep of these, and the written maps.

    Args:
        entries: questions, each with ``image``, ``map`` and ``answer``.
        answers: to them.
        folder: in which their paths are.
        tokenizer: of the maps.
    """
    columns = []
    for entry, answer in _some(entries, answers):
        codes = answer.trace.map_codes
        written = tokenizer.decode(codes) if codes else None
        maps = [*true_maps(entry, folder, tokenizer), written]
        drawn = [_photo(folder / entry["image"]), *map(_map, maps)]
        columns.append((drawn, _verdict(answer.text, entry["answer"])))
    return _sheet(("asked", "true", "its codes", "written"), columns)


def draw_boxes(
    entries: Sequence[Mapping[str, Any]], answers: Sequence[Answer], folder: Path
) -> Image.Image:
    """Pictures with the true boxes in green, and with the written ones in red.

    Args:
        entries: questions, each with ``image``, ``boxes`` and ``answer``.
        answers: to them.
        folder: in which their paths are.
    """
    columns = []
    for entry, answer in _some(entries, answers):
        photo = _photo(folder / entry["image"])
        drawn = [
            _boxes(photo, entry["boxes"], _TRUE),
            _boxes(photo, written_boxes(answer), _WRITTEN),
        ]
        columns.append((drawn, _verdict(answer.text, entry["answer"])))
    return _sheet(("true", "written"), columns)


def true_maps(
    entry: Mapping[str, Any], folder: Path, tokenizer: DepthTokenizer
) -> tuple[Floats, Floats]:
    """The depth of a question's photo, and what its codes keep of it, in the same size."""
    true = fit_map(read_map(folder / entry["map"]), tokenizer.config.size_px)
    return true, tokenizer.decode(tokenizer.encode(true))


def written_boxes(answer: Answer) -> list[Sequence[int]]:
    """All boxes that the model wrote, XYXY on the grid of its box tokens."""
    return [box for one in answer.trace.content for box in one.boxes or ()]


def _some(
    entries: Sequence[Mapping[str, Any]], answers: Sequence[Answer]
) -> list[tuple[Mapping[str, Any], Answer]]:
    return list(zip(entries, answers, strict=True))[:_NUM_COLUMNS]


def _verdict(text: str, expected: str) -> str:
    said = text.rstrip(" .").rsplit(" ", 1)[-1] or "nothing"
    return f"says {said[:8]}, is {expected}"


def _photo(file: Path) -> Image.Image:
    return load_image(file).pixels.resize((_SIDE_PX, _SIDE_PX), Image.Resampling.LANCZOS)


def _map(depth: Floats | None) -> Image.Image:
    if depth is None:
        return Image.new("RGB", (_SIDE_PX, _SIDE_PX), "lightgrey")
    return coloured(depth).resize((_SIDE_PX, _SIDE_PX), Image.Resampling.BOX)


def _boxes(photo: Image.Image, boxes: Sequence[Sequence[int]], colour: str) -> Image.Image:
    photo = photo.copy()
    pen = ImageDraw.Draw(photo)
    for left, top, right, bottom in boxes:
        side = (RELEASED_PIXELS, RELEASED_PIXELS)
        placed = rescale((left, top, right, bottom), side, photo.size)
        pen.rectangle(placed, outline=colour, width=2)
    return photo


def _sheet(names: Sequence[str], columns: Sequence[tuple[list[Image.Image], str]]) -> Image.Image:
    step = _SIDE_PX + _GAP_PX
    size_wh = (_LABEL_PX + len(columns) * step, len(names) * step + _WORDS_PX)
    picture = Image.new("RGB", size_wh, PAPER)
    pen, font = ImageDraw.Draw(picture), latin_font(14)
    for row, name in enumerate(names):
        pen.text((6, row * step + _SIDE_PX // 2), name, INK, font, anchor="lm")
    for column, (drawn, words) in enumerate(columns):
        left = _LABEL_PX + column * step
        for row, one in enumerate(drawn):
            picture.paste(one, (left, row * step))
        pen.text((left, len(names) * step + 2), words, INK, font)
    return picture
