"""The token stream of a run as HTML: what was read, written and looked at, line by line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice

from vpt.protocol.calls import split_symbols
from vpt.protocol.tokens import is_content
from vpt.trace.records import CallRecord, ContentRecord, ImageRecord, TokenRecord, Trace
from vpt.view.renderers import base_name, call_colour, why_no_map
from vpt.view.wording import (
    OUTCOME_TEXT,
    STOP_TEXT,
    call_facts,
    call_title,
    content_text,
    count_text,
    html_environment,
    is_given,
    seen_text,
    tokens_text,
)

MOST_TOKENS = 400  # of a turn that are drawn one by one; of more, the last ones
MOST_BOXES = 8  # of those written together that are listed

WHY_NOT = {
    "repeated": "the same call as the one before",
    "not_found": "the detector knows no such place",
    "not_executed": "the run had to end",
}


@dataclass(frozen=True)
class _Token:
    """A token, or several that make sense only as an image or boxes."""

    kind: str
    text: str
    title: str = ""


@dataclass(frozen=True)
class _Line:
    """One line of the list, its parts from left to right."""

    kind: str
    head: str
    number: int = 0
    name: str = ""
    text: str = ""
    tokens: tuple[_Token, ...] = ()
    reason: str = ""
    facts: str = ""
    colour: str = ""


def timeline_html(trace: Trace) -> str:
    """Write a run, finished or not, as an ordered list; all text in it is escaped."""
    lines = [*_given(trace), *_turns(trace), *_end(trace)]
    return html_environment("vpt.view").get_template("timeline.html").render(lines=lines)


def _given(trace: Trace) -> Iterator[_Line]:
    """The images and the question, after those of the conversation before it."""
    is_read, counts = trace.timings.prefill > 0, trace.counts
    given = (record for record in trace.images if record.parent is None)

    def seen(records: Iterable[ImageRecord]) -> Iterator[_Line]:
        for record in records:
            width, height = record.size_wh
            text = f"{base_name(record.source)} {width}x{height}"
            yield _Line("reads", "sees", text=text, facts=seen_text(record) if is_read else "")

    for message in trace.history:
        yield from seen(islice(given, message.num_images))
        yield _Line("reads", "read" if message.role == "user" else "wrote", text=message.text)
    yield from seen(given)
    kept = f", {counts.reused_tokens} kept" if counts.reused_tokens else ""
    facts = f"{counts.prompt_tokens} tokens in all{kept} · {trace.timings.prefill:,.0f} ms"
    yield _Line("reads", "reads", text=trace.question, facts=facts if is_read else "")


def _turns(trace: Trace) -> Iterator[_Line]:
    for turn in trace.timeline():
        colour = call_colour(turn.calls[0][0]) if turn.calls else ""
        if turn.tokens:
            facts = count_text(len(turn.tokens), "token")
            if len(turn.tokens) > 1:  # the time of the first is that of the look before it
                facts += f" · {sum(token.ms for token in turn.tokens[1:]):,.0f} ms"
            tokens = tuple(_tokens(turn.tokens))
            is_prescribed = any(is_given(trace, call) for _, call in turn.calls)
            head = "is given" if is_prescribed else "writes"
            text = "not the model's choice: " if is_prescribed else ""
            yield _Line("writes", head, text=text, tokens=tokens, facts=facts, colour=colour)
        for bad in turn.malformed:
            yield _Line("fault", "no call", text=bad.text, reason=bad.reason)
        for _, one in turn.content:
            facts = f"{count_text(one.end - one.start, 'token')} · {one.ms:,.0f} ms"
            kind = "content" if one.is_whole else "content refused"
            yield _Line(kind, "draws", name=content_text(one), text=_drawn(one), facts=facts)
        for number, call in turn.calls:
            yield _call(number, call, len(turn.calls), is_given(trace, call))


def _tokens(tokens: list[TokenRecord]) -> Iterator[_Token]:
    if len(tokens) > MOST_TOKENS:
        yield _Token("token", "…")
    for family, group in groupby(tokens[-MOST_TOKENS:], lambda token: _family(token.text)):
        run = list(group)
        if family:
            title = f"{run[0].text} to {run[-1].text} · {sum(one.ms for one in run):,.1f} ms"
            yield _Token("control", f"{len(run)} {family}", title)
            continue
        for one in run:
            title = f"{one.text} · {one.ms:,.1f} ms"
            if one.text.startswith("<|") and len(list(split_symbols(one.text))) == 1:
                yield _Token("control", one.text[2:-2], title)  # the name without brackets
            else:
                yield _Token("token", one.text, title)


def _family(text: str) -> str:
    """``"DEPTH"`` or ``"PIXEL"`` for tokens of content, else nothing."""
    return text[1:].partition("_")[0] if is_content(text) else ""


def _call(number: int, call: CallRecord, num_siblings: int, is_prescribed: bool) -> _Line:
    colour, name = call_colour(number), call_title(call)
    if call.outcome != "executed":
        why = WHY_NOT.get(call.outcome, call.outcome)
        text = f" {OUTCOME_TEXT.get(call.outcome, call.outcome)}: {why}"
        return _Line("call refused", "asks for", number, name, text, colour=colour)
    head = "is shown" if is_prescribed else "looks again"
    if call.grid_hw is None:
        return _Line("call pending", head, number, name, " …", colour=colour)
    text, facts = f" {_result(call)}", call_facts(call, num_siblings)
    return _Line("call", head, number, name, text, facts=facts, colour=colour)


def _result(call: CallRecord) -> str:
    if call.box_xyxy_px is not None:
        x0, y0, x1, y1 = call.box_xyxy_px
        return f"and gets the crop {x0},{y0} to {x1},{y1}: {x1 - x0}x{y1 - y0} px"
    text = "on the whole image" + (", features known" if call.reused else "")
    if call.scores:
        text += f"; scores {min(call.scores):.2g} to {max(call.scores):.2g}"
    return text


def _drawn(one: ContentRecord) -> str:
    """The range of a map, or the places of boxes; empty for a map that was cut off."""
    if one.kind == "depth":
        if why := why_no_map(one):
            return f", {why}" if one.is_whole else ""
        return ", from far (violet) to near (yellow)"
    boxes = one.boxes_xyxy_px or []
    places = [f"{x0},{y0} to {x1},{y1}" for x0, y0, x1, y1 in boxes[:MOST_BOXES]]
    places += ["…"] if len(boxes) > MOST_BOXES else []
    return f": {'; '.join(places)}" if places else ""


def _end(trace: Trace) -> Iterator[_Line]:
    if trace.stop_reason:
        facts = f"{tokens_text(trace.counts)} · {trace.timings.total:,.0f} ms"
        why = STOP_TEXT.get(trace.stop_reason, trace.stop_reason)
        yield _Line("end", "ends", text=why, facts=facts)
