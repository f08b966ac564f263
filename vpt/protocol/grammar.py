"""The grammar of perception tokens: which tokens may follow which.

With it every call is well formed, and no perception token is outside of one. The same automaton
serves the runtime and transformers' own ``generate``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from vpt.protocol.tokens import (
    BRANCH_TOKENS,
    DEPTH_END,
    DEPTH_START,
    GROUND_END,
    GROUND_START,
    GROUNDING,
    IMAGE_PAD,
    REGION_END,
    REGION_START,
    TURN_END,
    VISION_END,
    VISION_START,
    Vocabulary,
    coordinate_tokens,
    depth_tokens,
    is_content,
    is_coordinate,
    pixel_tokens,
)

MOST_PHRASE_TOKENS = 16
MOST_REGIONS = 4  # of a turn


@dataclass(frozen=True)
class TokenRule:
    """Ids that may come next: ``only`` these; or not ``banned`` and below ``vocabulary_end``."""

    only: tuple[int, ...] | None = None
    banned: tuple[int, ...] = ()
    vocabulary_end: int | None = None


@dataclass(frozen=True)
class TurnState:
    """State of a turn in the grammar.

    Attributes:
        name: a state of :class:`PerceptionGrammar`.
        num_regions: regions written in this turn.
        num_written: codes of the current depth map, coordinates of the current box, or tokens of
            the current phrase.
        corner: ``(x, y)`` of the current box, as far as written.
    """

    name: str = "free"
    num_regions: int = 0
    num_written: int = 0
    corner: tuple[int, ...] = ()


class PerceptionGrammar:
    """Which tokens may follow which, within one assistant turn.

    A region is start, ``x y``, optionally a second ``x y``, end; after it only a further region
    or the end of the turn may come. A phrase is start, plain tokens, of which there are at most
    ``MOST_PHRASE_TOKENS``, end, and the end of the turn. After a branch's start token come its
    action and end tokens and the end of the turn. A depth map is start, all its codes, end; a box
    is four pixels: left, top, then right and bottom that are no smaller; after either text
    continues. Elsewhere text is free. What may come next is found in constant time, however long
    the turn is.
    """

    def __init__(self, vocabulary: Vocabulary, max_regions: int = MOST_REGIONS) -> None:
        if max_regions < 1:
            raise ValueError(f"max_regions must be at least 1, not {max_regions}")
        self.vocabulary = vocabulary
        self.max_regions = max_regions
        ids = vocabulary.ids
        self._turn_end = ids[TURN_END]
        self._region_start = ids.get(REGION_START, -1)
        self._region_end = ids.get(REGION_END, -1)
        k = vocabulary.grid_size
        has_region = "crop" in vocabulary.branches
        self._x = tuple(ids[t] for t in coordinate_tokens("x", k)) if has_region else ()
        self._y = tuple(ids[t] for t in coordinate_tokens("y", k)) if has_region else ()
        self._forced: dict[int, int] = {}  # token -> the only one that may follow it
        self._ground_start = self._ground_end = -1
        if GROUNDING in vocabulary.branches:
            self._ground_start, self._ground_end = ids[GROUND_START], ids[GROUND_END]
            self._forced[self._ground_end] = self._turn_end
        for row in BRANCH_TOKENS.values():
            if row.branch in vocabulary.branches:
                self._forced[ids[row.start]] = ids[row.action]
                self._forced[ids[row.action]] = ids[row.end]
                self._forced[ids[row.end]] = self._turn_end
        self._read_content()
        self._rules: dict[tuple[Any, ...], TokenRule] = {}

    def _read_content(self) -> None:
        """Ids of depth maps and boxes; none of what this model does not write."""
        ids, content = self.vocabulary.ids, self.vocabulary.content
        self._depth_start = self._depth_end = -1
        self._codes: dict[int, int] = {}  # id -> code
        self._pixels: dict[int, int] = {}  # id -> pixel, in ascending order
        if "depth" in content.kinds:
            self._depth_start, self._depth_end = ids[DEPTH_START], ids[DEPTH_END]
            codes = depth_tokens(content.num_codes)[2:]
            self._codes = {ids[token]: code for code, token in enumerate(codes)}
        if "boxes" in content.kinds:
            pixels = pixel_tokens(content.num_pixels)
            self._pixels = {ids[token]: pixel for pixel, token in enumerate(pixels)}

    @cached_property
    def _every_control(self) -> frozenset[int]:
        """Every id that is no text, those of turns included."""
        return frozenset(self.vocabulary.ids.values())

    @cached_property
    def _controls(self) -> tuple[int, ...]:
        """Every id that may not come in free text, openers included."""
        ids = self.vocabulary.ids
        names = [IMAGE_PAD, "<|video_pad|>", VISION_START, VISION_END, REGION_START, REGION_END]
        names += [GROUND_START, GROUND_END]
        controls = {ids[name] for name in names if name in ids}
        controls |= {i for token, i in ids.items() if is_coordinate(token) or is_content(token)}
        for row in BRANCH_TOKENS.values():
            controls |= {ids[token] for token in row.tokens if token in ids}
        return tuple(sorted(controls))

    def rule(
        self, state: TurnState, permitted: Sequence[str], must_call: bool = False
    ) -> TokenRule:
        """Rule for the next token.

        Args:
            permitted: branches that may be called now, and kinds of content that may be written.
            must_call: in free text, permit nothing but a call.
        """
        if state.name == "free":
            key: tuple[Any, ...] = ("free", tuple(permitted), must_call)
        elif state.name == "after_region":
            key = ("after_region", state.num_regions < self.max_regions and "crop" in permitted)
        elif state.name == "phrase":
            key = ("phrase", min(state.num_written, 1), state.num_written < MOST_PHRASE_TOKENS)
        elif state.name == "depth":
            key = ("depth", state.num_written < self.vocabulary.content.num_cells)
        elif state.name == "box":
            key = ("box", state.corner[state.num_written - 2] if state.num_written > 1 else 0)
        else:
            key = (state.name,)
        if (rule := self._rules.get(key)) is None:
            rule = self._rules[key] = self._make_rule(*key)
        return rule

    def _make_rule(self, name: str, *given: Any) -> TokenRule:
        if name == "free":
            return self._free_rule(*given)
        if name == "after_region":
            return TokenRule(only=(self._region_start, self._turn_end)[0 if given[0] else 1 :])
        if name == "phrase":
            return self._phrase_rule(*given)
        if name == "depth":
            return TokenRule(only=tuple(self._codes) if given[0] else (self._depth_end,))
        if name == "box":
            return TokenRule(only=tuple(self._pixels)[given[0] :])
        if name.startswith("forced:"):
            return TokenRule(only=(int(name.removeprefix("forced:")),))
        only = {
            "x1": self._x,
            "x2_or_end": (*self._x, self._region_end),
            "end": (self._region_end,),
        }
        return TokenRule(only=only.get(name, self._y))

    def _free_rule(self, permitted: Sequence[str], must_call: bool) -> TokenRule:
        branches = [one for one in permitted if one in self.vocabulary.branches]
        openers = tuple(self.vocabulary.opener(branch) for branch in branches)
        if must_call and openers:
            return TokenRule(only=openers)
        allowed = set(openers)
        if "depth" in permitted:
            allowed.add(self._depth_start)
        if "boxes" in permitted:
            allowed.update(self._pixels)
        banned = tuple(i for i in self._controls if i not in allowed)
        return TokenRule(banned=banned, vocabulary_end=self.vocabulary.size)

    def _phrase_rule(self, is_begun: bool, may_go_on: bool) -> TokenRule:
        if not may_go_on:
            return TokenRule(only=(self._ground_end,))
        ends = {self._ground_end} if is_begun else set()
        banned = tuple(sorted(self._every_control - ends))
        return TokenRule(banned=banned, vocabulary_end=self.vocabulary.size)

    def advance(self, state: TurnState, token_id: int) -> TurnState:
        """State after ``token_id``. Tokens that break the grammar lead back to free text."""
        if token_id == self._region_start:
            return TurnState("x1", state.num_regions)
        if token_id == self._ground_start:
            return TurnState("phrase", state.num_regions)
        if state.name == "phrase" and token_id not in self._every_control:
            return TurnState("phrase", state.num_regions, state.num_written + 1)
        if token_id in self._forced:
            return TurnState(f"forced:{self._forced[token_id]}", state.num_regions)
        if token_id == self._depth_start:
            return TurnState("depth", state.num_regions)
        if token_id in self._codes:
            num_written = state.num_written + 1
            if state.name != "depth" or num_written > self.vocabulary.content.num_cells:
                return TurnState("free", state.num_regions)
            return TurnState("depth", state.num_regions, num_written)
        if token_id in self._pixels:
            return _after_pixel(state, self._pixels[token_id])
        follows = {
            "x1": (self._x, "y1"),
            "y1": (self._y, "x2_or_end"),
            "x2_or_end": (self._x, "y2"),
            "y2": (self._y, "end"),
        }
        if token_id == self._region_end and state.name in ("x2_or_end", "end"):
            return TurnState("after_region", state.num_regions + 1)
        expected, following = follows.get(state.name, ((), "free"))
        return TurnState(following if token_id in expected else "free", state.num_regions)


def _after_pixel(state: TurnState, pixel: int) -> TurnState:
    if state.name != "box":
        return TurnState("box", state.num_regions, 1, (pixel,))
    if state.num_written == 1:
        return TurnState("box", state.num_regions, 2, (*state.corner, pixel))
    if state.num_written == 2 and pixel >= state.corner[0]:
        return TurnState("box", state.num_regions, 3, state.corner)
    return TurnState("free", state.num_regions)  # the box is complete, or none
