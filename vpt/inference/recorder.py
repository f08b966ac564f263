"""The recorder of a run: the only writer of its trace, which can be read while it grows."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vpt.boxes import compose
from vpt.inference.events import Step, TokenEvent
from vpt.inference.request import Request
from vpt.inference.results import Part
from vpt.inference.stream import AppendedImage
from vpt.model.processing import VPTProcessor
from vpt.protocol.calls import ParsedTurn, PerceptionCall
from vpt.protocol.tokens import BRANCH_TOKENS, GROUNDING, NO_CONTENT, Vocabulary, content_value
from vpt.trace.content import parse_content, record_content
from vpt.trace.records import (
    CallRecord,
    ContentRecord,
    ImageRecord,
    MalformedRecord,
    MessageRecord,
    ProposalRecord,
    TokenRecord,
    Trace,
)

if TYPE_CHECKING:
    from vpt.branches import Proposal

DecodeMap = Callable[[Sequence[int]], NDArray[np.float32]]
_SEPARATORS = " ,;\n"  # of boxes
_BETWEEN_BOXES = f"{_SEPARATORS}."  # what is left of a list of boxes in front of an answer
_LEFT_OF_BOXES = re.compile(r"(?:\s*[,;])+\s*(?=[.,;]|$)")  # the same within it


class Recorder:
    """Records one run; arguments as for :class:`vpt.inference.conversation.Conversation`.

    Attributes:
        trace: the record so far. Until the run has ended, its answer is the readable text of the
            turn that is being written.
    """

    def __init__(
        self,
        request: Request,
        processor: VPTProcessor,
        vocabulary: Vocabulary,
        decode_map: DecodeMap | None = None,
        model: Mapping[str, Any] | None = None,
        warnings: Iterable[str] = (),
        earlier: Sequence[ImageRecord] = (),
    ) -> None:
        self._processor = processor
        self._vocabulary = vocabulary
        self._decode_map = decode_map
        self._content = vocabulary.content if request.has_images else NO_CONTENT
        self._text = TextStream(self._readable)
        self._gaps = BoxGaps()
        self._started = self._last_token_at = 0.0
        self.trace = Trace(
            question=request.question,
            perception=request.perception,
            settings=_settings(request, vocabulary),
            model=dict(model or {}),
            warnings=[*warnings],
            images=[replace(record) for record in earlier],
        )
        new = request.images if earlier else request.all_images
        self._num_new = len(new)
        for image in new:
            self.trace.add_image(image)
        for message in request.history:
            self.trace.history.append(
                MessageRecord(message.role, message.text, len(message.images))
            )

    def add_proposals(self, phrase: str, image: int, found: Sequence[Proposal]) -> None:
        """Record what a detector found for a phrase in an image."""
        for one in found:
            self.trace.proposals.append(
                ProposalRecord(image, phrase, one.box_xyxy_px, one.score, one.phrase)
            )

    def add_shown(self, part: Part, parent: int) -> None:
        """Record the part of an image that the prompt shows beside it."""
        self._num_new += 1
        self._add_part(part, parent)

    def warn(self, warning: str) -> None:
        """Record a reason not to rely on the answer."""
        self.trace.warnings.append(warning)

    def start(self) -> None:
        """Begin to measure time."""
        self._started = self._last_token_at = time.perf_counter()

    def add_step(self, step: Step, calls: Sequence[CallRecord], num_certain: int = 0) -> None:
        """Record the answer to an ``Append``: sizes, times, results of the calls it answered.

        ``num_certain`` tokens of the turn were appended with the prompt.
        """
        trace, counts = self.trace, self.trace.counts
        counts.llm_tokens += step.num_tokens - step.num_reused
        counts.reused_tokens += step.num_reused
        counts.images_encoded += sum(not image.reused for image in step.images)
        counts.images_reused += sum(image.reused for image in step.images)
        if not self._text.is_empty:
            return
        if not trace.turns:
            counts.prompt_tokens = step.num_tokens - num_certain
            trace.timings.prefill = step.encode_ms + step.run_ms
            num_seen = len(trace.images) - self._num_new
            new = step.images[len(step.images) - self._num_new :]
            for record, image in zip(trace.images[num_seen:], new, strict=True):
                self._record_seen(record, image)
            return
        counts.appended_tokens += step.num_tokens
        shown = [call for call in calls if call.outcome != "not_found"]
        for call, image in zip(shown, step.images, strict=True):
            call.grid_hw, call.num_tokens, call.reused = (
                image.grid_hw,
                image.num_tokens,
                image.reused,
            )
            call.encode_ms, call.run_ms = step.encode_ms, step.run_ms
            if image.scores is not None:
                call.scores = image.scores.float().cpu().tolist()
            if call.result_image is not None:
                self._record_seen(trace.images[call.result_image], image)

    def _record_seen(self, record: ImageRecord, image: AppendedImage) -> None:
        """Record the size at which the backbone's tower saw an image."""
        pixels, (height, width) = self._processor.image_processor, image.grid_hw
        side = pixels.patch_size * pixels.merge_size
        record.num_tokens, record.seen_wh = image.num_tokens, (width * side, height * side)

    def add_token(self, token_id: int, is_last: bool) -> TokenEvent:
        """Record a chosen token; ``is_last`` in its turn."""
        trace, now = self.trace, time.perf_counter()
        if not trace.tokens:
            trace.timings.first_token = (now - self._started) * 1e3
        ms = (now - self._last_token_at) * 1e3
        self._last_token_at = now
        token = TokenRecord(token_id, self._processor.token_text(token_id), len(trace.turns), ms)
        is_first = self._text.is_empty
        read = self._text.add(token_id, is_last)
        text = self._gaps.add(read, self._is_box(token_id), is_last) if self._has_boxes else read
        trace.answer = text.lstrip() if is_first else trace.answer + text
        trace.tokens.append(token)
        trace.counts.generated_tokens += 1
        return TokenEvent(token, text)

    def end_turn(
        self, ids: Sequence[int], parsed: ParsedTurn, source: int
    ) -> Sequence[ContentRecord]:
        """Record a finished turn about image ``source``; returns the depth maps and boxes in it."""
        trace, turn = self.trace, len(self.trace.turns)
        self._text, self._gaps = TextStream(self._readable), BoxGaps()
        trace.turns.append(self._raw(ids))
        written = parse_content(self._vocabulary.symbols(ids), self._content)
        has_boxes = any(span.kind == "boxes" for span in written.spans)
        read = self._without_boxes if has_boxes else self._readable
        trace.answer = read(ids[written.answer_start :]).strip() or read(ids).strip()
        num_before, first_token = len(trace.content), len(trace.tokens) - len(ids)
        for span in written.spans:
            record_content(trace, span, first_token, source, self._vocabulary.content)
        bad = [
            (one.start, one.end, one.reason)
            for one in sorted((*parsed.malformed, *written.malformed), key=lambda one: one.start)
        ]
        bad += [
            (call.start, call.end, f"this model has no branch {call.branch!r}")
            for call in parsed.calls
            if call.branch not in self._vocabulary.branches
        ]
        for start, end, reason in bad:
            trace.malformed.append(MalformedRecord(self._raw(ids[start:end]), turn, reason))
        new = trace.content[num_before:]
        if self._decode_map is not None:
            for content in new:
                content.keep_depth_map(self._decode_map)
        return new

    def add_call(
        self, call: PerceptionCall, ids: Sequence[int], source: int, outcome: str
    ) -> CallRecord:
        """Record a call, on image ``source``, of the turn that has just ended."""
        row = BRANCH_TOKENS.get(call.branch)
        phrase = None
        if call.branch == GROUNDING:
            phrase = self._readable(ids[call.start + 1 : call.end - 1]).strip()
        record = CallRecord(
            branch=call.branch,
            text=self._raw(ids[call.start : call.end]) if row is None else row.call,
            turn=len(self.trace.turns) - 1,
            image=source,
            outcome=outcome,
            region=None if call.region is None else astuple(call.region),
            phrase=phrase,
        )
        self.trace.calls.append(record)
        return record

    def add_crop(self, call: CallRecord, part: Part) -> None:
        """Record the crop that a call results in."""
        call.result_image = self._add_part(part, call.image)
        call.box_xyxy_px = self.trace.images[call.result_image].box_xyxy_px

    def _add_part(self, part: Part, parent: int) -> int:
        frame = self.trace.images[parent].box_xyxy_px
        box = part.box_xyxy_px if frame is None else compose(frame, part.box_xyxy_px)
        if part.object_share == 0:
            self.warn(f"no object was found in box {', '.join(map(str, box))}: nothing is dimmed")
        return self.trace.add_image(part.image, parent, box, part.object_share)

    def stop(self, reason: str) -> Trace:
        """Record the end of the run; returns the whole record."""
        self.trace.stop_reason = reason
        self.trace.timings.total = (time.perf_counter() - self._started) * 1e3
        return self.trace

    def _raw(self, ids: Sequence[int]) -> str:
        return self._processor.decode(ids, skip_special_tokens=False)

    def _without_boxes(self, ids: Sequence[int]) -> str:
        """The same text as streams."""
        text, gaps, end = TextStream(self._readable), BoxGaps(), len(ids) - 1
        return "".join(
            gaps.add(text.add(one, at == end), self._is_box(one), at == end)
            for at, one in enumerate(ids)
        )

    @property
    def _has_boxes(self) -> bool:
        return "boxes" in self._content.kinds

    def _is_box(self, token_id: int) -> bool:
        (symbol,) = self._vocabulary.symbols([token_id])
        return content_value(symbol, "boxes") is not None

    def _readable(self, ids: Sequence[int]) -> str:
        """Text without control tokens."""
        symbols = self._vocabulary.symbols(ids)
        plain = [i for i, symbol in zip(ids, symbols, strict=True) if not symbol]
        return self._processor.decode(plain) if plain else ""


