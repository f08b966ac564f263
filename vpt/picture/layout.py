"""Draw a trace so that a person can read it.

The picture has four parts, one under the other: what was asked; the images with every region the
model named, and beside them one panel per call with what it brought; the answer; the numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageOps

from vpt.boxes import rescale
from vpt.picture.album import Album, base_name, fitted
from vpt.picture.heat import colour_bar, heat_over, score_map, seen_of_call
from vpt.picture.lettering import INK, PAPER, QUIET, SHADE, Text, latin_font, set_text
from vpt.picture.marks import CHIP_HEIGHT, call_colour, chip_width, draw_chip, draw_marks, marks_on
from vpt.tokens import BRANCH_TOKENS
from vpt.trace import CallRecord, Trace
from vpt.wording import OUTCOME_WORDS, STOP_WORDS, call_words, count_words, printable

WIDTH = 1200
PAD, GAP = 28, 20
INNER = WIDTH - 2 * PAD
HALF, QUARTER = (INNER - GAP) // 2, (INNER - 3 * GAP) // 4
BAR_HEIGHT = 30
MOST_MALFORMED = 20  # listed one by one

LINE = "#d5dae1"
TITLE_PAPER, TITLE_INK, TITLE_QUIET = INK, PAPER, "#a9b4c4"
FAULT_PAPER, FAULT_INK = "#fde8e6", "#8c1d18"


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
    return _grid([_title(trace), *_body(album), *_end(trace)], 1, gap=0)


def _title(trace: Trace) -> Image.Image:
    """What was asked, and of whom."""
    model = trace.model.get("name") or "unnamed model"
    under = f"{model}  ·  perception: {trace.perception}"
    return _banner(
        [Text(trace.question, 26, TITLE_INK, 12), Text(under, 15, TITLE_QUIET, 2)], TITLE_PAPER
    )


def _body(album: Album) -> Iterator[Image.Image]:
    """Images and panels: side by side where the shape of the images allows it."""
    numbered = list(enumerate(album.trace.calls, 1))

    def panels(width: int) -> list[Image.Image]:
        return [_Panel(album, number, call, width).draw() for number, call in numbered]

    if album.given and numbered and max(i.width / i.height for i in album.given.values()) <= 2.2:
        photos = _photos(album, HALF, 600, columns=min(len(album.given), 2))
        cells, columns = (panels(HALF), 1) if len(numbered) == 1 else (panels(QUARTER), 2)
        # Half a row more than the images are high looks better than one row under them.
        num_rows = max(round((photos.height + GAP) / (cells[0].height + GAP)), 1)
        beside = _grid(cells[: num_rows * columns], columns)
        yield _framed(_grid([photos, beside], 2))
        if rest := cells[num_rows * columns :]:
            yield _framed(_grid(rest, 4))
        return
    if album.given:
        yield _framed(_photos(album, INNER, 460, columns=min(len(album.given), 4)))
    if numbered:
        columns = max(2, min(4, len(numbered))) if album.given else 3
        yield _framed(_grid(panels((INNER - GAP * (columns - 1)) // columns), columns))


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
    return _grid([_photo(album, i, cell, max_height) for i in album.given], columns)


def _photo(album: Album, index: int, width: int, max_height: int) -> Image.Image:
    """One given image, its regions, and a line of words."""
    record, marks = album.trace.images[index], marks_on(album, index)
    words = [f"image {album.number(index)}", printable(base_name(record.source))]
    words += [f"{record.size_wh[0]}x{record.size_wh[1]}", f"{record.num_tokens} tokens"]
    texts = [Text("  ·  ".join(words), 14, QUIET, 2)]
    if marks:
        key = "tinted: the cells it named; outlined: what was cut out, one cell wider"
        texts.append(Text(key, 14, QUIET, 2))
    shown = fitted(album.given[index], (width, max_height))
    left = (width - shown.width) // 2
    row = Image.new("RGB", (width, shown.height), PAPER)
    row.paste(shown, (left, 0))
    block = _grid([row, set_text(texts, width, centred=True)], 1, gap=8)
    draw_marks(block, marks, record.size_wh, (left, 0, left + shown.width, shown.height))
    return block


@dataclass(frozen=True)
class _Panel:
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
        ImageDraw.Draw(area).rectangle((0, 0, area.width - 1, area.height - 1), outline=LINE)
        chip, left = str(self.number), chip_width(str(self.number)) + 9
        head = Image.new("RGB", (self.width, CHIP_HEIGHT + 2), PAPER)
        head.paste(set_text([Text(call_words(self.call), 17, INK)], self.width - left), (left, 0))
        draw_chip(ImageDraw.Draw(head), chip, call_colour(self.number), (0, 0))
        facts = Text(self._facts(), 14, QUIET if self.is_executed else FAULT_INK)
        words = set_text([facts, Text(self._place(), 14)], self.width)
        return _grid([area, _grid([head, words], 1, gap=0)], 1, gap=10)

    def _area(self) -> Image.Image:
        first = next(iter(self.album.given.values()), None)
        shape = min(max(first.height / first.width, 0.6), 1.0) if first else 0.75
        area = Image.new("RGB", (self.width, round(self.width * shape)), SHADE)
        if not self.is_executed:
            _write_centred(area, OUTCOME_WORDS.get(self.call.outcome, self.call.outcome))
        elif self.is_encoded:
            self._paste_heat(area)
        elif self.call.box_xyxy_px is not None:
            picture = self.album.cut(self.call.image, self.call.box_xyxy_px)
            _paste_centred(area, fitted(picture, area.size), area.height)
        return area

    def _paste_heat(self, area: Image.Image) -> None:
        """The score map over the image, and its colour bar."""
        image, room = self.call.image, area.height - BAR_HEIGHT
        picture = self.album.cut(image, self.album.frame(image))
        photo, scores = fitted(picture, (area.width, room)), score_map(self.call)
        if scores is None:
            bar = Image.new("RGB", (area.width, BAR_HEIGHT), SHADE)
            _write_centred(bar, "no score map")
        else:
            seen = rescale(
                seen_of_call(self.album.trace, self.call),
                self.album.trace.images[image].size_wh,
                photo.size,
            )
            photo, low, high = heat_over(photo, scores, seen)
            bar = colour_bar(low, high, (area.width, BAR_HEIGHT))
        _paste_centred(area, photo, room)
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


# Paper


def _banner(texts: Sequence[Text], paper: str) -> Image.Image:
    return set_text(texts, WIDTH, margin_xy=(PAD, 16), paper=paper)


def _framed(content: Image.Image) -> Image.Image:
    return ImageOps.expand(content, (PAD, PAD, PAD, 8), PAPER)


def _grid(cells: Sequence[Image.Image], columns: int, gap: int = GAP) -> Image.Image:
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


def _paste_centred(area: Image.Image, picture: Image.Image, height: int) -> None:
    """In the upper part of an area."""
    area.paste(picture, ((area.width - picture.width) // 2, (height - picture.height) // 2))


def _write_centred(area: Image.Image, words: str) -> None:
    pen, centre = ImageDraw.Draw(area), (area.width / 2, area.height / 2)
    pen.text(centre, printable(words), QUIET, latin_font(16), anchor="mm")
