"""The perception vocabulary: every token by which a model looks again, or draws what it sees.

Region Selection tokens name a box of cells on a ``k x k`` grid; Vision Re-Encoding tokens name a
vision branch (:data:`BRANCH_TOKENS`); grounding tokens, which no released model has, hold a phrase
to look for. Token strings are those of the released checkpoints (arXiv 2502.17425) and must not
change; only they use released names of branches. Perception content, which a model writes itself
(arXiv 2412.03548), has the table :data:`CONTENT_TOKENS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from vpt.errors import CheckpointError, PromptError

RELEASED_GRID_SIZE = 8

IMAGE_PAD = "<|image_pad|>"
VISION_START = "<|vision_start|>"
VISION_END = "<|vision_end|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"

DEFAULT_SYSTEM = "You are a helpful assistant."
"""The system message of Qwen2-VL, where none is given."""

REGION_START = "<|region_token_start|>"
REGION_END = "<|region_token_end|>"

GROUNDING = "grounding"
"""The branch whose call holds words: a detector finds the phrase, and the result is its crop."""

GROUND_START = "<|ground_start|>"
GROUND_END = "<|ground_end|>"
GROUND_TOKENS = (GROUND_START, GROUND_END)


@dataclass(frozen=True)
class BranchRow:
    """One vision branch: everything about it that is plain data.

    Attributes:
        branch: its name in code, traces and folders, e.g. ``"dino"``.
        released: its name in the released token strings, e.g. ``"detection"``.
        encoder: its name on the command line and in ``config.vision_encoder_ls``.
        title: its name in sentences and on pages.
        home: ``"module:class"`` of the branch, see :class:`vpt.branches.Branch`.
        stem: of its projector, see :class:`vpt.model.projectors.Projector`.
        arguments: names of its pixels in the model's ``forward``, in the order of ``encode``.
        resolution: field of the configuration that limits the longer side of an image.
        source: folder or hub id of the encoder in a new model, if it has one.
        side_files: files beside a released checkpoint: encoder settings, preprocessing.
    """

    branch: str
    released: str
    encoder: str
    title: str
    home: str
    stem: str
    arguments: tuple[str, ...]
    resolution: str = "image_resolution"
    source: str | None = None
    side_files: tuple[str, str] | None = None

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
        """Placeholder that is repeated per re-encoded feature."""
        return f"<|{self.released}_image_pad|>"

    @property
    def placeholder(self) -> str:
        """Placeholder of one re-encoded image in the text of a dataset."""
        return f"<{self.released}_image>"

    @property
    def column(self) -> str:
        """Column of a dataset row that lists the re-encoded images."""
        return f"{self.released}_images"

    @property
    def call(self) -> str:
        """A whole call, as the model writes it."""
        return self.start + self.action + self.end

    @property
    def tokens(self) -> tuple[str, str, str, str]:
        """All four tokens of the branch."""
        return self.start, self.action, self.end, self.pad

    @property
    def id_fields(self) -> dict[str, str]:
        """Fields of the configuration that hold a token id -> the token."""
        return {
            f"{self.released}_image_token_id": self.pad,
            f"{self.released}_action_id": self.action,
            f"{self.released}_action_start_id": self.start,
        }


TOWER = "reencode"
"""The branch of the backbone's own vision tower."""

PLAIN = "image"
"""Images as they are given, and crops: encoded by the same tower, perhaps at another size."""

BRANCH_TOKENS: dict[str, BranchRow] = {
    row.branch: row
    for row in (
        BranchRow(
            branch=TOWER,
            released="clip",
            encoder="clip",
            title="its own tower",
            home="vpt.branches.reencode:ReencodeBranch",
            stem="identity",
            arguments=("clip_pixel_values", "clip_images_grid_thw"),
        ),
        BranchRow(
            branch="dino",
            released="detection",
            encoder="dino",
            title="DINOv2",
            home="vpt.branches.dino:DinoBranch",
            stem="linear",
            arguments=("detection_images",),
            source="facebook/dinov2-large",
            side_files=("dinov2_config.json", "dinov2_preprocessor_config.json"),
        ),
        BranchRow(
            branch="sam",
            released="seg",
            encoder="sam",
            title="SAM",
            home="vpt.branches.sam:SamBranch",
            stem="conv",
            arguments=("seg_images",),
            resolution="seg_image_resolution",
            source="facebook/sam-vit-large",
            side_files=("sam_vision_config.json", "sam_preprocessor_config.json"),
        ),
    )
}
"""The re-encoding branches. A new one is a row here and a class in ``branches/``: everything else
is derived from the row when it is needed."""


def encoder_names() -> tuple[str, ...]:
    """Command-line names of the re-encoding branches, in table order."""
    return tuple(row.encoder for row in BRANCH_TOKENS.values())


INVITE_REGION = (
    "Identify the region that can help you answer the question, and then answer the question."
)
INVITE_REENCODE = "Require additional perception features, and then answer the question."

ANY_REENCODING = "reencode"
"""The perception mode that asks for a re-encoding by any branch that the model chooses."""


