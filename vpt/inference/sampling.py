"""The grammar of perception tokens, and how it steers decoding.

A grammar is a small automaton over the tokens of one assistant turn. It says which tokens may
come next, so that every call the model makes is well formed, and no perception token stands
outside of one. The same automaton serves the runtime and, as a logits processor, transformers'
own ``generate``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from vpt.inference.options import real_number, whole_number
from vpt.protocol.tokens import (
    BRANCH_TOKENS,
    DEPTH_END,
    DEPTH_START,
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

NOT_FINITE = -1
"""In place of a chosen id: the largest logit is NaN or infinite, so there is nothing to choose."""

NOT_FINITE_WORDS = (
    "the model's logits are not finite (NaN or infinity), so no token can be chosen; load it with "
    "dtype float32 or bfloat16, and check that the weights of the checkpoint are finite"
)

_FLOAT32 = torch.finfo(torch.float32)


def likeliest(logits: Tensor) -> Tensor:
    """Ids of the largest logits.

    Args:
        logits: ``[..., V]``. NaN counts as the largest.

    Returns:
        ``[...]`` ids on the device of ``logits``; ``NOT_FINITE`` where the largest is not finite.
    """
    ids = logits.argmax(-1, keepdim=True)
    is_finite = logits.gather(-1, ids).isfinite()
    return ids.where(is_finite, NOT_FINITE).squeeze(-1)


@dataclass(frozen=True)
class TokenRule:
    """What may come next: ``only`` these ids, or all but the ``banned`` ones.

    Attributes:
        only: ids, or ``None`` for no such limit.
        banned: ids that may not come; of no meaning beside ``only``.
        vocabulary_end: ids from here on are banned too; ``None`` for no such limit.
    """

    only: tuple[int, ...] | None = None
    banned: tuple[int, ...] = ()
    vocabulary_end: int | None = None

    def apply_(self, logits: Tensor) -> Tensor:
        """Set the logits ``[V]`` of what may not come to -inf, in place; returns them."""
        if self.only is not None:
            only = _index(self.only, logits.device)
            kept = logits[only]
            logits.fill_(-torch.inf)
            logits[only] = kept
            return logits
        if self.banned:
            logits[_index(self.banned, logits.device)] = -torch.inf
        if self.vocabulary_end is not None:
            logits[self.vocabulary_end :] = -torch.inf
        return logits


@lru_cache(maxsize=1024)
def _index(ids: tuple[int, ...], device: torch.device) -> Tensor:
    """Ids as a tensor, made once: rules are few and come again with every token."""
    return torch.tensor(ids, device=device)


@dataclass(frozen=True)
class TurnState:
    """Where in the grammar a turn stands.

    Attributes:
        name: a state of :class:`PerceptionGrammar`.
        num_regions: regions written in this turn.
        num_written: codes of the depth map, or coordinates of the box, that is being written.
        corner: ``(x, y)`` of the box that is being written, as far as they are there.
    """

    name: str = "free"
    num_regions: int = 0
    num_written: int = 0
    corner: tuple[int, ...] = ()


class PerceptionGrammar:
    """Which tokens may follow which, within one assistant turn.

    A region is start, ``x y``, optionally a second ``x y``, end; behind it only a further region
    or the end of the turn may come. Behind a branch's start token come its action and end tokens
    and the end of the turn, and nothing else. A depth map is start, all its codes, end; a box is
    four pixels: left, top, then right and bottom that are no smaller; behind either text goes on.
    Elsewhere text is free.

    What may come next is found in constant time, however long the turn is.

    Args:
        vocabulary: ids of the control tokens.
        max_regions: regions in one turn.
    """

    def __init__(self, vocabulary: Vocabulary, max_regions: int = 4) -> None:
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
        for row in BRANCH_TOKENS.values():
            if row.branch in vocabulary.branches:
                self._forced[ids[row.start]] = ids[row.action]
                self._forced[ids[row.action]] = ids[row.end]
                self._forced[ids[row.end]] = self._turn_end
        self._read_content()
        self._rules: dict[tuple[Any, ...], TokenRule] = {}  # made once, they come again

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
    def _controls(self) -> tuple[int, ...]:
        """Every id that may not come in free text, openers included."""
        ids = self.vocabulary.ids
        names = [IMAGE_PAD, "<|video_pad|>", VISION_START, VISION_END, REGION_START, REGION_END]
        controls = {ids[name] for name in names if name in ids}
        controls |= {i for token, i in ids.items() if is_coordinate(token) or is_content(token)}
        for row in BRANCH_TOKENS.values():
            controls |= {ids[token] for token in row.tokens if token in ids}
        return tuple(sorted(controls))

    def rule(
        self, state: TurnState, permitted: Sequence[str], must_call: bool = False
    ) -> TokenRule:
        """What may come next.

        Args:
            state: where the turn stands.
            permitted: branches that may be called now (``"crop"`` for regions), and kinds of
                content that may be written.
            must_call: in free text, permit nothing but a call.
        """
        if state.name == "free":
            key: tuple[Any, ...] = ("free", tuple(permitted), must_call)
        elif state.name == "after_region":
            key = ("after_region", state.num_regions < self.max_regions and "crop" in permitted)
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
        if name == "depth":
            return TokenRule(only=tuple(self._codes) if given[0] else (self._depth_end,))
        if name == "box":
            return TokenRule(only=tuple(self._pixels)[given[0] :])
        only = {
            "x1": self._x,
            "y1": self._y,
            "x2_or_end": (*self._x, self._region_end),
            "y2": self._y,
            "end": (self._region_end,),
        }
        if name in only:
            return TokenRule(only=only[name])
        return TokenRule(only=(int(name.removeprefix("forced:")),))

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

    def advance(self, state: TurnState, token_id: int) -> TurnState:
        """State behind ``token_id``. Tokens that break the grammar lead back to free text."""
        if token_id == self._region_start:
            return TurnState("x1", state.num_regions)
        if token_id in self._forced:
            return TurnState(f"forced:{self._forced[token_id]}", state.num_regions)
        if token_id == self._depth_start:
            return TurnState("depth", state.num_regions)
        if token_id in self._codes:
            return self._behind_code(state)
        if token_id in self._pixels:
            return self._behind_pixel(state, self._pixels[token_id])
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

    def _behind_code(self, state: TurnState) -> TurnState:
        num_written = state.num_written + 1
        if state.name != "depth" or num_written > self.vocabulary.content.num_cells:
            return TurnState("free", state.num_regions)
        return TurnState("depth", state.num_regions, num_written)

    def _behind_pixel(self, state: TurnState, pixel: int) -> TurnState:
        if state.name != "box":
            return TurnState("box", state.num_regions, 1, (pixel,))
        if state.num_written == 1:
            return TurnState("box", state.num_regions, 2, (*state.corner, pixel))
        if state.num_written == 2 and pixel >= state.corner[0]:
            return TurnState("box", state.num_regions, 3, state.corner)
        return TurnState("free", state.num_regions)  # the box is complete, or none


class PerceptionLogitsProcessor(LogitsProcessor):
    """The grammar for transformers' ``generate``.

    Each call reads what is new since the last one; rows that are no longer the same, as after a
    beam search's reordering, are read anew.

    Args:
        grammar: the automaton.
        prompt_length: tokens in front of the generated ones; the turn begins behind them.
        permitted: branches that may be called, and kinds of content that may be written; all of
            the vocabulary by default.
    """

    def __init__(
        self,
        grammar: PerceptionGrammar,
        prompt_length: int,
        permitted: Sequence[str] | None = None,
    ) -> None:
        self.grammar = grammar
        self.prompt_length = prompt_length
        vocabulary = grammar.vocabulary
        everything = (*vocabulary.branches, *vocabulary.content.kinds)
        self.permitted = everything if permitted is None else tuple(permitted)
        self._read: Tensor | None = None  # [B, S], what the states stand behind
        self._states: list[TurnState] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Ban what the grammar does not permit; ``scores`` is ``[B, V]``."""
        scores = scores.clone()
        for row, state in enumerate(self._advance(input_ids[:, self.prompt_length :])):
            self.grammar.rule(state, self.permitted).apply_(scores[row])
        return scores

    def _advance(self, generated: Tensor) -> list[TurnState]:
        """States behind ``[B, S]`` ids."""
        num_read = 0 if self._read is None else self._read.shape[1]
        if self._read is None or not torch.equal(generated[:, :num_read], self._read):
            num_read, self._states = 0, [TurnState()] * len(generated)
        for row, new in enumerate(generated[:, num_read:].tolist()):
            for token_id in new:
                self._states[row] = self.grammar.advance(self._states[row], token_id)
        self._read = generated
        return self._states


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from its logits.

    Attributes:
        temperature: 0 takes the likeliest token; else logits are divided by it.
        top_k: keep so many of the likeliest; 0 for all.
        top_p: keep the likeliest that hold this much probability together; 1 for all.
        seed: of the random generator, 0 to 2**64 - 1; the same seed gives the same tokens.

    Raises:
        PromptError: naming the attribute that has another type or is out of bounds.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        checked = {
            "temperature": real_number("temperature", self.temperature, 0),
            "top_k": whole_number("top_k", self.top_k, 0),
            "top_p": real_number("top_p", self.top_p, 0, 1, above=True),
            "seed": whole_number("seed", self.seed, 0, 2**64),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def generator(self) -> torch.Generator | None:
        """A fresh random generator, or ``None`` if none is needed."""
        return None if self.temperature == 0 else torch.Generator().manual_seed(self.seed)

    def choose(self, logits: Tensor, generator: torch.Generator | None) -> int:
        """Draw one id from logits ``[V]``, in float32 on the CPU, so that devices agree.

        Returns:
            The id, or ``NOT_FINITE`` if the largest logit is NaN or infinite.
        """
        if generator is None:
            return int(likeliest(logits))
        logits = logits.float().cpu()
        if not (largest := logits.max()).isfinite():
            return NOT_FINITE
        # Differences to the largest: quotients of extreme temperatures stay numbers.
        scaled = (logits - largest) / min(max(self.temperature, _FLOAT32.tiny), _FLOAT32.max)
        order = scaled.argsort(descending=True, stable=True)
        probabilities = scaled[order].softmax(-1)
        keep = probabilities.cumsum(-1) - probabilities < self.top_p
        if 0 < self.top_k < len(keep):
            keep[self.top_k :] = False
        keep[0] = True  # also where top_p is 0 in float32
        drawn = torch.multinomial(probabilities * keep, 1, generator=generator)
        return int(order[drawn])
