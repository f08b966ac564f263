"""Checks of what is said in a row: turns, control tokens and calls. They open no file."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from vpt.data.findings import Finding
from vpt.data.row_view import RowView, Turn
from vpt.protocol.calls import find_symbols
from vpt.protocol.tokens import (
    BRANCH_TOKENS,
    IMAGE_PAD,
    RELEASED_GRID_SIZE,
    TURN_END,
    TURN_START,
    VISION_END,
    VISION_START,
    perception_tokens,
)

_MARKS = {TURN_START, TURN_END, VISION_START, VISION_END, IMAGE_PAD}
_MARKS |= {"<|video_pad|>", "<|endoftext|>"}


@dataclass(frozen=True)
class KnownTokens:
    """Control tokens by where they may stand.

    Attributes:
        writable: those the model writes, in its answers.
        reserved: those that the template writes; nowhere in a text.
        others: of the tokenizer, of no meaning here; anywhere.
    """

    writable: Collection[str]
    reserved: Collection[str]
    others: Collection[str] = ()


def known_tokens(
    grid_size: int = RELEASED_GRID_SIZE, added_tokens: Collection[str] = ()
) -> KnownTokens:
    """Control tokens of VPT models.

    Args:
        grid_size: cells per side of the region grid.
        added_tokens: of a tokenizer, those that others brought included.
    """
    pads, writable = perception_tokens(BRANCH_TOKENS, grid_size)
    reserved = _MARKS.union(pads)
    return KnownTokens(set(writable), reserved, set(added_tokens) - reserved - set(writable))


def check_turns(view: RowView, known: KnownTokens) -> Iterator[Finding]:
    """Find empty turns, control tokens that are unknown or out of place, and malformed calls."""
    yield from _check_text("the system message", view.system, known)
    for turn in view.turns:
        asked, answered = f"messages[{turn.number}]", f"messages[{turn.number + 1}]"
        for name, text in ((asked, turn.asked), (answered, turn.answered)):
            if not text.strip():
                yield Finding("empty-turn", f"{name} is empty")
        yield from _check_text(asked, turn.asked, known)
        unknown = unknown_tokens(turn.answered, known)
        for symbol in dict.fromkeys(unknown):
            yield Finding("unknown-token", f"{answered} holds {symbol}")
        for symbol in dict.fromkeys(s for s in turn.symbols if s in known.reserved):
            yield Finding("misplaced-token", f"{answered} holds {symbol}")
        yield from _check_calls(turn, answered, unknown)


def unknown_tokens(text: str, known: KnownTokens) -> list[str]:
    """What has the form of a control token, but is none."""
    symbols = find_symbols(text)
    return [
        s
        for s in symbols
        if s not in known.writable and s not in known.reserved and s not in known.others
    ]


def has_sound_calls(turn: Turn, known: KnownTokens) -> bool:
    """Whether all perception tokens of an answer make calls, so that images can be expected."""
    return not turn.parsed.malformed and not unknown_tokens(turn.answered, known)


def _check_text(name: str, text: str, known: KnownTokens) -> Iterator[Finding]:
    """A text that is not the model's: no perception tokens either."""
    for symbol in dict.fromkeys(find_symbols(text)):
        if symbol in known.writable or symbol in known.reserved:
            yield Finding("misplaced-token", f"{name} holds {symbol}")
        elif symbol not in known.others:
            yield Finding("unknown-token", f"{name} holds {symbol}")


def _check_calls(turn: Turn, name: str, unknown: Collection[str]) -> Iterator[Finding]:
    for malformed in turn.parsed.malformed:
        if not any(symbol in unknown for symbol in find_symbols(malformed.text)):
            yield Finding("malformed-call", f"{name}: {malformed.text}: {malformed.reason}")
    for number, call in enumerate(turn.calls):
        text = "".join(turn.symbols[call.start : call.end])
        if call.branch in BRANCH_TOKENS and text != (whole := BRANCH_TOKENS[call.branch].call):
            yield Finding("malformed-call", f"{name}: {text} is not whole; expected {whole}")
        if call.end == len(turn.symbols):
            continue
        behind = turn.calls[number + 1] if number + 1 < len(turn.calls) else None
        is_list = behind is not None and behind.branch == call.branch == "crop"
        if not is_list or behind is None or behind.start != call.end:
            rest = "".join(turn.symbols[call.end :])
            yield Finding("words-after-call", f"{name}: {rest[:60]!r} stands behind {text}")
            return
