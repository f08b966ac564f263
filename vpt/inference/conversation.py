"""The loop: answer, or call for perception, dispatch, append, go on, answer.

:func:`converse` knows no model. It yields :class:`Append` to have pieces put behind the stream
and one more token chosen, is sent a :class:`Step` back, and yields events on the way. So a test
can drive it with a plain list of tokens, and one stream or many are driven the same way.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import astuple, dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vpt.boxes import GridBox, PixelBox, compose, crop_box_px
from vpt.branches import crop
from vpt.errors import PromptError, RegionError, VPTError
from vpt.images import LoadedImage, from_pixels
from vpt.inference.engine import LookResult
from vpt.inference.request import Request
from vpt.model.processing import FeaturePiece, ImagePiece, Piece, TokenPiece, VPTProcessor
from vpt.protocol.calls import PerceptionCall, format_region, parse_turn, split_symbols
from vpt.protocol.grammar import PerceptionGrammar, TokenRule, TurnState
from vpt.protocol.tokens import (
    BRANCH_TOKENS,
    NO_CONTENT,
    TURN_END,
    Vocabulary,
    branches_of_mode,
    invite,
)
from vpt.trace.content import parse_content, record_content
from vpt.trace.records import CallRecord, ContentRecord, MalformedRecord, TokenRecord, Trace

_BLANK_RGB = (127, 127, 127)
_MOST_RESERVED = 2048  # tokens; a limit reserves no memory that may never be used
_BETWEEN_BOXES = " ,;.\n"  # what is left of a list of boxes in front of an answer


@dataclass(frozen=True)
class Append:
    """Ask the driver: put these pieces behind the stream, then choose a token by this rule.

    Attributes:
        pieces: what to append.
        rule: what may be chosen; ``None`` for anything.
        reserve: further tokens the stream may take, for the cache.
    """

    pieces: Sequence[Piece]
    rule: TokenRule | None
    reserve: int = 0


@dataclass(frozen=True)
class Step:
    """The driver's answer to :class:`Append`.

    Attributes:
        token_id: chosen.
        num_tokens: appended, placeholders included.
        looks: one result per image or re-encoded image appended.
        encode_ms: wall time of encoders.
        run_ms: wall time of the LLM.
        is_last: whether the stream has no room for the chosen token, nor for any other.
    """

    token_id: int
    num_tokens: int = 1
    looks: Sequence[LookResult] = ()
    encode_ms: float = 0.0
    run_ms: float = 0.0
    is_last: bool = False


@dataclass(frozen=True)
class TokenEvent:
    """A token was chosen; ``text`` is what it adds to the turn's readable text."""

    token: TokenRecord
    text: str


@dataclass(frozen=True)
class CallEvent:
    """The model calls for perception; nothing has been appended yet."""

    call: CallRecord


@dataclass(frozen=True)
class ResultEvent:
    """What the call asked for has been appended."""

    call: CallRecord


@dataclass(frozen=True)
class ContentEvent:
    """The turn that has ended holds this depth map or these boxes, which the model wrote itself."""

    content: ContentRecord


@dataclass(frozen=True)
class StopEvent:
    """The run has ended; ``trace`` is its whole record."""

    trace: Trace


@dataclass(frozen=True)
class ErrorEvent:
    """The run has failed; no further event of it follows, others are not concerned."""

    error: VPTError


Event = TokenEvent | ContentEvent | CallEvent | ResultEvent | StopEvent | ErrorEvent
Conversation = Generator[Append | Event, Step | None, None]
DecodeMap = Callable[[Sequence[int]], NDArray[np.float32]]


def converse(
    request: Request,
    processor: VPTProcessor,
    vocabulary: Vocabulary,
    decode_map: DecodeMap | None = None,
) -> Conversation:
    """Drive one question from prompt to answer.

    Args:
        request: what is asked and within which bounds; checked before the generator is made.
        processor: makes pieces of words and images.
        vocabulary: ids of the model's control tokens.
        decode_map: codes of a depth map -> its image; ``None`` keeps the codes only.

    Yields:
        :class:`Append`, to which a :class:`Step` must be sent, and events, to which nothing is.

    Raises:
        PromptError: if the question or the perception mode cannot be used with this model.
    """
    return _Loop(request, processor, vocabulary, decode_map).run()


