"""The record of a run: everything the model saw, said and called for, as plain JSON.

Server, demo, evaluation and pictures all read this one record.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from vpt.errors import PromptError
from vpt.images import LoadedImage
from vpt.trace_checks import check_trace

TRACE_VERSION = 1
THUMBNAIL_SIDE = 768


@dataclass
class ImageRecord:
    """An image in the stream, given or cut out.

    Attributes:
        source: where it came from.
        size_wh: in pixels, oriented.
        digest: of its content.
        parent: for a crop, index of the image it was cut from.
        box_xyxy_px: for a crop, its box in pixels of the *given* image it stems from.
        num_tokens: it takes in the stream.
        thumbnail: JPEG as a data URI, longer side at most 768 px; ``None`` if not kept.
    """

    source: str
    size_wh: tuple[int, int]
    digest: str
    parent: int | None = None
    box_xyxy_px: tuple[int, int, int, int] | None = None
    num_tokens: int = 0
    thumbnail: str | None = None


@dataclass
class CallRecord:
    """One perception call and what came of it.

    Attributes:
        branch: ``"crop"`` or a re-encoding branch.
        text: the tokens as written.
        turn: index of the assistant turn that made it.
        image: index of the image it looks at.
        outcome: ``"executed"``, ``"repeated"`` (the same call as the one before) or
            ``"not_executed"`` (the run had to end); only the first brings something back.
        region: cells ``[x_min, y_min, x_max, y_max]``, ends included, for ``"crop"``.
        box_xyxy_px: the cut box in pixels of the given image, for ``"crop"``.
        result_image: index of the image cut out, for ``"crop"``.
        grid_hw: of the appended tokens.
        scores: ``[h * w]``, row-major: answer of each place to the control state.
        num_tokens: that brought features take in the stream.
        reused: whether the features were at hand.
        encode_ms: wall time of the encoders, for all calls of the turn together.
        run_ms: wall time of the LLM over what was appended, likewise.
    """

    branch: str
    text: str
    turn: int
    image: int
    outcome: str
    region: tuple[int, int, int, int] | None = None
    box_xyxy_px: tuple[int, int, int, int] | None = None
    result_image: int | None = None
    grid_hw: tuple[int, int] | None = None
    scores: list[float] | None = None
    num_tokens: int = 0
    reused: bool = False
    encode_ms: float = 0.0
    run_ms: float = 0.0


@dataclass
class MalformedRecord:
    """Perception tokens that made no call.

    Attributes:
        text: the tokens as written.
        turn: index of the assistant turn.
        reason: what was wrong.
    """

    text: str
    turn: int
    reason: str


@dataclass
class TokenRecord:
    """One generated token.

    Attributes:
        id: in the vocabulary.
        text: of it alone.
        turn: index of the assistant turn.
        ms: since the token before, or since the start of the run for the first.
    """

    id: int
    text: str
    turn: int
    ms: float


@dataclass
class Turn:
    """What happened in one assistant turn.

    Attributes:
        tokens: as written.
        malformed: perception tokens among them that made no call.
        calls: it made, each with its number in the run, from 1.
    """

    tokens: list[TokenRecord] = field(default_factory=list)
    malformed: list[MalformedRecord] = field(default_factory=list)
    calls: list[tuple[int, CallRecord]] = field(default_factory=list)


@dataclass
class Counts:
    """Sizes of a run, in tokens and images.

    Attributes:
        prompt_tokens: before the first answer token, images included.
        appended_tokens: brought by calls, template included.
        generated_tokens: chosen by the model.
        llm_tokens: read by the LLM in all.
        images_encoded: images that cost encoder work.
        images_reused: images whose features were at hand.
    """

    prompt_tokens: int = 0
    appended_tokens: int = 0
    generated_tokens: int = 0
    llm_tokens: int = 0
    images_encoded: int = 0
    images_reused: int = 0


@dataclass
class Timings:
    """Wall times of a run in milliseconds.

    Attributes:
        first_token: from the start to the first token.
        prefill: of the prompt, encoders included.
        total: from start to stop.
    """

    first_token: float = 0.0
    prefill: float = 0.0
    total: float = 0.0


@dataclass
class Trace:
    """A whole run.

    Attributes:
        question: as asked.
        perception: mode.
        settings: budgets, decoding and seed, size of the region grid.
        model: its name, and the preprocessing of its branches.
        images: given ones first, then crops in the order they were made.
        calls: in order.
        malformed: in order.
        tokens: every generated token.
        answer: text of the last turn, without control tokens.
        turns: text of each assistant turn, control tokens included.
        stop_reason: ``"stop"``, ``"length"``, ``"max_calls"`` or ``"repeated_call"``.
        counts: sizes.
        timings: wall times.
        version: of this layout.
    """

    question: str
    perception: str
    settings: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    images: list[ImageRecord] = field(default_factory=list)
    calls: list[CallRecord] = field(default_factory=list)
    malformed: list[MalformedRecord] = field(default_factory=list)
    tokens: list[TokenRecord] = field(default_factory=list)
    answer: str = ""
    turns: list[str] = field(default_factory=list)
    stop_reason: str = ""
    counts: Counts = field(default_factory=Counts)
    timings: Timings = field(default_factory=Timings)
    version: int = TRACE_VERSION

    def add_image(
        self,
        image: LoadedImage,
        parent: int | None = None,
        box_xyxy_px: tuple[int, int, int, int] | None = None,
    ) -> int:
        """Record an image; returns its index."""
        self.images.append(
            ImageRecord(image.source, image.size_wh, image.digest, parent, box_xyxy_px)
        )
        return len(self.images) - 1

    def keep_thumbnails(self, images: Sequence[LoadedImage]) -> None:
        """Store small copies of the images, so that the trace can be drawn alone.

        Args:
            images: the given ones, in order; crops are cut out of them again.
        """
        given = [record for record in self.images if record.parent is None]
        for record, image in zip(given, images, strict=False):
            record.thumbnail = _thumbnail(image.pixels)
        if self.settings.get("replace_looks") == "blank":  # what was seen cannot be cut out
            return
        for index, record in enumerate(self.images):
            if record.box_xyxy_px is not None and (root := self.root(index)) < len(images):
                record.thumbnail = _thumbnail(images[root].pixels.crop(record.box_xyxy_px))

    def root(self, index: int) -> int:
        """Index of the given image that an image stems from."""
        while (parent := self.images[index].parent) is not None:
            index = parent
        return index

    def timeline(self) -> list[Turn]:
        """The token stream behind the prompt, turn by turn, as far as it has come."""
        records: list[Any] = [*self.tokens, *self.malformed, *self.calls]
        turns = [Turn() for _ in range(max((record.turn for record in records), default=-1) + 1)]
        for token in self.tokens:
            turns[token.turn].tokens.append(token)
        for bad in self.malformed:
            turns[bad.turn].malformed.append(bad)
        for number, call in enumerate(self.calls, 1):
            turns[call.turn].calls.append((number, call))
        return turns

    def to_json(self) -> str:
        """The whole record as JSON text."""
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable content."""
        return dataclasses.asdict(self)

    def save(self, path: str | Path) -> None:
        """Write as JSON."""
        # A file name may hold bytes that are no text; JSON has an escape for them.
        Path(path).write_text(self.to_json(), encoding="utf-8", errors="backslashreplace")

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Trace:
        """Read what :meth:`to_dict` wrote.

        Raises:
            PromptError: if it is no trace, or one of another version.
        """
        if content.get("version") != TRACE_VERSION:
            raise PromptError(
                f"expected a trace of version {TRACE_VERSION}, got {content.get('version')!r}; "
                "make it again with this release"
            )
        content = dict(content)
        try:
            for name, record in _RECORD_LISTS.items():
                content[name] = [record(**_tuples(entry)) for entry in content[name]]
            content["counts"] = Counts(**content["counts"])
            content["timings"] = Timings(**content["timings"])
            trace = cls(**content)
        except (AttributeError, KeyError, TypeError) as exc:
            raise PromptError(f"not a trace: {exc}") from exc
        check_trace(trace)
        return trace

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Read a trace file.

        Raises:
            PromptError: if it is no trace.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, RecursionError, ValueError) as exc:
            raise PromptError(f"cannot read the trace {Path(path).name}: {exc}") from exc
        if not isinstance(content, dict):
            raise PromptError(f"{Path(path).name} is not a trace: expected a JSON object")
        return cls.from_dict(content)


_RECORD_LISTS: dict[str, type[Any]] = {
    "images": ImageRecord,
    "calls": CallRecord,
    "malformed": MalformedRecord,
    "tokens": TokenRecord,
}
_TUPLE_FIELDS = {"size_wh", "box_xyxy_px", "region", "grid_hw"}


def _tuples(entry: dict[str, Any]) -> dict[str, Any]:
    """JSON knows lists only; give the fixed-length fields their type back."""
    return {
        key: tuple(value) if key in _TUPLE_FIELDS and value is not None else value
        for key, value in entry.items()
    }


def _thumbnail(pixels: Image.Image) -> str:
    small = pixels.copy()
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
