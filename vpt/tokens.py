"""The perception vocabulary: every token by which a model looks again, or draws what it sees.

One table (:data:`BRANCH_TOKENS`) and one grid describe the calls. Region Selection tokens name a
box of cells on a ``k x k`` grid; Vision Re-Encoding tokens name a vision branch. Token strings
are those of the released checkpoints (arXiv 2502.17425) and must not change; the code calls each
branch by what it is, the released name survives in the strings only. Perception content, which a
model writes by itself and reads on behind (arXiv 2412.03548), has the table
:data:`CONTENT_TOKENS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from vpt.boxes import GridBox
from vpt.errors import CheckpointError, DataError, PromptError, RegionError

RELEASED_GRID_SIZE = 8
_NUM_NAMED = 8  # tokens to list in a message

IMAGE_PAD = "<|image_pad|>"
VISION_START = "<|vision_start|>"
VISION_END = "<|vision_end|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
REGION_START = "<|region_token_start|>"
REGION_END = "<|region_token_end|>"


@dataclass(frozen=True)
class BranchTokens:
    """One row of the vocabulary: the tokens that call one vision branch.

    Attributes:
        branch: what the code calls it, e.g. ``"dino"``.
        released: the word the released token strings use for it, e.g. ``"detection"``.
        encoder: its name in ``config.vision_encoder_ls`` and on the command line.
    """

    branch: str
    released: str
    encoder: str

    @property
    def start(self) -> str:
        """Token that opens a call; the hidden state it produces is the control state."""
        return f"<|{self.released}_action_start|>"

    @property
    def action(self) -> str:
        """Control token; its embedding is replaced by the control state."""
        return f"<|{self.released}_action|>"

    @property
    def end(self) -> str:
        """Token that closes a call."""
        return f"<|{self.released}_action_end|>"

    @property
    def pad(self) -> str:
        """Placeholder that stands once per re-encoded feature."""
        return f"<|{self.released}_image_pad|>"

    @property
    def placeholder(self) -> str:
        """What stands for one re-encoded image in the text of a dataset."""
        return f"<{self.released}_image>"

    @property
    def call(self) -> str:
        """A whole call, as the model writes it."""
        return self.start + self.action + self.end

    @property
    def tokens(self) -> tuple[str, str, str, str]:
        """All four tokens of the branch."""
        return self.start, self.action, self.end, self.pad


BRANCH_TOKENS: dict[str, BranchTokens] = {
    row.branch: row
    for row in (
        BranchTokens(branch="reencode", released="clip", encoder="clip"),
        BranchTokens(branch="dino", released="detection", encoder="dino"),
        BranchTokens(branch="sam", released="seg", encoder="sam"),
    )
}
"""The re-encoding branches. A new one is a new row here and a file in ``branches/``."""

ENCODER_TO_BRANCH = {row.encoder: row.branch for row in BRANCH_TOKENS.values()}

INVITE_REGION = (
    "Identify the region that can help you answer the question, and then answer the question."
)
INVITE_REENCODE = "Require additional perception features, and then answer the question."

PERCEPTION_MODES = ("auto", "none", "region", "reencode", *ENCODER_TO_BRANCH)
"""Ways to ask: free choice, never, a region, any re-encoding, or one named re-encoding."""

LOOK_AT = ("first", "latest")
"""Which image a call concerns: the first one given, or the latest in the stream."""


@dataclass(frozen=True)
class PerceptionCall:
    """One request by the model to look again.

    Attributes:
        branch: ``"crop"`` or a key of :data:`BRANCH_TOKENS`.
        start: index of the call's first token in the parsed sequence.
        end: index after its last token.
        region: for ``"crop"`` the cells it names, else ``None``.
    """

    branch: str
    start: int
    end: int
    region: GridBox | None = None


@dataclass(frozen=True)
class MalformedCall:
    """Perception tokens that make no call, and why.

    Attributes:
        start: index of the first token concerned.
        end: index after the last one.
        text: the tokens as written.
        reason: what is wrong with them.
    """

    start: int
    end: int
    text: str
    reason: str


@dataclass(frozen=True)
class ParsedTurn:
    """The calls of one assistant turn, well-formed and malformed, each in reading order."""

    calls: tuple[PerceptionCall, ...]
    malformed: tuple[MalformedCall, ...]


RELEASED_DEPTH_CODES = 128
RELEASED_DEPTH_CELLS = 100
RELEASED_PIXELS = 336

DEPTH_START = "<DEPTH_START>"
DEPTH_END = "<DEPTH_END>"

_DEPTH_CODE = re.compile(r"<DEPTH_(0|[1-9][0-9]*)>")
_PIXEL = re.compile(r"<PIXEL_(0|[1-9][0-9]*)>")
_CONTENT = re.compile(r"<DEPTH_(?:START|END|[0-9]+)>|<PIXEL_[0-9]+>")


def depth_tokens(num_codes: int = RELEASED_DEPTH_CODES) -> list[str]:
    """Tokens of depth maps (Aurora, arXiv 2412.03548): start, end, and a code each."""
    return [DEPTH_START, DEPTH_END, *(f"<DEPTH_{code}>" for code in range(num_codes))]


def pixel_tokens(num_pixels: int = RELEASED_PIXELS) -> list[str]:
    """Tokens of box coordinates (Aurora): one per pixel of an image brought to this side."""
    return [f"<PIXEL_{pixel}>" for pixel in range(num_pixels)]


@dataclass(frozen=True)
class ContentTokens:
    """Perception content that a model writes: which kinds, and in which sizes.

    Attributes:
        kinds: keys of :data:`CONTENT_TOKENS`, in table order.
        num_codes: of the depth codebook.
        num_cells: codes of a depth map.
        num_pixels: side of the image in which boxes lie.
    """

    kinds: tuple[str, ...] = ()
    num_codes: int = RELEASED_DEPTH_CODES
    num_cells: int = RELEASED_DEPTH_CELLS
    num_pixels: int = RELEASED_PIXELS

    def __post_init__(self) -> None:
        if unknown := [kind for kind in self.kinds if kind not in CONTENT_TOKENS]:
            raise CheckpointError(
                f"unknown perception content {unknown[0]!r}; available: {', '.join(CONTENT_TOKENS)}"
            )
        for name in ("num_codes", "num_cells", "num_pixels"):
            if type(value := getattr(self, name)) is not int or value < 1:
                raise CheckpointError(f"expected {name} of at least 1, got {value!r}")
        ordered = tuple(kind for kind in CONTENT_TOKENS if kind in self.kinds)
        object.__setattr__(self, "kinds", ordered)

    @property
    def tokens(self) -> list[str]:
        """All tokens of these kinds, in table order."""
        return [token for kind in self.kinds for token in CONTENT_TOKENS[kind](self)]


CONTENT_TOKENS: dict[str, Callable[[ContentTokens], list[str]]] = {
    "depth": lambda content: depth_tokens(content.num_codes),
    "boxes": lambda content: pixel_tokens(content.num_pixels),
}
"""Kinds of perception content, each with the tokens it takes."""

NO_CONTENT = ContentTokens()


def coordinate_tokens(axis: str, grid_size: int = RELEASED_GRID_SIZE) -> list[str]:
    """Tokens of one axis (``"x"`` or ``"y"``), in cell order."""
    return [f"<|{axis}_{cell}|>" for cell in range(grid_size)]


def region_tokens(grid_size: int = RELEASED_GRID_SIZE) -> list[str]:
    """All Region Selection tokens, in the order the released tokenizers added them."""
    return [
        REGION_START,
        REGION_END,
        *coordinate_tokens("x", grid_size),
        *coordinate_tokens("y", grid_size),
    ]


def perception_tokens(
    branches: Iterable[str],
    grid_size: int = RELEASED_GRID_SIZE,
    content: ContentTokens = NO_CONTENT,
) -> tuple[list[str], list[str]]:
    """Tokens a model with these branches and this content needs.

    Args:
        branches: keys of :data:`BRANCH_TOKENS`.
        grid_size: cells per side of the region grid.
        content: what it writes by itself.

    Returns:
        ``(special, ordinary)``. Pads are special tokens; those the model writes are ordinary
        added tokens, so that they survive ``skip_special_tokens=True``, as released.
    """
    rows = [BRANCH_TOKENS[branch] for branch in branches]
    special = [row.pad for row in rows]
    ordinary = region_tokens(grid_size)
    for row in rows:
        ordinary += [row.start, row.action, row.end]
    return special, [*ordinary, *content.tokens]


def format_region(region: GridBox, grid_size: int = RELEASED_GRID_SIZE) -> str:
    """Write a region as tokens: ``x_min y_min x_max y_max`` between start and end.

    Raises:
        RegionError: if the region does not fit the grid.
    """
    if max(region.x_max, region.y_max) >= grid_size:
        raise RegionError(f"{region} does not fit a {grid_size}x{grid_size} grid")
    corners = f"<|x_{region.x_min}|><|y_{region.y_min}|><|x_{region.x_max}|><|y_{region.y_max}|>"
    return REGION_START + corners + REGION_END


_SYMBOL = re.compile(r"<\|[a-z_]+(?:_-?[0-9]+)?\|>")
_COORDINATE = re.compile(r"<\|([xy])_(0|[1-9][0-9]*)\|>")


def is_content(token: str) -> bool:
    """Whether a token is of a depth map or a box, of whatever size."""
    return _CONTENT.fullmatch(token) is not None


def content_value(token: str, kind: str) -> int | None:
    """The code or pixel that a token names; ``None`` if it is no such token of this kind.

    Args:
        token: any.
        kind: a key of :data:`CONTENT_TOKENS`.
    """
    found = {"depth": _DEPTH_CODE, "boxes": _PIXEL}[kind].fullmatch(token)
    return None if found is None else int(found[1])


def find_content(text: str) -> list[str]:
    """What in a text has the form of a token of a depth map or a box."""
    return _CONTENT.findall(text)


def is_coordinate(token: str) -> bool:
    """Whether a token names a column or row of some grid, of whatever size."""
    return _COORDINATE.fullmatch(token) is not None


def split_symbols(text: str) -> list[str]:
    """Cut text into control tokens and the runs of plain text between them."""
    symbols: list[str] = []
    position = 0
    for match in _SYMBOL.finditer(text):
        if match.start() > position:
            symbols.append(text[position : match.start()])
        symbols.append(match.group())
        position = match.end()
    if position < len(text):
        symbols.append(text[position:])
    return symbols


def find_symbols(text: str) -> list[str]:
    """What in a text has the form of a control token, known or not."""
    return _SYMBOL.findall(text)


def parse_turn(turn: str | Sequence[str], grid_size: int = RELEASED_GRID_SIZE) -> ParsedTurn:
    """Find the perception calls in what the model wrote. Nothing is guessed.

    A region is one or more coordinate tokens between start and end, at least one per axis; it
    spans their extremes, in whatever order they come. A re-encoding is called by its start
    token; the two tokens behind it, if they are there, belong to the call. All else that holds
    perception tokens is reported as malformed.

    Args:
        turn: text, or a sequence of symbols (one string per token; plain text may be anything
            that is not a control token, the empty string included).
        grid_size: cells per side of the region grid.
    """
    symbols = split_symbols(turn) if isinstance(turn, str) else turn
    branch_of_start = {row.start: row for row in BRANCH_TOKENS.values()}
    calls: list[PerceptionCall] = []
    malformed: list[MalformedCall] = []

    def report(start: int, end: int, reason: str) -> None:
        malformed.append(MalformedCall(start, end, "".join(symbols[start:end]), reason))

    position = 0
    while position < len(symbols):
        symbol, start = symbols[position], position
        if symbol == REGION_START:
            position = _end_of_coordinates(symbols, position + 1)
            if position < len(symbols) and symbols[position] == REGION_END:
                position += 1
                region, reason = _read_region(symbols[start + 1 : position - 1], grid_size)
                if region is not None:
                    calls.append(PerceptionCall("crop", start, position, region))
                else:
                    report(start, position, reason)
            else:
                report(start, position, "region is not closed")
        elif symbol in branch_of_start:
            row = branch_of_start[symbol]
            position += 1
            for rest in (row.action, row.end):
                if position < len(symbols) and symbols[position] == rest:
                    position += 1
            calls.append(PerceptionCall(row.branch, start, position))
        elif _is_stray(symbol):
            while position < len(symbols) and _is_stray(symbols[position]):
                position += 1
            report(start, position, "perception tokens outside a call")
        else:
            position += 1
    return ParsedTurn(tuple(calls), tuple(malformed))


def _end_of_coordinates(symbols: Sequence[str], position: int) -> int:
    while position < len(symbols) and is_coordinate(symbols[position]):
        position += 1
    return position


def _read_region(symbols: Sequence[str], grid_size: int) -> tuple[GridBox | None, str]:
    cells: dict[str, list[int]] = {"x": [], "y": []}
    for symbol in symbols:
        match = _COORDINATE.fullmatch(symbol)
        assert match is not None  # the caller stops at the first other symbol
        cells[match[1]].append(int(match[2]))
    if not symbols:
        return None, "region names no cell"
    if outside := [s for s in symbols if int(_COORDINATE.fullmatch(s)[2]) >= grid_size]:  # type: ignore[index]
        return None, f"{outside[0]} lies outside the {grid_size}x{grid_size} grid"
    for axis in "xy":
        if not cells[axis]:
            return None, f"region has no {axis} coordinate"
    x, y = cells["x"], cells["y"]
    return GridBox(min(x), min(y), max(x), max(y)), ""


_STRAY = {REGION_END} | {token for row in BRANCH_TOKENS.values() for token in (row.action, row.end)}


def _is_stray(symbol: str) -> bool:
    return symbol in _STRAY or is_coordinate(symbol)


def invite(question: str, perception: str) -> str:
    """Add the words that invite a kind of perception, as in the released training data.

    Args:
        question: what the person asks.
        perception: one of :data:`PERCEPTION_MODES`.

    Raises:
        PromptError: for an empty question or an unknown mode.
    """
    _check_mode(perception)
    if not question.strip():
        raise PromptError("the question is empty; ask something about the image")
    if perception in ("auto", "none"):
        return question
    words = INVITE_REGION if perception == "region" else INVITE_REENCODE
    return f"{question.rstrip()} {words}"


def branches_named(names: Iterable[str]) -> tuple[str, ...]:
    """Branches by their command-line names (``clip``, ``dino``, ``sam``), in table order.

    Raises:
        CheckpointError: for an unknown name.
    """
    names = list(names)
    if unknown := [name for name in names if name not in ENCODER_TO_BRANCH]:
        raise CheckpointError(
            f"unknown branch {unknown[0]!r}; available: {', '.join(ENCODER_TO_BRANCH)}"
        )
    return tuple(branch for name, branch in ENCODER_TO_BRANCH.items() if name in names)


def _check_mode(perception: str) -> None:
    if perception not in PERCEPTION_MODES:
        raise PromptError(
            f"unknown perception mode {perception!r}; available: {', '.join(PERCEPTION_MODES)}"
        )


def branches_of_mode(perception: str, available: Iterable[str]) -> tuple[str, ...]:
    """Branches a perception mode permits, out of those a model has.

    Args:
        perception: one of :data:`PERCEPTION_MODES`.
        available: branches of the model, ``"crop"`` among them if it knows region tokens.

    Raises:
        PromptError: for an unknown mode, or one that needs a branch the model lacks.
    """
    _check_mode(perception)
    available = tuple(available)
    if perception == "auto":
        return available
    if perception == "none":
        return ()
    if perception == "region":
        wanted: tuple[str, ...] = ("crop",)
    elif perception == "reencode":
        wanted = tuple(branch for branch in available if branch in BRANCH_TOKENS)
    else:
        wanted = (ENCODER_TO_BRANCH[perception],)
    if not wanted or not set(wanted) <= set(available):
        names = [BRANCH_TOKENS[b].encoder if b in BRANCH_TOKENS else "region" for b in available]
        raise PromptError(
            f"this model cannot do perception={perception!r}; it has: {', '.join(names) or 'none'}"
        )
    return wanted


@dataclass(frozen=True)
class Vocabulary:
    """Ids of the control tokens of one tokenizer.

    Attributes:
        ids: token string -> id, for every control token the tokenizer has.
        branches: what the tokens permit: ``"crop"`` and keys of :data:`BRANCH_TOKENS`.
        grid_size: cells per side of the region grid.
        size: number of ids the tokenizer can write; rows of the head beyond are unused.
        content: what the model writes by itself.
    """

    ids: Mapping[str, int]
    branches: tuple[str, ...]
    grid_size: int
    size: int
    content: ContentTokens = NO_CONTENT
    _symbols: Mapping[int, str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_symbols", {i: token for token, i in self.ids.items()})

    @classmethod
    def from_tokenizer(
        cls,
        tokenizer: object,
        branches: Iterable[str],
        grid_size: int = RELEASED_GRID_SIZE,
        content: ContentTokens = NO_CONTENT,
    ) -> Vocabulary:
        """Look the control tokens up.

        Args:
            tokenizer: a transformers tokenizer.
            branches: re-encoding branches the model has; their tokens must be there.
            grid_size: cells per side; ``"crop"`` is permitted if the region tokens are there.
            content: what the model writes by itself; its tokens must be there.

        Raises:
            CheckpointError: if a token that the model needs is missing.
        """
        known: dict[str, int] = tokenizer.get_vocab()  # type: ignore[attr-defined]
        branches = tuple(branches)
        needed = [IMAGE_PAD, VISION_START, VISION_END, TURN_START, TURN_END]
        needed += [token for branch in branches for token in BRANCH_TOKENS[branch].tokens]
        needed += content.tokens
        if missing := [token for token in needed if token not in known]:
            some = ", ".join(missing[:_NUM_NAMED]) + (", ..." if missing[_NUM_NAMED:] else "")
            raise CheckpointError(
                f"the tokenizer lacks {some}; add them with `vpt init`, "
                "or use the tokenizer that was saved with the model"
            )
        region = region_tokens(grid_size)
        has_region = all(token in known for token in region)
        optional = [*region, "<|video_pad|>", "<|endoftext|>"]
        optional += [token for token in known if is_coordinate(token) or is_content(token)]
        optional += [token for row in BRANCH_TOKENS.values() for token in row.tokens]
        ids = {token: known[token] for token in [*needed, *optional] if token in known}
        permitted = (("crop",) if has_region else ()) + branches
        return cls(ids, permitted, grid_size, len(tokenizer), content)  # type: ignore[arg-type]

    def symbols(self, token_ids: Iterable[int]) -> list[str]:
        """Control-token strings of ``token_ids``; ``""`` for every other token."""
        return [self._symbols.get(token_id, "") for token_id in token_ids]

    def opener(self, branch: str) -> int:
        """Id of the token that opens a call of ``branch``."""
        token = REGION_START if branch == "crop" else BRANCH_TOKENS[branch].start
        return self.ids[token]


def format_depth(
    codes: Sequence[int],
    num_codes: int = RELEASED_DEPTH_CODES,
    num_cells: int = RELEASED_DEPTH_CELLS,
) -> str:
    """Write the codes of a depth map as tokens.

    Args:
        codes: in reading order.
        num_codes: of the codebook.
        num_cells: codes of a map.

    Raises:
        DataError: for another number of codes, or one that the codebook lacks.
    """
    _check_depth_codes(codes, num_codes, num_cells)
    return "".join([DEPTH_START, *(f"<DEPTH_{code}>" for code in codes), DEPTH_END])


def parse_depth(
    text: str, num_codes: int = RELEASED_DEPTH_CODES, num_cells: int = RELEASED_DEPTH_CELLS
) -> tuple[int, ...]:
    """Read the codes of a text that is one depth map; space between tokens does not matter.

    Args:
        text: as :func:`format_depth` writes it.
        num_codes: of the codebook.
        num_cells: codes of a map.

    Raises:
        DataError: if something else stands in it, for another number of codes, or one that the
            codebook lacks.
    """
    inner = text.strip()
    if not (inner.startswith(DEPTH_START) and inner.endswith(DEPTH_END)):
        raise DataError(f"expected {DEPTH_START} ... {DEPTH_END}, got {_short(inner)}")
    inner = inner[len(DEPTH_START) : -len(DEPTH_END)]
    if rest := _DEPTH_CODE.sub(" ", inner).split():
        raise DataError(f"expected only codes as <DEPTH_0> in a depth map, got {_short(rest[0])}")
    codes = tuple(int(code) for code in _DEPTH_CODE.findall(inner))
    _check_depth_codes(codes, num_codes, num_cells)
    return codes


def _check_depth_codes(codes: Sequence[int], num_codes: int, num_cells: int) -> None:
    if len(codes) != num_cells:
        raise DataError(f"expected a depth map of {num_cells} codes, got {len(codes)}")
    if unknown := [code for code in codes if not 0 <= code < num_codes]:
        raise DataError(f"unknown depth code {unknown[0]}; the codebook has 0 to {num_codes - 1}")


def format_pixel_box(box: Sequence[int], num_pixels: int = RELEASED_PIXELS) -> str:
    """Write a box as four tokens.

    Args:
        box: left, top, right, bottom, in pixels of the image brought to ``num_pixels`` a side;
            all four are pixels of the image.
        num_pixels: side of that image.

    Raises:
        RegionError: if this is no box of that image.
    """
    _check_pixel_box(box, num_pixels)
    return "".join(f"<PIXEL_{value}>" for value in box)


def parse_pixel_boxes(
    text: str, num_pixels: int = RELEASED_PIXELS
) -> tuple[tuple[int, int, int, int], ...]:
    """Find the boxes of a text, in reading order; other text may stand around each.

    Args:
        text: with runs of pixel tokens, four per box; space within a run does not matter.
        num_pixels: side of the image they lie in.

    Raises:
        RegionError: if a run is no whole number of boxes, or one lies outside the image.
    """
    boxes: list[tuple[int, int, int, int]] = []
    for run in re.finditer(rf"(?:{_PIXEL.pattern}\s*)+", text):
        values = [int(value) for value in _PIXEL.findall(run[0])]
        if len(values) % 4:
            raise RegionError(
                f"expected four pixel tokens per box, got {len(values)} in {_short(run[0])}"
            )
        for x0, y0, x1, y1 in zip(*(values[i::4] for i in range(4)), strict=True):
            _check_pixel_box((x0, y0, x1, y1), num_pixels)
            boxes.append((x0, y0, x1, y1))
    return tuple(boxes)


def _check_pixel_box(box: Sequence[int], num_pixels: int) -> None:
    if len(box) != 4:
        raise RegionError(f"expected left, top, right, bottom, got {len(box)} numbers")
    x0, y0, x1, y1 = box
    if not (0 <= x0 <= x1 < num_pixels and 0 <= y0 <= y1 < num_pixels):
        raise RegionError(
            f"expected a box within 0 to {num_pixels - 1}, left to right and top to bottom, "
            f"got {tuple(box)}"
        )


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:30]}...")
