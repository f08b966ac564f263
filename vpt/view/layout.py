"""Draw a trace so that a person can read it.

The picture has four parts, one under the other: what was asked; the images with every region the
model named and every box it wrote, and beside them one panel per call with what it brought and
one per depth map it wrote; the answer; the numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from PIL import Image, ImageOps

from vpt.trace.records import Trace
from vpt.view.album import Album, base_name, fitted
from vpt.view.lettering import INK, PAPER, QUIET, SHADE, Text, set_text
from vpt.view.marks import boxes_on, draw_marks, marks_on
from vpt.view.panels import FAULT_INK, GAP, draw_panels, grid, num_panels
from vpt.view.wording import STOP_WORDS, count_words, printable

WIDTH = 1200
PAD = 28
INNER = WIDTH - 2 * PAD
HALF, QUARTER = (INNER - GAP) // 2, (INNER - 3 * GAP) // 4
MOST_MALFORMED = 20  # listed one by one

TITLE_PAPER, TITLE_INK, TITLE_QUIET = INK, PAPER, "#a9b4c4"
FAULT_PAPER = "#fde8e6"


def draw(trace: Trace, images: Sequence[Image.Image] | None = None) -> Image.Image:
    """Draw a trace.

    Args:
        trace: of one run. Where it does not tell the size of the region grid or the branches'
            preprocessing, the released ones are assumed.
        images: the given images, in order, at any size; by default the trace's thumbnails. Crops
            need not be among them: they are cut out again.

    Returns:
        RGB, 1200 pixels wide and as tall as it takes.

    Raises:
        ImageError: if an image is missing, damaged or not the one of the trace.
        PromptError: if score maps do not fit their grids.
    """
    album = Album(trace, images)
    return grid([_title(trace), *_body(album), *_end(trace)], 1, gap=0)


def _title(trace: Trace) -> Image.Image:
    """What was asked, and of whom."""
    model = trace.model.get("name") or "unnamed model"
    under = f"{model}  ·  perception: {trace.perception}"
    return _banner(
        [Text(trace.question, 26, TITLE_INK, 12), Text(under, 15, TITLE_QUIET, 2)], TITLE_PAPER
    )


def _body(album: Album) -> Iterator[Image.Image]:
    """Images and panels: side by side where the shape of the images allows it."""
    number = num_panels(album)
    if album.given and number and max(i.width / i.height for i in album.given.values()) <= 2.2:
        photos = _photos(album, HALF, 600, columns=min(len(album.given), 2))
        width, columns = (HALF, 1) if number == 1 else (QUARTER, 2)
        cells = draw_panels(album, width)
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
        yield _framed(grid(draw_panels(album, (INNER - GAP * (columns - 1)) // columns), columns))


def _end(trace: Trace) -> Iterator[Image.Image]:
    """The answer, what went wrong, and the numbers."""
    yield Image.new("RGB", (WIDTH, 16), PAPER)
    answer = Text(trace.answer, 22, INK, 60) if trace.answer.strip() else Text("(nothing)", 22)
    yield _banner([Text("Answer", 14), answer], SHADE)
    if trace.malformed:
        said = [f"turn {m.turn + 1}: {m.text}  ({m.reason})" for m in trace.malformed]
        if len(said) > MOST_MALFORMED:
            said[MOST_MALFORMED:] = [f"… and {len(said) - MOST_MALFORMED} more"]
        head = Text("Malformed calls, read as text", 14, FAULT_INK)
        yield _banner([head, *(Text(one, 15, FAULT_INK, 3) for one in said)], FAULT_PAPER)
    counts = trace.counts
    numbers = (
        f"end: {STOP_WORDS.get(trace.stop_reason, trace.stop_reason or 'not ended')}",
        f"{counts.prompt_tokens} prompt + {counts.appended_tokens} appended + "
        f"{counts.generated_tokens} generated tokens",
        count_words(len(trace.calls), "call"),
        f"{trace.timings.total:,.0f} ms",
    )
    yield _banner([Text("  ·  ".join(numbers), 15, QUIET, 4)], PAPER)


def _photos(album: Album, width: int, max_height: int, columns: int) -> Image.Image:
    cell = (width - GAP * (columns - 1)) // columns
    return grid([_photo(album, i, cell, max_height) for i in album.given], columns)


def _photo(album: Album, index: int, width: int, max_height: int) -> Image.Image:
    """One given image, its regions, and a line of words."""
    record = album.trace.images[index]
    marks, boxes = marks_on(album, index), boxes_on(album, index)
    words = [f"image {album.number(index)}", printable(base_name(record.source))]
    words += [f"{record.size_wh[0]}x{record.size_wh[1]}", f"{record.num_tokens} tokens"]
    texts = [Text("  ·  ".join(words), 14, QUIET, 2)]
    if marks:
        key = "tinted: the cells it named; outlined: what was cut out, one cell wider"
        texts.append(Text(key, 14, QUIET, 2))
    if boxes:
        names = dict.fromkeys((boxes[0].words, boxes[-1].words))
        texts.append(Text(f"{' to '.join(names)}: written by the model", 14, QUIET, 2))
    shown = fitted(album.given[index], (width, max_height))
    left = (width - shown.width) // 2
    row = Image.new("RGB", (width, shown.height), PAPER)
    row.paste(shown, (left, 0))
    block = grid([row, set_text(texts, width, centred=True)], 1, gap=8)
    draw_marks(block, [*marks, *boxes], record.size_wh, (left, 0, left + shown.width, shown.height))
    return block


# Paper


def _banner(texts: Sequence[Text], paper: str) -> Image.Image:
    return set_text(texts, WIDTH, margin_xy=(PAD, 16), paper=paper)


def _framed(content: Image.Image) -> Image.Image:
    return ImageOps.expand(content, (PAD, PAD, PAD, 8), PAPER)
