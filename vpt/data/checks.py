"""Checks of one row: turns, control tokens, calls, images and crops. They open no file."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from vpt.boxes import GridBox, PixelBox, compose, contains, crop_box_px
from vpt.data.rows import Images
from vpt.errors import PromptError
from vpt.protocol.calls import (
    NOT_FOUND,
    ParsedTurn,
    PerceptionCall,
    find_symbols,
    parse_turn,
    split_symbols,
)
from vpt.protocol.rows import KINDS, list_images, read_turns, shorten, split_crop_suffix
from vpt.protocol.tokens import (
    BRANCH_TOKENS,
    DEPTH_START,
    GROUNDING,
    IMAGE_PAD,
    RELEASED_GRID_SIZE,
    TURN_END,
    TURN_START,
    VISION_END,
    VISION_START,
    encoder_names,
    perception_tokens,
)


class Finding(NamedTuple):
    """One fault of a row: a key of :data:`FINDINGS`, and the details."""

    kind: str
    detail: str


FINDINGS = {
    "not-loadable": "what the loader of LLaMA-Factory refuses; training would stop there",
    "broken-row": "no row: expected messages with role and content, and lists of image paths",
    "turn-order": "turns that do not alternate between user and assistant, the assistant last",
    "empty-turn": "a turn without text",
    "unknown-token": "a control token that no VPT model with this grid knows",
    "misplaced-token": "a control token where only text and placeholders may be",
    "malformed-call": "perception tokens that make no call",
    "words-after-call": "text after a call; in a run the turn ends there",
    "call-without-image": "a call that no image answers in the next turn",
    "image-without-call": "a re-encoded image or a crop that no call asked for",
    "placeholder-count": "placeholders in the text and images of the row differ in number",
    "unread-column": "images in a column that no VPT model reads",
    "missing-image": "an image file that does not exist; paths are relative to --images",
    "unreadable-image": "an image file that cannot be used",
    "crop-outside": "a crop suffix that is empty, or extends beyond the image",
    "crop-mismatch": "a crop that is not the one that the runtime cuts for the region",
    "missing-branch": "a call or re-encoded image of a branch that the model lacks",
    "bad-depth-map": "depth tokens that are not a map of exactly 100 known codes",
    "bad-box": "pixel tokens that are no boxes: not four each, out of range, or reversed",
    "answer-mismatch": "an answer that disagrees with the note of the row",
    "bad-note": "a note that is damaged, or contradicts itself",
    "epoch-order": "an epoch after a later one; the order of the file is the curriculum",
    "missing-content": "tokens of depth maps or boxes that the model's tokenizer lacks",
    "too-long": "more tokens than --cutoff-len; training would cut the row",
    "duplicate-row": "the same messages and images as an earlier row",
}
"""Kinds of findings, in the order of the report, with their meanings."""

ROW_KINDS = ("region", GROUNDING, *encoder_names(), "direct")
"""Kinds of rows: the model asks for a crop, for a phrase to be found, for a re-encoding by an
encoder, or for nothing."""

_CONTENT = {DEPTH_START: "depth map", "<PIXEL_": "boxes"}
_SURROGATE = re.compile("[\ud800-\udfff]")
_MARKS = {TURN_START, TURN_END, VISION_START, VISION_END, IMAGE_PAD}
_MARKS |= {"<|video_pad|>", "<|endoftext|>"}
_COLUMNS = frozenset(kind.column for kind in KINDS.values())


# Rows as the checks see them


@dataclass(frozen=True)
class RowTurn:
    """A question and its answer."""

    number: int  # of the asking message in ``messages``
    asked: str
    answered: str
    symbols: Sequence[str]  # of the answer: control tokens, and runs of text
    parsed: ParsedTurn  # calls in the answer, with indices into ``symbols``

    @property
    def calls(self) -> Sequence[PerceptionCall]:
        """Well-formed calls of the answer."""
        return self.parsed.calls

    @property
    def names(self) -> tuple[str, str]:
        """Names of both messages, for findings."""
        return f"messages[{self.number}]", f"messages[{self.number + 1}]"


def _kind_of_call(branch: str) -> str:
    if branch in BRANCH_TOKENS:
        return BRANCH_TOKENS[branch].encoder
    return "region" if branch == "crop" else branch


@dataclass(frozen=True)
class RowView:
    """A row whose turns are in order."""

    system: str  # text of the system message; empty if there is none
    turns: Sequence[RowTurn]  # at least one
    images: Mapping[str, Sequence[str]]  # key of ``vpt.protocol.rows.KINDS`` -> paths

    @property
    def kind(self) -> str:
        """One of ``ROW_KINDS``, several of them, or another word for what the row contains."""
        if any(turn.parsed.malformed for turn in self.turns):
            return "malformed call"
        branches = {call.branch for turn in self.turns for call in turn.calls}
        answers = " ".join(turn.answered for turn in self.turns)
        content = [word for token, word in _CONTENT.items() if token in answers]
        if names := [*sorted(_kind_of_call(branch) for branch in branches), *content]:
            return "+".join(names)
        if shown := [_kind_of_call(branch) for branch in BRANCH_TOKENS if self.images[branch]]:
            return f"{'+'.join(shown)} alignment"
        return "direct" if self.images["image"] else "text only"

    def images_by_turn(self, kind: str) -> list[Sequence[str]] | None:
        """Paths of one kind for each turn; ``None`` if placeholders and images differ in number."""
        counts = [turn.asked.count(KINDS[kind].placeholder) for turn in self.turns]
        if sum(counts) != len(self.images[kind]):
            return None
        waiting = iter(self.images[kind])
        return [[next(waiting) for _ in range(count)] for count in counts]


def view_row(row: object, grid_size: int) -> RowView | Finding:
    """Parse a row as read from a file; returns the finding that makes a view impossible, if any."""
    if (problem := _problem(row)) or not isinstance(row, Mapping):
        return Finding("broken-row", problem)
    try:
        system, pairs = read_turns(row)
    except PromptError as exc:
        return Finding("turn-order", str(exc))
    first = len(row["messages"]) - 2 * len(pairs)
    turns = []
    for number, (asked, answered) in enumerate(pairs):
        symbols = split_symbols(answered)
        parsed = parse_turn(symbols, grid_size)
        turns.append(RowTurn(first + 2 * number, asked, answered, symbols, parsed))
    images = {branch: row.get(kind.column) or [] for branch, kind in KINDS.items()}
    return RowView(system, turns, images)


def image_paths(row: object) -> list[str]:
    """Every path that a row names, of all kinds; none if the row is broken."""
    if _problem(row) or not isinstance(row, Mapping):
        return []
    return [path for _, path in list_images(row)]


def _problem(row: object) -> str:
    """Why something is no row; empty if it is one."""
    if not isinstance(row, Mapping):
        return f"expected a JSON object, got {type(row).__name__}"
    messages = row.get("messages")
    if not isinstance(messages, list):
        return f"expected messages to be a list, got {shorten(messages)}"
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            return f"expected messages[{number}] to be an object, got {shorten(message)}"
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                got = shorten(message.get(key))
                return f"expected messages[{number}] to have a text as {key}, got {got}"
        if _SURROGATE.search(message["content"]):
            return f"messages[{number}] is not valid text: it contains half of a surrogate pair"
    try:
        list_images(row)
    except PromptError as exc:
        return str(exc)
    return ""


# Text and control tokens


@dataclass(frozen=True)
class KnownTokens:
    """Control tokens by where they may occur."""

    writable: Collection[str]  # in answers, which the model writes
    reserved: Collection[str]  # nowhere in a text; the template writes them
    others: Collection[str] = ()  # anywhere; they have no meaning here

    def unknown(self, text: str) -> list[str]:
        """Strings of the form of a control token that are none."""
        known = (self.writable, self.reserved, self.others)
        return [symbol for symbol in find_symbols(text) if not any(symbol in k for k in known)]

    def in_sound_calls(self, turn: RowTurn) -> bool:
        """Whether all perception tokens of an answer form calls, so that images are expected."""
        return not turn.parsed.malformed and not self.unknown(turn.answered)


def known_tokens(
    grid_size: int = RELEASED_GRID_SIZE, added_tokens: Collection[str] = ()
) -> KnownTokens:
    """Control tokens of VPT models, and of a tokenizer with ``added_tokens``."""
    pads, writable = perception_tokens(BRANCH_TOKENS, grid_size, grounding=True)
    reserved = _MARKS.union(pads)
    return KnownTokens(set(writable), reserved, set(added_tokens) - reserved - set(writable))


def check_turns(view: RowView, known: KnownTokens) -> Iterator[Finding]:
    """Find empty turns, control tokens that are unknown or misplaced, and malformed calls."""
    yield from _check_text("the system message", view.system, known)
    for turn in view.turns:
        texts = turn.asked, turn.answered
        for name, text, is_answer in zip(turn.names, texts, (False, True), strict=True):
            if not text.strip():
                yield Finding("empty-turn", f"{name} is empty")
            yield from _check_text(name, text, known, is_answer=is_answer)
        yield from _check_form(turn, known.unknown(turn.answered))


def _check_text(
    name: str, text: str, known: KnownTokens, *, is_answer: bool = False
) -> Iterator[Finding]:
    """Check symbols; perception tokens are misplaced in texts that the model does not write."""
    unknown = known.unknown(text)
    for symbol in dict.fromkeys(find_symbols(text)):
        if symbol in unknown:
            yield Finding("unknown-token", f"{name} contains {symbol}")
        elif symbol in known.reserved or (symbol in known.writable and not is_answer):
            yield Finding("misplaced-token", f"{name} contains {symbol}")


def _check_form(turn: RowTurn, unknown: Collection[str]) -> Iterator[Finding]:
    """Find malformed calls, and text after calls."""
    name = turn.names[1]
    for malformed in turn.parsed.malformed:
        if not any(symbol in unknown for symbol in find_symbols(malformed.text)):
            yield Finding("malformed-call", f"{name}: {malformed.text}: {malformed.reason}")
    for call, following in zip(turn.calls, [*turn.calls[1:], None], strict=False):
        text = "".join(turn.symbols[call.start : call.end])
        if call.branch in BRANCH_TOKENS and text != (whole := BRANCH_TOKENS[call.branch].call):
            yield Finding("malformed-call", f"{name}: {text} is incomplete; expected {whole}")
        is_list = following is not None and following.branch == call.branch == "crop"
        end = len(turn.symbols) if not is_list or following is None else following.start
        if call.end != end:
            rest = "".join(turn.symbols[call.end :])
            yield Finding("words-after-call", f"{name}: {rest[:60]!r} follows {text}")
            return


# Calls and the images that answer them


def check_calls(view: RowView, known: KnownTokens) -> Iterator[Finding]:
    """Find calls that no image answers, and images that answer no call.

    Re-encoded images in the first turn (alignment data) and plain images in later turns are
    accepted. Answers with malformed calls are skipped, because their calls are not known.
    """
    by_turn = view.images_by_turn("image")
    for number, turn in enumerate(view.turns):
        if not known.in_sound_calls(turn):
            continue
        following = view.turns[number + 1 : number + 2]  # none after the last
        for branch, kind in KINDS.items():
            called = ("crop", GROUNDING) if branch == "image" else (branch,)
            num_calls = sum(call.branch in called for call in turn.calls)
            if any(one.asked == NOT_FOUND for one in following):  # of a phrase
                num_calls = 0
            num_shown = num_results = sum(one.asked.count(kind.placeholder) for one in following)
            if branch == "image":  # only crops can be nothing but results of calls
                shown = by_turn[number + 1] if by_turn and following else ()
                num_results = sum(split_crop_suffix(path)[1] is not None for path in shown)
            said = f"{turn.names[1]} calls for {num_calls} {kind.placeholder}, the next turn has "
            if num_shown < num_calls:
                yield Finding("call-without-image", f"{said}{num_shown}")
            elif num_results > num_calls:
                crops = " that are crops" if branch == "image" else ""
                yield Finding("image-without-call", f"{said}{num_results}{crops}")


def check_crops(
    view: RowView, known: KnownTokens, images: Images, grid_size: int
) -> Iterator[Finding]:
    """Find crops that are not those the runtime cuts for the regions named.

    Crops of images of unknown size are not checked.
    """
    by_turn = view.images_by_turn("image")
    if by_turn is None:
        return
    for number, turn in enumerate(view.turns[:-1]):
        regions = [call.region for call in turn.calls if call.region is not None]
        crops = by_turn[number + 1]
        if len(regions) != len(crops) or not known.in_sound_calls(turn):
            continue
        before = [path for paths in by_turn[: number + 1] for path in paths]
        for region, crop in zip(regions, crops, strict=True):
            if detail := _crop_problem(region, crop, before, images, grid_size):
                yield Finding("crop-mismatch", f"{turn.names[1]}: {detail}")


def _crop_problem(
    region: GridBox, crop: str, before: Sequence[str], images: Images, grid_size: int
) -> str:
    """The fault of the crop that answers a region; empty if there is none, or none is known."""
    plain, box = split_crop_suffix(crop)
    sources = [outer for path, outer in map(split_crop_suffix, before) if path == plain]
    if not sources:  # it may be a file that was cropped beforehand
        return "" if box is None else f"{crop} is cut out of an image that was not shown before"
    facts = images.get(plain)
    if facts is None or facts.size_wh is None:
        return ""
    whole: PixelBox = (0, 0, *facts.size_wh)
    expected = [_cut(region, outer or whole, grid_size) for outer in sources]
    if (box or whole) in expected:
        return ""
    named = " or ".join(",".join(map(str, one)) for one in dict.fromkeys(expected))
    width, height = facts.size_wh
    return f"the region is {named} of {width}x{height} px, the image is {crop}"


def _cut(region: GridBox, outer: PixelBox, grid_size: int) -> PixelBox:
    """Box of a region of a crop, in pixels of the whole image."""
    size_wh = outer[2] - outer[0], outer[3] - outer[1]
    return compose(outer, crop_box_px(region, size_wh, grid_size=grid_size))


# Images


def check_columns(row: Mapping[str, Any]) -> Iterator[Finding]:
    """Find images in columns that are not read."""
    for column, value in row.items():
        is_media = column.endswith("images") or column in ("videos", "audios")
        if is_media and column not in _COLUMNS and value:
            yield Finding("unread-column", column)


def check_placeholders(view: RowView) -> Iterator[Finding]:
    """Find placeholders without images, images without placeholders, and any in an answer."""
    for branch, kind in KINDS.items():
        num_asked = sum(turn.asked.count(kind.placeholder) for turn in view.turns)
        if num_asked != (num_images := len(view.images[branch])):
            detail = f"{num_asked} {kind.placeholder} in the text, {num_images} in {kind.column}"
            yield Finding("placeholder-count", detail)
        for turn in view.turns:
            if kind.placeholder in turn.answered:
                detail = f"{turn.names[1]} is an answer, but contains {kind.placeholder}"
                yield Finding("placeholder-count", detail)


def check_files(paths: Iterable[str], images: Images) -> Iterator[Finding]:
    """Find images that are missing or damaged; files without facts are accepted."""
    for path in dict.fromkeys(split_crop_suffix(path)[0] for path in paths):
        facts = images.get(path)
        if facts is not None and facts.size_wh is None:
            kind = "missing-image" if facts.is_missing else "unreadable-image"
            yield Finding(kind, facts.problem)


def check_boxes(paths: Iterable[str], images: Images) -> Iterator[Finding]:
    """Find crop suffixes that are empty or, where the size is known, extend beyond the image."""
    for path in dict.fromkeys(paths):
        plain, box = split_crop_suffix(path)
        if box is None:
            continue
        facts = images.get(plain)
        if box[0] >= box[2] or box[1] >= box[3]:
            yield Finding("crop-outside", f"{path} is empty; expected x0 < x1 and y0 < y1")
        elif facts and facts.size_wh and not contains((0, 0, *facts.size_wh), box):
            width, height = facts.size_wh
            yield Finding("crop-outside", f"{path} extends beyond {width}x{height} px")
