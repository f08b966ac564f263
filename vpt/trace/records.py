"""The record of a run: everything the model saw, wrote and called for, as plain JSON.

Types and bounds are checked when a saved trace is loaded, not while a run is recorded.
"""

from __future__ import annotations

import base64
import inspect
import io
import json
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import AfterValidator, ConfigDict, Field

from vpt.errors import PromptError
from vpt.images import LoadedImage
from vpt.protocol.tokens import canonical_mode
from vpt.trace.reading import check_settings, check_trace, read_record, record_schema

TRACE_VERSION: Final = 1
THUMBNAIL_SIDE = 768
MOST_BYTES = 32 * 2**20  # of a saved trace
DEPTH_SIDE = 160  # a decoded map has 10 x 10 codes, so it is smooth

# Larger numbers are damage, and would ask for much memory or time.
Whole = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
TurnIndex = Annotated[int, Field(strict=True, ge=0, lt=10_000)]
Milliseconds = Annotated[float, Field(strict=True, gt=-1e12, lt=1e12)]
ScoreValue = Annotated[float, Field(strict=True)]  # infinite too: a model can compute it so
Flag = Annotated[bool, Field(strict=True)]
Corners = tuple[Whole, Whole, Whole, Whole]
JSONObject = Annotated[dict[str, Any], AfterValidator(check_settings)]


def _describe(schema: dict[str, Any], record: type) -> None:
    schema["description"] = inspect.getdoc(record)


class _Record:
    """Rules by which the fields of a saved record are read."""

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid", json_schema_extra=_describe)


@dataclass
class MessageRecord(_Record):
    """An earlier turn of the conversation, of the ``user`` or the ``assistant``."""

    role: str
    text: str
    num_images: Whole = 0


@dataclass
class ImageRecord(_Record):
    """An image in the stream, given or cut out.

    Attributes:
        size_wh: in pixels, oriented.
        parent: for a crop, index of the image it was cut from.
        box_xyxy_px: for a crop, its box in pixels of the *given* image it stems from.
        thumbnail: JPEG as a data URI, longer side at most 768 px; ``None`` if not kept.
        seen_wh: size in pixels to which it was resized for the model; ``None`` if not recorded.
        object_share: of a crop narrowed to an object, the share of its pixels that are of it; the
            others are dimmed.
    """

    source: str
    size_wh: tuple[Whole, Whole]
    digest: str
    parent: Whole | None = None
    box_xyxy_px: Corners | None = None
    num_tokens: Whole = 0
    thumbnail: str | None = field(default=None, repr=False)
    seen_wh: tuple[Whole, Whole] | None = None
    object_share: ScoreValue | None = None


@dataclass
class CallRecord(_Record):
    """One perception call and its result.

    Attributes:
        branch: ``"crop"``, ``"grounding"`` or a re-encoding branch.
        text: the tokens as written.
        image: index of the image it looks at.
        outcome: ``"executed"``, ``"repeated"`` (the same call as the one before), ``"not_found"``
            (the detector did not find the phrase) or ``"not_executed"`` (the run had to end); only
            the first returns an image or features.
        region: cells ``[x_min, y_min, x_max, y_max]``, ends included, of a ``"crop"``, or around
            the box that a phrase found.
        box_xyxy_px: the cut box in pixels of the given image.
        result_image: index of the image cut out.
        grid_hw: ``(h, w)`` of the appended tokens.
        scores: ``[h * w]``, row-major: similarity of each cell to the control state.
        num_tokens: appended to the stream as features.
        reused: whether the features were cached.
        encode_ms: wall time of the encoders, for all calls of the turn together.
        run_ms: wall time of the LLM over the appended tokens, for all calls of the turn together.
        phrase: of a ``"grounding"`` call.
    """

    branch: str
    text: str
    turn: TurnIndex
    image: Whole
    outcome: str
    region: Corners | None = None
    box_xyxy_px: Corners | None = None
    result_image: Whole | None = None
    grid_hw: tuple[Whole, Whole] | None = None
    scores: list[ScoreValue] | None = field(default=None, repr=False)
    num_tokens: Whole = 0
    reused: Flag = False
    encode_ms: Milliseconds = 0.0
    run_ms: Milliseconds = 0.0
    phrase: str | None = None

    @property
    def is_answered(self) -> bool:
        """Whether something is appended: a look, or that the phrase was not found."""
        return self.outcome in ("executed", "not_found")


