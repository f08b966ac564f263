"""Texts that describe a run, harmless on a terminal, in a picture or on a page."""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING

from vpt.protocol.tokens import BRANCH_TOKENS

if TYPE_CHECKING:
    from jinja2 import Environment

    from vpt.trace.records import CallRecord, ContentRecord, Counts, ImageRecord, Trace

STOP_TEXT = {
    "stop": "the model finished",
    "length": "cut off at the token limit",
    "max_calls": "the model wanted another call, but the call budget was used up",
    "repeated_call": "the model repeated one call, so looking again was ended",
}
MAP_TEXT = (
    "A score is the dot product of a place's feature and the control state, drawn in standard "
    "deviations from the map's mean. Its sign is arbitrary, and a high score does not mark the "
    "object asked about."
)
OUTCOME_TEXT = {
    "executed": "executed",
    "repeated": "repeated",
    "not_found": "not found",
    "not_executed": "not executed",
}

# Controls, lone surrogates, and the marks that turn text around (UAX 9).
_HARMFUL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")

_PRIVATE = re.compile(
    r"(?<=://)[^/@\s]+@"  # user and password of a URL
    r"|(?<=['\"])/[^'\",=]*/"  # folders in quotes
    r"|(?<![\w./~-])~?/(?!/)(?:[^/\s'\",=]+/)+"
    r"|\b[A-Za-z]:\\(?:[^\\\s'\",=]+\\)+"
)


def printable(text: str) -> str:
    """Escape control characters, and marks that turn text around; new lines and tabs stay."""
    return _HARMFUL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def public_text(text: str) -> str:
    """The text without users of URLs, with absolute paths cut to their last part."""
    return _PRIVATE.sub("", text)


@cache
def html_environment(package: str) -> Environment:
    """The HTML templates of a package; all texts put into them are escaped and made printable."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader(package),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
    )


def call_text(call: CallRecord) -> str:
    """Name a call as a person would: ``"region x 2-5, y 1-4"``, a phrase, or the encoder."""
    words = "region" if call.phrase is None else f"phrase {call.phrase!r}"
    if call.region is not None:
        ends = (call.region[0::2], call.region[1::2])
        x, y = (f"{low}" if low == high else f"{low}-{high}" for low, high in ends)
        return f"{words}{' ' if call.phrase is None else ', '}x {x}, y {y}"
    if call.phrase is not None:
        return words
    row = BRANCH_TOKENS.get(call.branch)
    return row.encoder if row else call.branch


def call_title(call: CallRecord) -> str:
    """Name a call in full: ``"region x 2-5, y 1-4"``, or ``"DINOv2"``."""
    row = BRANCH_TOKENS.get(call.branch)
    return row.title if row else call_text(call)


def call_facts(call: CallRecord, num_siblings: int) -> str:
    """The cost of an executed call; the time is that of all ``num_siblings`` calls of its turn."""
    together = f" for all {num_siblings}" if num_siblings > 1 else ""
    tokens = count_text(call.num_tokens, "token")
    return f"executed · {tokens} · {call.encode_ms + call.run_ms:,.0f} ms{together}"


def seen_text(image: ImageRecord) -> str:
    """The size at which the model saw an image: ``"112x112 px, 16 tokens"``."""
    tokens = count_text(image.num_tokens, "token")
    if image.seen_wh is None:
        return tokens
    return f"{image.seen_wh[0]}x{image.seen_wh[1]} px, {tokens}"


def is_given(trace: Trace, call: CallRecord) -> bool:
    """Whether the request prescribed a call, which the model then did not choose."""
    was_found = trace.settings.get("look_for") is not None and trace.proposals
    named = (trace.settings.get("region"), trace.settings.get("point"))
    is_prescribed = any(one is not None for one in named) or was_found
    return bool(is_prescribed) and call.turn == 0 and call.branch == "crop"


def look_text(trace: Trace) -> str:
    """Whether the model looked again, and by whose choice; empty without an image."""
    executed = [call for call in trace.calls if call.outcome == "executed"]
    if not trace.images:
        return ""
    if not executed:
        why = "It was not permitted to. " if trace.perception == "none" else ""
        first = f"the first look ({seen_text(trace.images[0])})"
        seen = "what it had seen before" if trace.history else first
        return f"The model did not look again. {why}It answered from {seen}."
    given = [call_title(call) for call in executed if is_given(trace, call)]
    own = [call_title(call) for call in executed if not is_given(trace, call)]
    sentences = []
    if given:
        sentences.append(f"The model did not choose {', '.join(given)}: it was given.")
    if own:
        is_free = trace.perception == "auto" or given
        chose = "chose" if is_free else f"was told ({trace.perception})"
        sentences.append(f"The model {chose} to look again: {', '.join(own)}.")
    return " ".join(sentences)


def tokens_text(counts: Counts) -> str:
    """The tokens of a run, by where they come from."""
    return (
        f"{counts.prompt_tokens} prompt + {counts.appended_tokens} appended + "
        f"{counts.generated_tokens} generated tokens"
    )


def cost_text(counts: Counts) -> str:
    """What a question cost whose beginning was read before; empty if nothing was."""
    if not counts.reused_tokens:
        return ""
    new = count_text(counts.prompt_tokens - counts.reused_tokens, "new token")
    return f"Read {new}, {counts.reused_tokens} kept."


def content_text(content: ContentRecord) -> str:
    """Name what a model wrote of an image: ``"depth map of 100 codes"``, ``"3 boxes"``."""
    if content.kind == "depth":
        codes = count_text(len(content.codes or ()), "code")
        return f"depth map of {codes}" if content.is_whole else f"depth map, cut off after {codes}"
    text = boxes_text(len(content.boxes or ()))
    return text if content.is_whole else f"{text}, then one cut off"


def boxes_text(number: int) -> str:
    """``"1 box"``, ``"2 boxes"``."""
    return "1 box" if number == 1 else f"{number} boxes"


def count_text(number: int, noun: str) -> str:
    """``"1 call"``, ``"2 calls"``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