class _Modes(Sequence[str]):
    """A view of the branch table, after the modes that name no branch."""

    def __getitem__(self, index: Any) -> Any:
        return ("auto", "none", "crop", GROUNDING, ANY_REENCODING, *encoder_names())[index]

    def __len__(self) -> int:
        return 5 + len(BRANCH_TOKENS)


PERCEPTION_MODES: Sequence[str] = _Modes()
"""Ways to ask: free choice, no call, a crop, a phrase, any re-encoding, or by the named branch."""

LOOK_AT = ("first", "latest")
"""Which image a call concerns: the first one given, or the latest in the stream."""


RELEASED_DEPTH_CODES = 128
RELEASED_DEPTH_CELLS = 100
RELEASED_PIXELS = 336

DEPTH_START = "<DEPTH_START>"
DEPTH_END = "<DEPTH_END>"

DEPTH_CODE = re.compile(r"<DEPTH_(0|[1-9][0-9]*)>")
PIXEL = re.compile(r"<PIXEL_(0|[1-9][0-9]*)>")
_CONTENT = re.compile(r"<DEPTH_(?:START|END|[0-9]+)>|<PIXEL_[0-9]+>")


def depth_tokens(num_codes: int = RELEASED_DEPTH_CODES) -> list[str]:
    """Tokens of depth maps (Aurora, arXiv 2412.03548): start, end, and a code each."""
    return [DEPTH_START, DEPTH_END, *(f"<DEPTH_{code}>" for code in range(num_codes))]


def pixel_tokens(num_pixels: int = RELEASED_PIXELS) -> list[str]:
    """Tokens of box coordinates (Aurora): one per pixel of a side of the resized image."""
    return [f"<PIXEL_{pixel}>" for pixel in range(num_pixels)]