@dataclass
class ContentRecord(_Record):
    """A depth map, or consecutive boxes, written by the model.

    Attributes:
        kind: ``"depth"`` or ``"boxes"``.
        image: index of its image.
        start: index of its first token in the trace's tokens.
        end: index after its last token.
        is_whole: whether it is complete; else the token limit cut it off.
        codes: of a depth map, in reading order.
        boxes: left, top, right, bottom, ends included, in pixels of the image resized to
            ``settings["num_pixels"]`` a side.
        boxes_xyxy_px: the same in pixels of the *given* image, the last two exclusive.
        picture: of a decoded depth map, a grey PNG as a data URI; near is bright.
    """

    kind: str
    turn: TurnIndex
    image: Whole
    start: Whole
    end: Whole
    is_whole: Flag
    ms: Milliseconds = 0.0
    codes: list[Whole] | None = field(default=None, repr=False)
    boxes: list[Corners] | None = None
    boxes_xyxy_px: list[Corners] | None = None
    picture: str | None = field(default=None, repr=False)

    def keep_depth_map(self, decode: Callable[[Sequence[int]], NDArray[np.float32]]) -> None:
        """Store the map that the codes represent, if it is a whole depth map.

        Args:
            decode: codes -> ``[H, W]``, 0 (farthest) to 1 (nearest), as that of
                :class:`vpt.depth.tokenizer.DepthTokenizer`; its errors pass.
        """
        if not self.codes or not self.is_whole:
            return
        grey = np.rint(np.clip(decode(self.codes), 0, 1) * 255).astype(np.uint8)
        small = Image.fromarray(grey)
        small.thumbnail((DEPTH_SIDE, DEPTH_SIDE), Image.Resampling.BOX)
        self.picture = data_uri(small, "PNG", optimize=True)


@dataclass
class ProposalRecord(_Record):
    """A box that a detector found for the phrase of ``look_for``, or of a call.

    Attributes:
        image: index of the image, in whose pixels the box is.
        score: of the detector, 0 to 1.
        text: part of the phrase that the box matches.
    """

    image: Whole
    phrase: str
    box_xyxy_px: Corners
    score: ScoreValue
    text: str = ""


@dataclass
class MalformedRecord(_Record):
    """Perception tokens, as written, that made no call and no content, and what was wrong."""

    text: str
    turn: TurnIndex
    reason: str


@dataclass
class TokenRecord(_Record):
    """One generated token; ``ms`` since the one before, or since the start of the run."""

    id: Whole
    text: str
    turn: TurnIndex
    ms: Milliseconds


@dataclass
class Turn:
    """One assistant turn; calls and content with their numbers, from 1."""

    tokens: list[TokenRecord] = field(default_factory=list)
    malformed: list[MalformedRecord] = field(default_factory=list)
    calls: list[tuple[int, CallRecord]] = field(default_factory=list)
    content: list[tuple[int, ContentRecord]] = field(default_factory=list)


@dataclass
class Counts(_Record):
    """Sizes of a run, in tokens and images.

    Attributes:
        prompt_tokens: before the first answer token, images included.
        appended_tokens: results of calls, template included.
        llm_tokens: read by the LLM in all.
        reused_tokens: of the prompt, read for an earlier request that began the same way.
        images_encoded: images that cost encoder work.
        images_reused: images whose features were cached.
    """

    prompt_tokens: Whole = 0
    appended_tokens: Whole = 0
    generated_tokens: Whole = 0
    llm_tokens: Whole = 0
    reused_tokens: Whole = 0
    images_encoded: Whole = 0
    images_reused: Whole = 0


@dataclass
class Timings(_Record):
    """Wall times of a run in milliseconds: to the first token, of the prefill, in total.

    The prefill includes the encoders.
    """

    first_token: Milliseconds = 0.0
    prefill: Milliseconds = 0.0
    total: Milliseconds = 0.0


