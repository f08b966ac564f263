"""Perception content that a model wrote (Aurora, arXiv 2412.03548): depth maps and boxes.

Unlike a call, content returns nothing and does not end the turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vpt.boxes import PixelBox, compose, rescale
from vpt.errors import RegionError
from vpt.protocol.calls import MalformedCall, parse_pixel_boxes
from vpt.protocol.tokens import DEPTH_END, DEPTH_START, ContentTokens, content_value, is_content
from vpt.trace.records import ContentRecord, Trace


@dataclass(frozen=True)
class ContentSpan:
    """One depth map, or boxes that follow each other, at tokens ``start`` to ``end`` (exclusive).

    Attributes:
        kind: ``"depth"`` or ``"boxes"``.
        is_whole: whether it is complete; else the sequence ends in the middle of it.
        codes: of a depth map, in reading order.
        boxes: left, top, right, bottom, ends included, in an image of ``num_pixels`` a side.
    """

    kind: str
    start: int
    end: int
    is_whole: bool
    codes: tuple[int, ...] = ()
    boxes: tuple[tuple[int, int, int, int], ...] = ()


@dataclass(frozen=True)
class ParsedContent:
    """The content of one assistant turn, well-formed and malformed, each in reading order."""

    spans: tuple[ContentSpan, ...]
    malformed: tuple[MalformedCall, ...]

    @property
    def answer_start(self) -> int:
        """Index after the last whole depth map, where the answer begins; 0 without a map."""
        ends = [span.end for span in self.spans if span.kind == "depth" and span.is_whole]
        return max(ends, default=0)


def parse_content(symbols: Sequence[str], content: ContentTokens) -> ParsedContent:
    """Find depth maps and boxes in a turn: one string per token. Nothing is guessed."""
    found: list[ContentSpan | MalformedCall] = []
    position = 0
    while position < len(symbols):
        if not is_content(symbols[position]):
            position += 1
            continue
        read = _read_depth if symbols[position] == DEPTH_START else _read_run
        found.append(read(symbols, position, content))
        position = found[-1].end
    spans = tuple(one for one in found if isinstance(one, ContentSpan))
    return ParsedContent(spans, tuple(one for one in found if isinstance(one, MalformedCall)))


def record_content(
    trace: Trace, span: ContentSpan, first_token: int, image: int, content: ContentTokens
) -> None:
    """Add a span of the latest turn to its trace.

    Args:
        trace: with all tokens of the turn.
        first_token: index of the turn's first token in the trace.
        image: index of the image it is of.
    """
    start, end = first_token + span.start, first_token + span.end
    turn, ms = trace.tokens[start].turn, sum(token.ms for token in trace.tokens[start:end])
    record = ContentRecord(span.kind, turn, image, start, end, span.is_whole, ms)
    if span.kind == "depth":
        record.codes = list(span.codes)
    else:
        seen = trace.images[image]
        boxes = [place_box(box, content.num_pixels, seen.size_wh) for box in span.boxes]
        if (frame := seen.box_xyxy_px) is not None:
            boxes = [compose(frame, box) for box in boxes]
        record.boxes, record.boxes_xyxy_px = list(span.boxes), boxes
    trace.content.append(record)


def place_box(
    box: tuple[int, int, int, int], num_pixels: int, size_wh: tuple[int, int]
) -> PixelBox:
    """Convert a written box, ends included, to XYXY pixels of the image, ends exclusive.

    Returns:
        A box of at least one pixel each way.

    Raises:
        RegionError: if the size is impossible.
    """
    exclusive = (box[0], box[1], box[2] + 1, box[3] + 1)
    x0, y0, x1, y1 = map(round, rescale(exclusive, (num_pixels, num_pixels), size_wh))
    x0, y0 = min(x0, size_wh[0] - 1), min(y0, size_wh[1] - 1)
    return x0, y0, max(x1, x0 + 1), max(y1, y0 + 1)


def _read_depth(
    symbols: Sequence[str], start: int, content: ContentTokens
) -> ContentSpan | MalformedCall:
    end = start + 1
    while end < len(symbols) and content_value(symbols[end], "depth") is not None:
        end += 1
    codes = tuple(content_value(symbol, "depth") or 0 for symbol in symbols[start + 1 : end])
    is_closed = end < len(symbols) and symbols[end] == DEPTH_END
    end += is_closed
    text = "".join(symbols[start:end])
    if "depth" not in content.kinds:
        return MalformedCall(start, end, text, "no depth map is expected here")
    if unknown := [code for code in codes if code >= content.num_codes]:
        reason = f"unknown depth code {unknown[0]}; the codebook has 0 to {content.num_codes - 1}"
        return MalformedCall(start, end, text, reason)
    if is_closed and len(codes) == content.num_cells:
        return ContentSpan("depth", start, end, True, codes)
    if end == len(symbols) and not is_closed and len(codes) <= content.num_cells:
        return ContentSpan("depth", start, end, False, codes)
    reason = f"a depth map of {len(codes)} codes; expected {content.num_cells}"
    return MalformedCall(start, end, text, reason if is_closed else "depth map is not closed")


def _read_run(
    symbols: Sequence[str], start: int, content: ContentTokens
) -> ContentSpan | MalformedCall:
    """Read pixels up to the next other token, or stray tokens of depth maps."""
    is_pixel = content_value(symbols[start], "boxes") is not None
    end = start + 1
    while (
        end < len(symbols)
        and is_content(symbols[end])
        and symbols[end] != DEPTH_START
        and (content_value(symbols[end], "boxes") is not None) == is_pixel
    ):
        end += 1
    text = "".join(symbols[start:end])
    if not is_pixel:
        return MalformedCall(start, end, text, "depth tokens outside a depth map")
    if "boxes" not in content.kinds:
        return MalformedCall(start, end, text, "no boxes are expected here")
    num_cut = (end - start) % 4
    if num_cut and end < len(symbols):
        return MalformedCall(start, end, text, f"{end - start} pixels; a box takes four")
    try:
        boxes = parse_pixel_boxes("".join(symbols[start : end - num_cut]), content.num_pixels)
    except RegionError as exc:
        return MalformedCall(start, end, text, str(exc))
    return ContentSpan("boxes", start, end, not num_cut, boxes=boxes)
