"""Draw a trace as one picture that a person can read.

Its parts from top to bottom: the question; the images with every region and box that the model
wrote, and beside them one panel per call and depth map; the answer; the numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from PIL import Image, ImageDraw, ImageOps

from vpt.protocol.tokens import BRANCH_TOKENS
from vpt.trace.records import CallRecord, ContentRecord, ImageRecord, Trace
from vpt.view.lettering import INK, PAPER, QUIET, SHADE, Text, latin_font, set_text
from vpt.view.renderers import (
    CHIP_HEIGHT,
    Album,
    base_name,
    boxes_legend,
    call_colour,
    chip_width,
    colour_bar,
    draw_chip,
    draw_look,
    marked_photo,
    marks_on,
    seen_of_call,
    why_no_map,
)
from vpt.view.wording import (
    OUTCOME_TEXT,
    STOP_TEXT,
    call_facts,
    call_text,
    content_text,
    count_text,
    is_given,
    printable,
    seen_text,
    tokens_text,
)

WIDTH, PAD, GAP, BAR_HEIGHT = 1200, 28, 20, 30
INNER = WIDTH - 2 * PAD
HALF, QUARTER = (INNER - GAP) // 2, (INNER - 3 * GAP) // 4
MOST_MALFORMED = 20  # listed one by one

TITLE_PAPER, TITLE_INK, TITLE_QUIET = INK, PAPER, "#a9b4c4"
FAULT_PAPER, FAULT_INK, LINE = "#fde8e6", "#8c1d18", "#d5dae1"


def draw(trace: Trace, images: Sequence[Image.Image] | None = None) -> Image.Image:
    """Draw a trace, with the released grid size and preprocessing where it does not hold them.

    Args:
        images: the given images, in order, at any size; by default the trace's thumbnails. Crops
            are not needed: they are cut out again.

    Returns:
        RGB, 1200 pixels wide and as tall as needed.

    Raises:
        ImageError: if an image is missing, damaged or not the one of the trace.
        PromptError: if score maps do not fit their grids.
    """
    album = Album(trace, images)
    return grid([_title(trace), *_body(album), *_end(trace)], 1, gap=0)


def _title(trace: Trace) -> Image.Image:
    under = f"{trace.model.get('name') or 'unnamed model'}  ·  perception: {trace.perception}"
    return _banner(
        [Text(trace.question, 26, TITLE_INK, 12), Text(under, 15, TITLE_QUIET, 2)], TITLE_PAPER
    )


def _body(album: Album) -> Iterator[Image.Image]:
    """Images and panels: side by side where the shape of the images allows it."""
    shown = shown_in_panels(album.trace)
    number = len(shown)
    if album.given and number and max(i.width / i.height for i in album.given.values()) <= 2.2:
        photos = _photos(album, HALF, 600, columns=min(len(album.given), 2))
        width, columns = (HALF, 1) if number == 1 else (QUARTER, 2)
        cells = [_panel(album, one, width) for one in shown]
        # Half a row more than the images are high looks better than one row under them.
        num_rows = max(round((photos.height + GAP) / (cells[0].height + GAP)), 1)
        beside = grid(cells[: num_rows * columns], columns)
        yield _framed(grid([photos, beside], 2))
        if rest := cells[num_rows * columns :]:
            yield _framed(grid(rest, 4))
        return
    if album.given:
        yield _framed(_photos(album, INNER, 460, columns=min(len(album.given), 4)))
    if number:
        columns = max(2, min(4, number)) if album.given else 3
        width = (INNER - GAP * (columns - 1)) // columns
        yield _framed(grid([_panel(album, one, width) for one in shown], columns))


def _end(trace: Trace) -> Iterator[Image.Image]:
    """The answer, what went wrong, and the numbers."""
    yield Image.new("RGB", (WIDTH, 16), PAPER)
    if trace.warnings:
        yield _banner([Text(one, 16, FAULT_INK, 4) for one in trace.warnings], FAULT_PAPER)
    answer = Text(trace.answer, 22, INK, 60) if trace.answer.strip() else Text("(nothing)", 22)
    yield _banner([Text("Answer", 14), answer], SHADE)
    if trace.malformed:
        listed = [f"turn {m.turn + 1}: {m.text}  ({m.reason})" for m in trace.malformed]
        if len(listed) > MOST_MALFORMED:
            listed[MOST_MALFORMED:] = [f"… and {len(listed) - MOST_MALFORMED} more"]
        head = Text("Malformed calls, read as text", 14, FAULT_INK)
        yield _banner([head, *(Text(one, 15, FAULT_INK, 3) for one in listed)], FAULT_PAPER)
    numbers = (
        f"end: {STOP_TEXT.get(trace.stop_reason, trace.stop_reason or 'not ended')}",
        tokens_text(trace.counts),
        count_text(len(trace.calls), "call"),
        f"{trace.timings.total:,.0f} ms",
    )
    yield _banner([Text("  ·  ".join(numbers), 15, QUIET, 4)], PAPER)


def _photos(album: Album, width: int, max_height: int, columns: int) -> Image.Image:
    cell = (width - GAP * (columns - 1)) // columns
    return grid([_photo(album, i, cell, max_height) for i in album.given], columns)


def _photo(album: Album, index: int, width: int, max_height: int) -> Image.Image:
    """One given image with its marks, above a line of text."""
    record, marks = album.trace.images[index], marks_on(album, index)
    facts = [f"image {album.number(index)}", printable(base_name(record.source))]
    facts += [f"{record.size_wh[0]}x{record.size_wh[1]}", f"{record.num_tokens} tokens"]
    texts = [Text("  ·  ".join(facts), 14, QUIET, 2)]
    if any(mark.kind == "region" for mark in marks):
        key = "tinted: the cells it named; outlined: what was cut out, one cell wider"
        texts.append(Text(key, 14, QUIET, 2))
    if boxes := boxes_legend(marks):
        texts.append(Text(boxes, 14, QUIET, 2))
    shown = marked_photo(album, index, (width, max_height))
    row = Image.new("RGB", (width, shown.height), PAPER)
    row.paste(shown, ((width - shown.width) // 2, 0))
    return grid([row, set_text(texts, width, centred=True)], 1, gap=8)


# --- panels -----------------------------------------------------------------------------------


Shown = CallRecord | ContentRecord | ImageRecord


def shown_in_panels(trace: Trace) -> list[tuple[int, Shown]]:
    """The first look at a single image that was shrunk, depth maps, and calls.

    Calls have their numbers, the others 0; after the first look the order is that of the turns.
    """
    given = [image for image in trace.images if image.parent is None]
    first: list[tuple[int, Shown]] = []
    if len(given) == 1 and (seen_wh := given[0].seen_wh) and seen_wh[0] < given[0].size_wh[0]:
        first.append((0, given[0]))
    rest: list[tuple[int, CallRecord | ContentRecord]] = [*enumerate(trace.calls, 1)]
    rest += [(0, one) for one in trace.content if one.kind == "depth"]
    rest.sort(key=lambda one: (one[1].turn, one[0] > 0))
    return [*first, *rest]


def _panel(album: Album, numbered: tuple[int, Shown], width: int) -> Image.Image:
    """The first look, the result of a call, or a depth map, above its legend."""
    number, one = numbered
    if isinstance(one, ImageRecord):
        why, legend = (
            "",
            set_text(
                [Text("first look", 17, INK), Text(f"all that it saw: {seen_text(one)}", 14)], width
            ),
        )
    elif isinstance(one, CallRecord):
        why = "" if one.outcome == "executed" else OUTCOME_TEXT.get(one.outcome, one.outcome)
        legend = _call_legend(album, number, one, width)
    else:
        why, legend = why_no_map(one), _map_legend(album, one, width)
    area = _empty_area(album, width)
    if why:
        _write_centred(area, why)
    else:
        _paste_look(album, one, area)
    ImageDraw.Draw(area).rectangle((0, 0, area.width - 1, area.height - 1), outline=LINE)
    return grid([area, legend], 1, gap=10)


def _paste_look(album: Album, one: Shown, area: Image.Image) -> None:
    """Fill an area with the first look, a crop, or a map above its colour bar."""
    if isinstance(one, ImageRecord):
        seen = album.as_seen(next(iter(album.given)), area.size)
        area.paste(seen, ((area.width - seen.width) // 2, (area.height - seen.height) // 2))
        return
    is_crop = isinstance(one, CallRecord) and one.box_xyxy_px is not None
    room = area.height - (0 if is_crop else BAR_HEIGHT)
    look = draw_look(album, one, (area.width, room))
    area.paste(
        look.picture, ((area.width - look.picture.width) // 2, (room - look.picture.height) // 2)
    )
    if look.ends is not None:
        area.paste(colour_bar(look.ends, (area.width, BAR_HEIGHT)), (0, room))
    elif not is_crop:
        bar = Image.new("RGB", (area.width, BAR_HEIGHT), SHADE)
        _write_centred(bar, look.note)
        area.paste(bar, (0, room))


def _call_legend(album: Album, number: int, call: CallRecord, width: int) -> Image.Image:
    chip = str(number)
    left = chip_width(chip) + 9
    head = Image.new("RGB", (width, CHIP_HEIGHT + 2), PAPER)
    head.paste(set_text([Text(call_text(call), 17, INK)], width - left), (left, 0))
    draw_chip(ImageDraw.Draw(head), chip, call_colour(number), (0, 0))
    fill, facts = FAULT_INK, OUTCOME_TEXT.get(call.outcome, call.outcome)
    if call.outcome == "executed":
        siblings = sum(other.turn == call.turn for other in album.trace.calls)
        fill, facts = QUIET, call_facts(call, siblings)
    texts = [Text(facts, 14, fill), Text(_place_text(album, call), 14)]
    shown = None if call.result_image is None else album.trace.images[call.result_image]
    if shown is not None and shown.object_share is not None:
        texts.append(Text(f"object {shown.object_share:.0%}, the rest dimmed", 14))
    if is_given(album.trace, call):
        texts.append(Text("given with the question; not the model's choice", 14, QUIET, 2))
    below = set_text(texts, width)
    return grid([head, below], 1, gap=0)


def _place_text(album: Album, call: CallRecord) -> str:
    """The place of a call: a box, or an image."""
    record, number = album.trace.images[call.image], album.number(call.image)
    if (box := call.box_xyxy_px or record.box_xyxy_px) is not None:
        return f"box {', '.join(map(str, box))} of image {number}"
    text, (width, height) = f"image {number}", record.size_wh
    if call.outcome == "executed" and call.branch in BRANCH_TOKENS:
        x0, y0, x1, y1 = seen_of_call(album.trace, call)
        if x1 - x0 < width - 1 or y1 - y0 < height - 1:
            text += ", the framed part"
    return text + (", known features" if call.reused else "")


def _map_legend(album: Album, one: ContentRecord, width: int) -> Image.Image:
    facts = f"{count_text(one.end - one.start, 'token')}  ·  {one.ms:,.0f} ms"
    texts = [
        Text(content_text(one), 17, INK, 2),
        Text(f"written  ·  {facts}", 14, QUIET if one.is_whole else FAULT_INK, 2),
        Text(f"of image {album.number(one.image)}, by the model's account", 14),
    ]
    return set_text(texts, width)


# --- paper ------------------------------------------------------------------------------------


def _banner(texts: Sequence[Text], paper: str) -> Image.Image:
    return set_text(texts, WIDTH, margin_xy=(PAD, 16), paper=paper)


def _framed(content: Image.Image) -> Image.Image:
    return ImageOps.expand(content, (PAD, PAD, PAD, 8), PAPER)


def _empty_area(album: Album, width: int) -> Image.Image:
    """An empty panel, in about the shape of the first image."""
    first = next(iter(album.given.values()), None)
    shape = min(max(first.height / first.width, 0.6), 1.0) if first else 0.75
    return Image.new("RGB", (width, round(width * shape)), SHADE)


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


def _write_centred(area: Image.Image, text: str) -> None:
    pen, centre = ImageDraw.Draw(area), (area.width / 2, area.height / 2)
    pen.text(centre, printable(text), QUIET, latin_font(16), anchor="mm")