class _Loop:
    """State of one conversation."""

    def __init__(
        self,
        request: Request,
        processor: VPTProcessor,
        vocabulary: Vocabulary,
        decode_map: DecodeMap | None,
    ) -> None:
        self.request = request
        self.decode_map = decode_map
        self.processor = processor
        self.vocabulary = vocabulary
        self.grammar = PerceptionGrammar(vocabulary)
        available = vocabulary.branches if request.images else ()
        self.permitted = branches_of_mode(request.perception, available)
        writes = bool(request.images) and request.perception != "none"
        self.content = vocabulary.content.kinds if writes else ()
        self.expected = vocabulary.content if request.images else NO_CONTENT
        self.forced = request.perception not in ("auto", "none") and request.max_calls > 0
        self.prescribed = self._prescribed_ids()  # tokens of the first turn that are not chosen
        self.images = list(request.images)
        question = invite(request.question, request.perception)
        system = {} if request.system is None else {"system": request.system}
        self.prompt = processor.prompt(question, self.images, **system)
        self.turn_end = vocabulary.ids[TURN_END]
        self.row_of_opener = {
            vocabulary.opener(branch): BRANCH_TOKENS[branch]
            for branch in vocabulary.branches
            if branch in BRANCH_TOKENS
        }
        self.started = self.last_token_at = time.perf_counter()
        self.num_rounds = 0
        self.last_call: tuple[object, ...] | None = None
        self.no_more_calls = self.out_of_tokens = False
        self.trace = Trace(
            question=request.question,
            perception=request.perception,
            settings={
                "max_calls": request.max_calls,
                "max_new_tokens": request.max_new_tokens,
                "constrain": request.constrain,
                "look_at": request.look_at,
                "temperature": request.sampling.temperature,
                "top_k": request.sampling.top_k,
                "top_p": request.sampling.top_p,
                "seed": request.sampling.seed,
                "system": request.system,
                "region": None if request.region is None else astuple(request.region),
                "replace_looks": request.replace_looks,
                "grid_size": vocabulary.grid_size,
            },
        )
        if vocabulary.content.kinds:
            self.trace.settings["num_pixels"] = vocabulary.content.num_pixels
            self.trace.settings["num_cells"] = vocabulary.content.num_cells
        for image in self.images:
            self.trace.add_image(image)

    def run(self) -> Conversation:
        """See :func:`converse`."""
        pieces: Sequence[Piece] = self.prompt
        calls: list[CallRecord] = []
        while True:
            turn_ids, ended = yield from self._write_turn(pieces, calls)
            first = len(self.trace.content)
            wanted = self._close_turn(turn_ids)
            for content in self.trace.content[first:]:
                if self.decode_map is not None:
                    content.keep_depth_map(self.decode_map)
                yield ContentEvent(content)
            reason = self._reason_to_stop(wanted, ended)
            calls = [self._record(call, turn_ids, reason) for call in wanted]
            for call in calls:
                yield CallEvent(call)
            if reason:
                break
            pieces = [self._closing(turn_ids[-1]), *self._look(calls)]
            self.num_rounds += 1
        self.trace.stop_reason = reason
        self.trace.timings.total = (time.perf_counter() - self.started) * 1e3
        yield StopEvent(self.trace)

    def _write_turn(
        self, pieces: Sequence[Piece], calls: Sequence[CallRecord]
    ) -> Generator[Append | Event, Step | None, tuple[list[int], bool]]:
        """Append pieces and let the model write until its turn ends.

        Returns:
            The turn's ids, and whether it ended by itself (else: out of tokens).
        """
        ids: list[int] = []
        state = TurnState()
        text = _TextStream(self._readable)
        reserve = self._reserve()
        while True:
            rule = self._rule(state, len(ids))
            step = yield Append(pieces, rule, reserve)
            assert step is not None, "the driver must answer Append with a Step"
            self._count(step, calls, is_continuation=bool(ids))
            if not ids:
                for call in calls:
                    yield ResultEvent(call)
            ids.append(step.token_id)
            state = self.grammar.advance(state, step.token_id)
            token = self._record_token(step.token_id)
            # A re-encoding call is complete with its start token: the rest of it is forced.
            ended = step.token_id == self.turn_end or step.token_id in self.row_of_opener
            self.out_of_tokens = (
                step.is_last or len(self.trace.tokens) >= self.request.max_new_tokens
            )
            is_last = ended or self.out_of_tokens
            yield TokenEvent(token, text.add(step.token_id, is_last))
            if is_last:
                return ids, ended
            pieces = [TokenPiece((step.token_id,))]
            calls, reserve = (), 0

    def _prescribed_ids(self) -> list[int]:
        """Ids of the call that the request itself makes.

        Raises:
            PromptError: if the model cannot name that region.
        """
        if (region := self.request.region) is None:
            return []
        grid_size = self.vocabulary.grid_size
        try:
            words = [*split_symbols(format_region(region, grid_size)), TURN_END]
        except RegionError as exc:
            raise PromptError(f"region: {exc}") from exc
        if "crop" not in self.vocabulary.branches:
            raise PromptError("region: this model has no region tokens")
        return [self.vocabulary.ids[word] for word in words]

    def _rule(self, state: TurnState, num_written: int) -> TokenRule | None:
        if self.num_rounds == 0 and num_written < len(self.prescribed):
            return TokenRule(only=(self.prescribed[num_written],))
        if not self.request.constrain:
            return None
        if self.no_more_calls or self.num_rounds >= self.request.max_calls:
            return self.grammar.rule(state, self.content)
        must_call = self.forced and num_written == 0 and self.num_rounds == 0
        return self.grammar.rule(state, (*self.permitted, *self.content), must_call)

    def _reason_to_stop(self, calls: Sequence[PerceptionCall], ended: bool) -> str:
        """Why the run ends with this turn; empty if it goes on."""
        if not calls:
            if self.no_more_calls:
                return "repeated_call"
            return "stop" if ended else "length"
        if self.request.perception == "none" or not self.images:
            return "stop" if ended else "length"
        if self.num_rounds >= self.request.max_calls:
            return "max_calls"
        source = self._image_looked_at()
        key = (source, *((call.branch, call.region) for call in calls))
        if key == self.last_call:
            if not self.request.constrain:
                return "repeated_call"
            self.no_more_calls = True  # dispatch it once more, then the model must answer
        self.last_call = key
        if self.out_of_tokens:
            return "length"
        return ""

    def _image_looked_at(self) -> int:
        return 0 if self.request.look_at == "first" else len(self.images) - 1

    def _record(self, call: PerceptionCall, turn_ids: Sequence[int], reason: str) -> CallRecord:
        outcome = {"": "executed", "repeated_call": "repeated"}.get(reason, "not_executed")
        record = CallRecord(
            branch=call.branch,
            text=self._raw(turn_ids[call.start : call.end]),
            turn=len(self.trace.turns) - 1,
            image=self._image_looked_at(),
            outcome=outcome,
        )
        if call.branch in BRANCH_TOKENS:
            record.text = BRANCH_TOKENS[call.branch].call
        if call.region is not None:
            box = call.region
            record.region = (box.x_min, box.y_min, box.x_max, box.y_max)
        self.trace.calls.append(record)
        return record

    def _closing(self, last: int) -> TokenPiece:
        """The last chosen token, which the stream has not read yet, and what must follow it.

        A turn ends with its end token, or is cut at a branch's start token: then the rest of
        the call is not the model's choice.
        """
        if (row := self.row_of_opener.get(last)) is None:
            return TokenPiece((last,))
        ids = self.vocabulary.ids
        return TokenPiece((last, ids[row.action], ids[row.end], self.turn_end))

    def _look(self, calls: Sequence[CallRecord]) -> list[Piece]:
        """Cut or name what is to be looked at, and make the reply of it."""
        source = self._image_looked_at()
        looks: list[ImagePiece | FeaturePiece] = []
        for call in calls:
            if call.region is None:
                looks.append(FeaturePiece(call.branch, self._shown(self.images[source])))
            else:
                looks.append(ImagePiece(self._cut(call, source)))
        return self.processor.reply(looks)

    def _cut(self, call: CallRecord, source: int) -> LoadedImage:
        assert call.region is not None
        parent, record = self.images[source], self.trace.images[source]
        box: PixelBox = crop_box_px(
            GridBox(*call.region), parent.size_wh, grid_size=self.vocabulary.grid_size
        )
        if self.request.replace_looks == "random":
            box = self._elsewhere(box, parent)
        cut = self._shown(from_pixels(crop(parent.pixels, box), parent.source))
        call.box_xyxy_px = box if record.box_xyxy_px is None else compose(record.box_xyxy_px, box)
        call.result_image = self.trace.add_image(cut, parent=source, box_xyxy_px=call.box_xyxy_px)
        self.images.append(cut)
        return cut

    def _shown(self, image: LoadedImage) -> LoadedImage:
        """The image, or the blank one that takes its place."""
        if self.request.replace_looks != "blank":
            return image
        return from_pixels(Image.new("RGB", image.size_wh, _BLANK_RGB), image.source)

    def _elsewhere(self, box: PixelBox, image: LoadedImage) -> PixelBox:
        """A box of the same size at a random place, which image, box and seed decide."""
        seed = f"{image.digest} {box} {self.request.sampling.seed}"
        (width, height), draw = image.size_wh, random.Random(seed)
        x = draw.randint(0, width - (box[2] - box[0]))
        y = draw.randint(0, height - (box[3] - box[1]))
        return x, y, x + box[2] - box[0], y + box[3] - box[1]

    def _reserve(self) -> int:
        """Tokens the stream may soon take: those to be written, and what calls may bring."""
        if not self.images:
            return min(self.request.max_new_tokens, _MOST_RESERVED)
        factor = (
            self.processor.image_processor.patch_size * self.processor.image_processor.merge_size
        )
        width, height = self.images[0].size_wh
        limit = self.processor.image_processor.size["longest_edge"]
        per_call = max(min(width * height, limit) // factor**2, 256) + 64
        left = self.request.max_calls - self.num_rounds if self.permitted else 0
        return min(self.request.max_new_tokens + left * per_call, _MOST_RESERVED)

    def _count(self, step: Step, calls: Sequence[CallRecord], is_continuation: bool) -> None:
        """Book what an Append brought: sizes, times and results of calls."""
        counts, timings = self.trace.counts, self.trace.timings
        counts.llm_tokens += step.num_tokens
        counts.images_encoded += sum(not look.reused for look in step.looks)
        counts.images_reused += sum(look.reused for look in step.looks)
        if is_continuation:
            return
        if self.num_rounds == 0:
            counts.prompt_tokens = step.num_tokens
            timings.prefill = step.encode_ms + step.run_ms
            for record, look in zip(self.trace.images, step.looks, strict=True):
                record.num_tokens = look.num_tokens
            return
        counts.appended_tokens += step.num_tokens
        for call, look in zip(calls, step.looks, strict=True):
            call.grid_hw, call.num_tokens, call.reused = look.grid_hw, look.num_tokens, look.reused
            call.encode_ms, call.run_ms = step.encode_ms, step.run_ms
            if look.scores is not None:
                call.scores = look.scores.float().cpu().tolist()
            if call.result_image is not None:
                self.trace.images[call.result_image].num_tokens = look.num_tokens

    def _record_token(self, token_id: int) -> TokenRecord:
        now = time.perf_counter()
        if not self.trace.tokens:
            self.trace.timings.first_token = (now - self.started) * 1e3
        record = TokenRecord(
            id=token_id,
            text=self._raw([token_id]),
            turn=len(self.trace.turns),
            ms=(now - self.last_token_at) * 1e3,
        )
        self.last_token_at = now
        self.trace.tokens.append(record)
        self.trace.counts.generated_tokens += 1
        return record

    def _close_turn(self, turn_ids: Sequence[int]) -> list[PerceptionCall]:
        """Record a finished turn; returns the calls in it that this model can make."""
        turn = len(self.trace.turns)
        self.trace.turns.append(self._raw(turn_ids))
        symbols = self.vocabulary.symbols(turn_ids)
        parsed = parse_turn(symbols, self.vocabulary.grid_size)
        written = parse_content(symbols, self.expected)
        behind = self._readable(turn_ids[written.answer_start :]).strip()
        self.trace.answer = behind or self._readable(turn_ids).strip()
        if any(span.kind == "boxes" for span in written.spans):
            self.trace.answer = self.trace.answer.lstrip(_BETWEEN_BOXES)
        first_token, source = len(self.trace.tokens) - len(turn_ids), self._image_looked_at()
        for span in written.spans:
            record_content(self.trace, span, first_token, source, self.vocabulary.content)
        for bad in sorted((*parsed.malformed, *written.malformed), key=lambda bad: bad.start):
            text = self._raw(turn_ids[bad.start : bad.end])
            self.trace.malformed.append(MalformedRecord(text, turn, bad.reason))
        calls = []
        for call in parsed.calls:
            if call.branch in self.vocabulary.branches:
                calls.append(call)
                continue
            text = self._raw(turn_ids[call.start : call.end])
            reason = f"this model has no branch {call.branch!r}"
            self.trace.malformed.append(MalformedRecord(text, turn, reason))
        return calls

    def _raw(self, ids: Sequence[int]) -> str:
        return self.processor.decode(ids, skip_special_tokens=False)

    def _readable(self, ids: Sequence[int]) -> str:
        """Text without control tokens."""
        symbols = self.vocabulary.symbols(ids)
        plain = [i for i, symbol in zip(ids, symbols, strict=True) if not symbol]
        return self.processor.decode(plain)


class _TextStream:
    """Readable text of a growing turn, a few tokens at a time.

    Text is held back while it ends in the middle of a character.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._start = 0  # of the tokens that the next ones may still change
        self._shown = 0  # tokens whose text has been given out

    def add(self, token_id: int, is_last: bool) -> str:
        """Take a token in; returns the text that is new, after the last one all that is left."""
        self._ids.append(token_id)
        before = self._decode(self._ids[self._start : self._shown])
        now = self._decode(self._ids[self._start :])
        if now.endswith("\ufffd") and not is_last:
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        return now[len(before) :]