@dataclass
class Trace(_Record):
    """The record of a run.

    Attributes:
        settings: budgets, decoding and seed, size of the region grid; for content, the side of the
            image of the boxes, and the number of codes of a depth map.
        model: its name, the preprocessing of its branches, and the longer side to which images are
            shrunk first.
        images: in the order of the stream: given ones, then crops in the order they were made; in a
            conversation those of each earlier question before those of the next.
        content: depth maps and boxes that the model wrote.
        answer: text of the last turn, without control tokens; after its last depth map, if text
            follows it, and without the commas that a list of boxes leaves.
        turns: text of each assistant turn, control tokens included.
        stop_reason: ``"stop"``, ``"length"``, ``"max_calls"`` or ``"repeated_call"``.
        warnings: reasons not to rely on the answer, as sentences; absent from files when empty.
        history: the conversation before the question; absent from files when empty.
        proposals: boxes for the phrase of ``look_for`` and those of calls, best first of each
            phrase; absent from files when empty.
    """

    question: str
    perception: str
    settings: JSONObject = field(default_factory=dict)
    model: JSONObject = field(default_factory=dict)
    images: Annotated[list[ImageRecord], Field(max_length=1000)] = field(default_factory=list)
    calls: Annotated[list[CallRecord], Field(max_length=1000)] = field(default_factory=list)
    malformed: Annotated[list[MalformedRecord], Field(max_length=100_000)] = field(
        default_factory=list
    )
    content: Annotated[list[ContentRecord], Field(max_length=10_000)] = field(default_factory=list)
    tokens: list[TokenRecord] = field(default_factory=list)
    answer: str = ""
    turns: list[str] = field(default_factory=list)
    stop_reason: str = ""
    counts: Counts = field(default_factory=Counts)
    timings: Timings = field(default_factory=Timings)
    warnings: Annotated[list[str], Field(max_length=1000)] = field(default_factory=list)
    history: Annotated[list[MessageRecord], Field(max_length=1000)] = field(default_factory=list)
    proposals: Annotated[list[ProposalRecord], Field(max_length=1000)] = field(default_factory=list)
    version: Literal[1] = TRACE_VERSION

    def __repr__(self) -> str:
        texts = [f"{name}={brief(getattr(self, name))}" for name in ("question", "answer")]
        texts += [f"num_{of}={len(getattr(self, of))}" for of in ("images", "calls", "tokens")]
        return f"Trace({', '.join(texts)}, stop_reason={self.stop_reason!r})"

    def add_image(
        self,
        image: LoadedImage,
        parent: int | None = None,
        box_xyxy_px: tuple[int, int, int, int] | None = None,
        object_share: float | None = None,
    ) -> int:
        """Record an image; returns its index."""
        record = ImageRecord(image.source, image.size_wh, image.digest, parent, box_xyxy_px)
        if object_share is not None:  # it cannot be cut out of the given image
            record.thumbnail, record.object_share = _thumbnail(image.pixels), object_share
        self.images.append(record)
        return len(self.images) - 1

    def keep_thumbnails(self, images: Sequence[LoadedImage]) -> None:
        """Store small copies of the given images and of crops, so that the trace can be drawn."""
        indices = [index for index, record in enumerate(self.images) if record.parent is None]
        given = dict(zip(indices, images, strict=False))
        for index, image in given.items():
            if self.images[index].thumbnail is None:
                self.images[index].thumbnail = _thumbnail(image.pixels)
        if self.settings.get("replace_looks") == "blank":  # what was seen cannot be cut out
            return
        for index, record in enumerate(self.images):
            if record.thumbnail is not None or record.box_xyxy_px is None:
                continue
            if (root := self.root(index)) in given:
                record.thumbnail = _thumbnail(given[root].pixels.crop(record.box_xyxy_px))

    def root(self, index: int) -> int:
        """Index of the given image that an image stems from."""
        while (parent := self.images[index].parent) is not None:
            index = parent
        return index

    @property
    def map_codes(self) -> list[int] | None:
        """Codes of the last whole depth map; ``None`` if there is none."""
        maps = [one.codes for one in self.content if one.kind == "depth" and one.is_whole]
        return maps[-1] if maps else None

    def timeline(self) -> list[Turn]:
        """The token stream after the prompt, turn by turn, as far as it has come."""
        turns: defaultdict[int, Turn] = defaultdict(Turn)  # more may be recorded meanwhile
        for token in self.tokens:
            turns[token.turn].tokens.append(token)
        for malformed in self.malformed:
            turns[malformed.turn].malformed.append(malformed)
        for number, call in enumerate(self.calls, 1):
            turns[call.turn].calls.append((number, call))
        for number, content in enumerate(self.content, 1):
            turns[content.turn].content.append((number, content))
        return [turns[index] for index in range(max(turns, default=-1) + 1)]

    def to_json(self, *, images: bool = True) -> str:
        """The record as JSON text, with or without the thumbnails of its images."""
        return json.dumps(self.to_dict(images=images), indent=1, ensure_ascii=False) + "\n"

    def to_dict(self, *, images: bool = True) -> dict[str, Any]:
        """JSON-serialisable content, with or without the thumbnails of its images."""
        content = _plain(self)
        if not images:
            for one in content["images"]:
                one["thumbnail"] = None
        for name in ("warnings", "history", "proposals"):
            if not content[name]:
                del content[name]
        return content

    def save(self, path: str | Path, *, images: bool = True) -> None:
        """Write as JSON, with or without the thumbnails of its images.

        Traces of answers and of ``Runtime.stream`` have thumbnails; others get them by
        :meth:`keep_thumbnails`.
        """
        # A file name may hold bytes that are no text; JSON has an escape for them.
        text = self.to_json(images=images)
        Path(path).write_text(text, encoding="utf-8", errors="backslashreplace")

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Trace:
        """Read what :meth:`to_dict` wrote; ``PromptError`` if it is not a trace of this version."""
        if content.get("version") != TRACE_VERSION:
            raise PromptError(
                f"expected a trace of version {TRACE_VERSION}, got {content.get('version')!r}; "
                "make it again with this release"
            )
        trace = read_record(cls, content)
        trace.perception = canonical_mode(trace.perception)
        check_trace(trace)
        return trace

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """JSON schema of a saved trace, as in ``docs/trace.schema.json``."""
        return record_schema(cls)

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Read a trace file, of a chat the last trace; ``PromptError`` if it is not one."""
        return load_traces(path)[-1]


def _plain(value: Any) -> Any:
    """A copy of a record with dicts in place of records; ``asdict`` takes several times as long."""
    if isinstance(value, _Record):
        return {name: _plain(one) for name, one in vars(value).items()}
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value))
    return value


def save_traces(traces: Sequence[Trace], path: str | os.PathLike[str]) -> None:
    """Write the traces of a chat, in order, as JSON; its images are kept once, with the last."""
    last = traces[-1].images if traces else []
    contents = [trace.to_dict() for trace in traces]
    for content in contents[:-1]:
        for image, same in zip(content["images"], last, strict=False):
            if image["digest"] == same.digest:
                image["thumbnail"] = None
    text = json.dumps({"version": TRACE_VERSION, "traces": contents}, indent=1, ensure_ascii=False)
    Path(path).write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


def load_traces(path: str | os.PathLike[str]) -> list[Trace]:
    """Read the traces of a chat, or the one of a trace file; ``PromptError`` if it is neither."""
    name = Path(path).name
    try:
        with Path(path).open("rb") as file:
            data = file.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise PromptError(f"{name} is larger than {MOST_BYTES} bytes; expected a trace")
        content = json.loads(data.decode("utf-8-sig"))
    except PromptError:
        raise
    except (MemoryError, OSError, RecursionError, ValueError) as exc:
        raise PromptError(f"cannot read the trace {name}: {exc}") from exc
    if not isinstance(content, dict):
        raise PromptError(f"{name} is not a trace: expected a JSON object")
    contents = content.get("traces", [content])
    if not (isinstance(contents, list) and contents and all(type(c) is dict for c in contents)):
        raise PromptError(f"{name} is not a chat: expected a list of traces, at least one")
    traces = [Trace.from_dict(one) for one in contents]
    for trace in traces[:-1]:
        for image, same in zip(trace.images, traces[-1].images, strict=False):
            if image.thumbnail is None and image.digest == same.digest:
                image.thumbnail = same.thumbnail
    return traces


def brief(text: str) -> str:
    """The ``repr`` of a text, cut after 80 characters."""
    return repr(text if len(text) <= 80 else f"{text[:80]}…")


def _thumbnail(pixels: Image.Image) -> str:
    small = pixels.copy()
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    return data_uri(small, "JPEG", quality=85)


def data_uri(pixels: Image.Image, kind: str, **options: Any) -> str:
    """A picture as a data URI of a format of Pillow, with its options."""
    buffer = io.BytesIO()
    pixels.save(buffer, format=kind, **options)
    encoded = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f"data:image/{kind.lower()};base64,{encoded}"
