"""A row as the checks see it: turns, what is called for in them, and the images that answer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vpt.data.findings import Finding
from vpt.errors import PromptError
from vpt.protocol.calls import ParsedTurn, PerceptionCall, parse_turn, split_symbols
from vpt.protocol.rows import KINDS, list_images, read_turns, shorten
from vpt.protocol.tokens import BRANCH_TOKENS, DEPTH_START

Images = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Turn:
    """What is asked and answered.

    Attributes:
        number: of the asking message in ``messages``.
        asked: its text.
        answered: that of the message behind it.
        symbols: of the answer: control tokens, and runs of text.
        parsed: calls in the answer, by places in ``symbols``.
    """

    number: int
    asked: str
    answered: str
    symbols: Sequence[str]
    parsed: ParsedTurn

    @property
    def calls(self) -> Sequence[PerceptionCall]:
        """Well-formed calls of the answer."""
        return self.parsed.calls


@dataclass(frozen=True)
class RowView:
    """A row whose turns are in order.

    Attributes:
        system: text of the system message; empty if there is none.
        turns: one or more.
        images: kind of image (key of ``vpt.protocol.rows.KINDS``) -> paths.
    """

    system: str
    turns: Sequence[Turn]
    images: Images

    @property
    def kind(self) -> str:
        """What the model does before it answers: a word of ``ROW_KINDS``, several, or others."""
        if any(turn.parsed.malformed for turn in self.turns):
            return "malformed call"
        branches = dict.fromkeys(call.branch for turn in self.turns for call in turn.calls)
        content = [word for token, word in _CONTENT.items() if self._says(token)]
        if names := [*sorted(_NAMES[branch] for branch in branches), *content]:
            return "+".join(names)
        if shown := [_NAMES[branch] for branch in BRANCH_TOKENS if self.images[branch]]:
            return f"{'+'.join(shown)} alignment"
        return "direct" if self.images["image"] else "text only"

    def _says(self, token: str) -> bool:
        return any(token in turn.answered for turn in self.turns)

    def images_by_turn(self, kind: str) -> list[Sequence[str]] | None:
        """Paths of one kind, as the placeholders of each turn take them up.

        Returns:
            One list per turn; ``None`` if placeholders and images differ in number.
        """
        counts = [turn.asked.count(KINDS[kind].placeholder) for turn in self.turns]
        if sum(counts) != len(self.images[kind]):
            return None
        waiting = iter(self.images[kind])
        return [[next(waiting) for _ in range(count)] for count in counts]


_SURROGATE = re.compile("[\ud800-\udfff]")
_CONTENT = {DEPTH_START: "depth map", "<PIXEL_": "boxes"}
_NAMES = {"crop": "region", **{row.branch: row.encoder for row in BRANCH_TOKENS.values()}}


def view_row(row: object, grid_size: int) -> RowView | Finding:
    """Read a row.

    Args:
        row: as it stands in the file.
        grid_size: cells per side of the region grid.

    Returns:
        A view, or the finding that makes one impossible.
    """
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
        turns.append(Turn(first + 2 * number, asked, answered, symbols, parsed))
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
            return f"messages[{number}] is not valid text: it holds half of a surrogate pair"
    try:
        list_images(row)
    except PromptError as exc:
        return str(exc)
    return ""