class TextStream:
    """Readable text of a growing turn, a few tokens at a time.

    Text is held back while it ends in the middle of a character.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._start = 0  # of the tokens whose text the next ones may change
        self._shown = 0  # tokens whose text was returned

    @property
    def is_empty(self) -> bool:
        """Whether no token was added."""
        return not self._ids

    def add(self, token_id: int, is_last: bool) -> str:
        """Add a token; returns the text that is new, after the last one all that is left."""
        self._ids.append(token_id)
        before = self._decode(self._ids[self._start : self._shown])
        now = self._decode(self._ids[self._start :])
        if now.endswith("\ufffd") and not is_last:
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        return now[len(before) :]


class BoxGaps:
    """Leaves the separators beside boxes out of text that streams.

    Separators are held back until it is known whether a box is beside them.
    """

    def __init__(self) -> None:
        self._held = ""
        self._is_beside = False  # whether a box is beside what is held
        self._is_begun = False  # text of this turn was shown

    def add(self, text: str, is_box: bool, is_last: bool) -> str:
        """Take the text of a token; returns what can be shown."""
        text, self._held = self._held + text, ""
        self._is_beside = self._is_beside or is_box
        if not is_last and (is_box or not text.strip(_SEPARATORS)):
            self._held = text
            return ""
        if self._is_beside:
            text = _LEFT_OF_BOXES.sub("", text)
            text = text if self._is_begun else text.lstrip(_BETWEEN_BOXES)
        self._is_beside = False
        if not is_last:
            shown = text.rstrip(_SEPARATORS)
            text, self._held = shown, text[len(shown) :]
        self._is_begun = self._is_begun or bool(text.strip())
        return text


def _settings(request: Request, vocabulary: Vocabulary) -> dict[str, Any]:
    """Settings of the trace, from the request and the vocabulary."""
    settings = {**request.options, "grid_size": vocabulary.grid_size}
    del settings["perception"]  # the trace has a field for it
    if request.point is not None:
        settings["point"] = list(request.point)
    if request.region is not None:
        settings["region"] = list(astuple(request.region))
    if vocabulary.content.kinds:
        settings["num_pixels"] = vocabulary.content.num_pixels
        settings["num_cells"] = vocabulary.content.num_cells
    return settings
