"""The token stream of a run as HTML: what was read, written and looked at, line by line."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from itertools import groupby

from vpt.protocol.calls import split_symbols
from vpt.protocol.tokens import is_content
from vpt.trace.records import CallRecord, ContentRecord, MalformedRecord, TokenRecord, Trace
from vpt.view.album import base_name
from vpt.view.depth import why_no_picture
from vpt.view.marks import call_colour
from vpt.view.wording import (
    OUTCOME_WORDS,
    STOP_WORDS,
    call_words,
    content_words,
    count_words,
    printable,
)

MOST_TOKENS = 400  # of a turn that are drawn one by one; of more, the last ones
MOST_BOXES = 8  # of those written together that are listed

WHY_NOT = {
    "repeated": "the same call as the one before",
    "not_executed": "the run had to end",
}
ENCODERS = {"reencode": "its own tower", "dino": "DINOv2", "sam": "SAM"}


def timeline_html(trace: Trace) -> str:
    """Write a run, finished or not, as an ordered list.

    Everything that a model, a person or a file brought is escaped.
    """
    lines = "".join([*_given(trace), *_turns(trace), *_end(trace)])
    return f'<ol class="vpt-stream" aria-label="Token stream">{lines}</ol>'


def _line(kind: str, head: str, body: str, facts: str = "", style: str = "") -> str:
    """One line: what happened, its content, and small numbers; ``head`` and ``facts`` are text."""
    small = f'<span class="facts">{escape(facts)}</span>' if facts else ""
    styled = f' style="{style}"' if style else ""
    return (
        f'<li class="{kind}"{styled}><span class="head">{escape(head)}</span>'
        f'<span class="body">{body}</span>{small}</li>'
    )


def _given(trace: Trace) -> Iterator[str]:
    """The pictures and the question."""
    is_read = trace.timings.prefill > 0
    for record in trace.images:
        if record.parent is None:
            width, height = record.size_wh
            body = f"{_shown(base_name(record.source))} {width}x{height}"
            facts = count_words(record.num_tokens, "token") if is_read else ""
            yield _line("reads", "sees", body, facts)
    facts = f"{trace.counts.prompt_tokens} tokens in all" if is_read else ""
    if is_read:
        facts += f" · {trace.timings.prefill:,.0f} ms"
    yield _line("reads", "reads", _shown(trace.question), facts)


def _turns(trace: Trace) -> Iterator[str]:
    for turn in trace.timeline():
        colour = call_colour(turn.calls[0][0]) if turn.calls else ""
        if turn.tokens:
            facts = count_words(len(turn.tokens), "token") + _duration(turn.tokens)
            style = f"--call: {colour}" if colour else ""
            yield _line("writes", "writes", _tokens(turn.tokens), facts, style)
        for bad in turn.malformed:
            yield _malformed(bad)
        for _, one in turn.content:
            yield _content(one)
        for number, call in turn.calls:
            yield _call(number, call, len(turn.calls))


def _tokens(tokens: list[TokenRecord]) -> str:
    left_out = '<span class="token">…</span>' if len(tokens) > MOST_TOKENS else ""
    groups = groupby(tokens[-MOST_TOKENS:], lambda token: _family(token.text))
    return left_out + "".join(
        _run(family, list(group)) if family else "".join(map(_token, group))
        for family, group in groups
    )


def _family(text: str) -> str:
    """``"DEPTH"`` or ``"PIXEL"`` for tokens of content, else nothing."""
    return text[1:].partition("_")[0] if is_content(text) else ""


def _run(family: str, tokens: list[TokenRecord]) -> str:
    """Tokens of content, which only a map or a picture makes readable."""
    title = f"{tokens[0].text} to {tokens[-1].text} · {sum(t.ms for t in tokens):,.1f} ms"
    words = f"{len(tokens)} {family}"
    return f'<span class="control" title="{_shown(title)}">{_shown(words)}</span>'


def _token(token: TokenRecord) -> str:
    """A token with its time; of a control token the name without brackets."""
    title = f"{token.text} · {token.ms:,.1f} ms"
    is_control = token.text.startswith("<|") and len(list(split_symbols(token.text))) == 1
    kind = "control" if is_control else "token"
    words = token.text[2:-2] if is_control else token.text
    return f'<span class="{kind}" title="{_shown(title)}">{_shown(words)}</span>'


def _call(number: int, call: CallRecord, num_siblings: int) -> str:
    style = f"--call: {call_colour(number)}"
    what = ENCODERS.get(call.branch) or call_words(call)
    name = f'<b class="number">{number}</b> <b>{_shown(what)}</b>'
    if call.outcome != "executed":
        why = WHY_NOT.get(call.outcome, call.outcome)
        said = f"{OUTCOME_WORDS.get(call.outcome, call.outcome)}: {why}"
        return _line("call refused", "asks for", f"{name} {_shown(said)}", "", style)
    if call.grid_hw is None:
        return _line("call pending", "looks again", f"{name} …", "", style)
    together = f" for all {num_siblings}" if num_siblings > 1 else ""
    facts = (
        f"executed · {count_words(call.num_tokens, 'token')} · "
        f"{call.encode_ms + call.run_ms:,.0f} ms{together}"
    )
    return _line("call", "looks again", f"{name} {_shown(_brought(call))}", facts, style)


def _brought(call: CallRecord) -> str:
    if call.box_xyxy_px is not None:
        x0, y0, x1, y1 = call.box_xyxy_px
        return f"and gets the crop {x0},{y0} to {x1},{y1}: {x1 - x0}x{y1 - y0} px"
    words = "on the whole picture" + (", features known" if call.reused else "")
    if call.scores:
        words += f"; scores {min(call.scores):.2g} (violet) to {max(call.scores):.2g} (yellow)"
    return words


def _content(one: ContentRecord) -> str:
    body = f"<b>{_shown(content_words(one))}</b>"
    facts = f"{count_words(one.end - one.start, 'token')} · {one.ms:,.0f} ms"
    kind = "content" if one.is_whole else "content refused"
    return _line(kind, "draws", body + _shown(_drawn(one)), facts)


def _drawn(one: ContentRecord) -> str:
    """What there is to see of a map, or where boxes lie; nothing of a map that was cut off."""
    if one.kind == "depth":
        if one.picture is not None:
            return ", from far (violet) to near (yellow)"
        return f", {why_no_picture(one)}" if one.is_whole else ""
    boxes = one.boxes_xyxy_px or []
    places = [f"{x0},{y0} to {x1},{y1}" for x0, y0, x1, y1 in boxes[:MOST_BOXES]]
    places += ["…"] if len(boxes) > MOST_BOXES else []
    return f": {'; '.join(places)}" if places else ""


def _malformed(bad: MalformedRecord) -> str:
    return _line("fault", "no call", f"{_shown(bad.text)} <i>{_shown(bad.reason)}</i>")


def _end(trace: Trace) -> Iterator[str]:
    if not trace.stop_reason:
        return
    why = STOP_WORDS.get(trace.stop_reason, trace.stop_reason)
    counts = trace.counts
    facts = (
        f"{counts.prompt_tokens} prompt + {counts.appended_tokens} appended + "
        f"{counts.generated_tokens} written tokens · {trace.timings.total:,.0f} ms"
    )
    yield _line("end", "ends", _shown(why), facts)


def _duration(tokens: list[TokenRecord]) -> str:
    """Without the first token, whose time is that of the look before it."""
    return f" · {sum(token.ms for token in tokens[1:]):,.0f} ms" if len(tokens) > 1 else ""


def _shown(text: str) -> str:
    return escape(printable(text))