@dataclass(frozen=True)
class ContentTokens:
    """Perception content that a model writes: which kinds, and in which sizes.

    Attributes:
        kinds: keys of :data:`CONTENT_TOKENS`, in table order.
        num_codes: of the depth codebook.
        num_cells: codes of a depth map.
        num_pixels: side of the image that boxes are in.
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
"""Content of a model that writes neither depth maps nor boxes."""


def coordinate_tokens(axis: str, grid_size: int = RELEASED_GRID_SIZE) -> list[str]:
    """Tokens of one axis (``"x"`` or ``"y"``), in cell order."""
    return [f"<|{axis}_{cell}|>" for cell in range(grid_size)]


def region_tokens(grid_size: int = RELEASED_GRID_SIZE) -> list[str]:
    """All Region Selection tokens, in the order the released tokenizers added them."""
    coordinates = coordinate_tokens("x", grid_size) + coordinate_tokens("y", grid_size)
    return [REGION_START, REGION_END, *coordinates]


def perception_tokens(
    branches: Iterable[str],
    grid_size: int = RELEASED_GRID_SIZE,
    content: ContentTokens = NO_CONTENT,
    grounding: bool = False,
) -> tuple[list[str], list[str]]:
    """Tokens that a model with these branches and this content needs.

    Args:
        grounding: whether it looks for phrases.

    Returns:
        ``(special, ordinary)``. Pads are special tokens; those the model writes are ordinary
        added tokens, so that they survive ``skip_special_tokens=True``, as released.
    """
    rows = [BRANCH_TOKENS[branch] for branch in branches]
    ordinary = [token for row in rows for token in (row.start, row.action, row.end)]
    ordinary += GROUND_TOKENS if grounding else ()
    return [row.pad for row in rows], [*region_tokens(grid_size), *ordinary, *content.tokens]


_COORDINATE = re.compile(r"<\|([xy])_(0|[1-9][0-9]*)\|>")


def is_content(token: str) -> bool:
    """Whether a token is of a depth map or a box, of whatever size."""
    return _CONTENT.fullmatch(token) is not None


def content_value(token: str, kind: str) -> int | None:
    """The code (kind ``"depth"``) or pixel (``"boxes"``) that a token names; else ``None``."""
    found = {"depth": DEPTH_CODE, "boxes": PIXEL}[kind].fullmatch(token)
    return None if found is None else int(found[1])


def find_content(text: str) -> list[str]:
    """Find what has the form of a token of a depth map or a box."""
    return _CONTENT.findall(text)


def is_coordinate(token: str) -> bool:
    """Whether a token names a column or row of some grid, of whatever size."""
    return read_coordinate(token) is not None


def read_coordinate(token: str) -> tuple[str, int] | None:
    """Axis, ``"x"`` or ``"y"``, and number of the column or row; ``None`` if it names none."""
    match = _COORDINATE.fullmatch(token)
    return None if match is None else (match[1], int(match[2]))


def invite(question: str, perception: str) -> str:
    """Add the sentence that invites a kind of perception, as in the released training data.

    Args:
        perception: any name of a mode.

    Raises:
        PromptError: for an empty question or an unknown mode.
    """
    mode = perception_mode(perception)
    if not question.strip():
        raise PromptError("the question is empty; ask something about the image")
    if mode in ("auto", "none"):
        return question
    is_place = mode in ("crop", GROUNDING)
    return f"{question.rstrip()} {INVITE_REGION if is_place else INVITE_REENCODE}"


def find_branch(name: str) -> str | None:
    """The re-encoding branch of this name: its own, its command-line or its released one."""
    rows = BRANCH_TOKENS.values()
    return next((r.branch for r in rows if name in (r.branch, r.encoder, r.released)), None)


def branches_named(names: Iterable[str]) -> tuple[str, ...]:
    """Branches by any of their names, in table order.

    Raises:
        CheckpointError: for an unknown name.
    """
    found = {name: find_branch(name) for name in names}
    if unknown := [name for name, branch in found.items() if branch is None]:
        raise CheckpointError(
            f"unknown branch {unknown[0]!r}; available: {', '.join(encoder_names())}"
        )
    return tuple(branch for branch in BRANCH_TOKENS if branch in found.values())


def canonical_mode(name: str) -> str:
    """The perception mode of this name; a name that no mode has is returned as it is.

    Older and released names are accepted: ``"region"`` for ``"crop"``, ``"detection"`` for
    ``"dino"``, ``"seg"`` for ``"sam"``.
    """
    if name in PERCEPTION_MODES:
        return name
    if name == "region":
        return "crop"
    branch = find_branch(name)
    return name if branch is None else BRANCH_TOKENS[branch].encoder


def perception_mode(name: str) -> str:
    """The perception mode of this name; ``PromptError`` for a name that no mode has."""
    if (mode := canonical_mode(name)) not in PERCEPTION_MODES:
        raise PromptError(
            f"unknown perception mode {name!r}; available: {', '.join(PERCEPTION_MODES)}"
        )
    return mode


def branches_of_mode(perception: str, available: Iterable[str]) -> tuple[str, ...]:
    """Branches that a perception mode permits, out of those a model has, re-encoding or not.

    Raises:
        PromptError: if the mode is unknown, or the model has no branch for it.
    """
    mode = perception_mode(perception)
    available = tuple(available)
    if mode == "auto":
        return available
    if mode == "none":
        return ()
    if mode in ("crop", GROUNDING):
        wanted: tuple[str, ...] = (mode,)
    elif mode == ANY_REENCODING:
        wanted = tuple(branch for branch in available if branch in BRANCH_TOKENS)
    else:
        wanted = branches_named([mode])
    if not wanted or not set(wanted) <= set(available):
        modes = [BRANCH_TOKENS[one].encoder if one in BRANCH_TOKENS else one for one in available]
        has = ", ".join(modes) or "none"
        needs = ". A phrase needs its tokens and a detector" if mode == GROUNDING else ""
        raise PromptError(f"this model cannot do perception={mode!r}; it has: {has}{needs}")
    return wanted


@dataclass(frozen=True)
class Vocabulary:
    """Ids of the control tokens of one tokenizer.

    Attributes:
        ids: token string -> id, for every control token the tokenizer has.
        branches: what the tokens permit: ``"crop"``, ``"grounding"`` and keys of
            :data:`BRANCH_TOKENS`.
        size: number of ids the tokenizer can write; rows of the head beyond are unused.
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
        """Look the control tokens up; crops and grounding are permitted if their tokens exist.

        Raises:
            CheckpointError: if a token of the branches or the content is missing.
        """
        known: dict[str, int] = tokenizer.get_vocab()  # type: ignore[attr-defined]
        branches = tuple(branches)
        needed = [IMAGE_PAD, VISION_START, VISION_END, TURN_START, TURN_END]
        needed += [token for branch in branches for token in BRANCH_TOKENS[branch].tokens]
        needed += content.tokens
        if missing := [token for token in needed if token not in known]:
            some = ", ".join(missing[:8]) + (", ..." if missing[8:] else "")
            raise CheckpointError(
                f"the tokenizer lacks {some}; add them with `vpt init`, "
                "or use the tokenizer that was saved with the model"
            )
        region = region_tokens(grid_size)
        has_region = all(token in known for token in region)
        optional = [*region, *GROUND_TOKENS, "<|video_pad|>", "<|endoftext|>"]
        optional += [token for token in known if is_coordinate(token) or is_content(token)]
        optional += [token for row in BRANCH_TOKENS.values() for token in row.tokens]
        ids = {token: known[token] for token in [*needed, *optional] if token in known}
        grounding = (GROUNDING,) if all(token in known for token in GROUND_TOKENS) else ()
        permitted = (("crop",) if has_region else ()) + grounding + branches
        return cls(ids, permitted, grid_size, len(tokenizer), content)  # type: ignore[arg-type]

    def symbols(self, token_ids: Iterable[int]) -> list[str]:
        """Control-token strings of ``token_ids``; ``""`` for every other token."""
        return [self._symbols.get(token_id, "") for token_id in token_ids]

    def opener(self, branch: str) -> int:
        """Id of the token that opens a call of ``branch``."""
        own = {"crop": REGION_START, GROUNDING: GROUND_START}
        return self.ids[own.get(branch) or BRANCH_TOKENS[branch].start]

    def without(self, branch: str) -> Vocabulary:
        """The same tokens, of which those of a branch may not be written."""
        return replace(self, branches=tuple(one for one in self.branches if one != branch))
