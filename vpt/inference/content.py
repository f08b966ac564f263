"""Experiments on perception content: what is read in place of what the model writes.

The model writes depth maps and boxes as always. Each token is replaced before it is read, so that
the answer that follows shows whether the content mattered.
"""

from __future__ import annotations

import random
from itertools import chain

from vpt.errors import DataError, PromptError, RegionError
from vpt.protocol.calls import parse_depth, parse_pixel_boxes
from vpt.protocol.grammar import TokenRule, TurnState
from vpt.protocol.tokens import (
    DEPTH_END,
    DEPTH_START,
    ContentTokens,
    Vocabulary,
    content_value,
    find_content,
)

REPLACED_CONTENT = ("random", "repeat", "empty")
"""What can be read in place of content, besides a text."""


class ContentReplacer:
    """Replaces the content of one turn.

    Args:
        how: one of :data:`REPLACED_CONTENT`: codes and boxes at random; the first code or box again
            and again; a depth map without codes, and no boxes. Or the text of a depth map, of
            boxes, or of both, to be read instead.

    Raises:
        PromptError: for another value, or for content that the model does not write.
    """

    def __init__(self, how: str, vocabulary: Vocabulary, seed: int) -> None:
        if not vocabulary.content.kinds:
            raise PromptError("replace_content: this model writes neither depth maps nor boxes")
        self._how, self._vocabulary = how, vocabulary
        self._draw = random.Random(seed)
        self._codes: tuple[int, ...] = ()
        self._sides: tuple[int, ...] = ()
        self._num_sides = 0  # of boxes, that were written
        if how not in REPLACED_CONTENT:
            self._codes, self._sides = _given(how, vocabulary.content)

    def permitted(self, kinds: tuple[str, ...]) -> tuple[str, ...]:
        """Kinds of content that the model may go on to write."""
        is_over = self._how == "empty" or (
            self._how not in REPLACED_CONTENT and 0 < len(self._sides) <= self._num_sides
        )
        return tuple(kind for kind in kinds if not (is_over and kind == "boxes"))

    def rule(self, state: TurnState) -> TokenRule | None:
        """The rule in place of the grammar's, if there is one."""
        if self._how == "empty" and state.name == "depth":
            return TokenRule(only=(self._vocabulary.ids[DEPTH_END],))
        return None

    def read(self, state: TurnState, token_id: int) -> int:
        """The token to be read in place of a written one, in the grammar's state before it."""
        (symbol,) = self._vocabulary.symbols([token_id])
        if state.name == "depth" and (code := content_value(symbol, "depth")) is not None:
            return self._id(f"<DEPTH_{self._code(state.num_written, code)}>")
        if (pixel := content_value(symbol, "boxes")) is not None:
            return self._id(f"<PIXEL_{self._side(state, pixel)}>")
        return token_id

    def _id(self, token: str) -> int:
        return self._vocabulary.ids[token]

    def _code(self, index: int, written: int) -> int:
        if self._how == "random":
            return self._draw.randrange(self._vocabulary.content.num_codes)
        if self._how == "repeat":
            self._codes = self._codes or (written,)
            return self._codes[0]
        return self._codes[index] if self._codes else written

    def _side(self, state: TurnState, written: int) -> int:
        number = state.num_written if state.name == "box" else 0
        index, self._num_sides = self._num_sides, self._num_sides + 1
        if self._how == "random":
            low = state.corner[number - 2] if number > 1 else 0
            return self._draw.randrange(low, self._vocabulary.content.num_pixels)
        if self._how == "repeat":
            if len(self._sides) < 4:
                self._sides = (*self._sides, written)
            return self._sides[number]
        return self._sides[index] if self._sides else written


def _given(text: str, content: ContentTokens) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Codes of the depth map, and sides of the boxes, that a text holds."""
    known = set(content.tokens)
    found = find_content(text)
    if not found or (unknown := [token for token in found if token not in known]):
        reason = f"this model does not write {unknown[0]}" if found else f"got {text[:60]!r}"
        raise PromptError(
            f"replace_content must be one of {', '.join(map(repr, REPLACED_CONTENT))}, or the text "
            f"of a depth map or of boxes; {reason}"
        )
    try:
        start, end = text.find(DEPTH_START), text.find(DEPTH_END)
        sizes = content.num_codes, content.num_cells
        codes = parse_depth(text[start : end + len(DEPTH_END)], *sizes) if start >= 0 else ()
        sides = tuple(chain.from_iterable(parse_pixel_boxes(text, content.num_pixels)))
    except (DataError, RegionError) as exc:
        raise PromptError(f"replace_content: {exc}") from exc
    return codes, sides
