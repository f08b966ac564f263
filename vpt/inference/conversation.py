"""The conversation: answer, or call for perception, append the result of the call, and continue.

:class:`Conversation` decides what to append, which tokens are permitted next, and when to stop. It
runs no model: it yields :class:`Append` to have pieces appended and one more token chosen, is sent
a :class:`Step`, and yields events on the way. So a test can drive it with a plain list of tokens,
and one stream or many are driven the same way.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import Any

from vpt.boxes import crop_box_px
from vpt.errors import PromptError, RegionError
from vpt.inference.events import (
    Append,
    CallEvent,
    ContentEvent,
    Event,
    Exchange,
    ResultEvent,
    Step,
    StopEvent,
)
from vpt.inference.recorder import DecodeMap, Recorder
from vpt.inference.request import Request
from vpt.inference.results import REPLACEMENTS
from vpt.model.processing import FeaturePiece, ImagePiece, Piece, TokenPiece, VPTProcessor
from vpt.protocol.calls import PerceptionCall, format_region, parse_turn, split_symbols
from vpt.protocol.grammar import PerceptionGrammar, TokenRule, TurnState
from vpt.protocol.tokens import BRANCH_TOKENS, TURN_END, Vocabulary, branches_of_mode, invite
from vpt.trace.records import CallRecord

_MOST_RESERVED = 2048  # tokens; a limit reserves no memory that may never be used


class Conversation:
    """One question, from prompt to answer.

    Args:
        request: the question, its images and options.
        processor: makes pieces of text and images.
        vocabulary: ids of the model's control tokens.
        decode_map: codes of a depth map -> its image; ``None`` keeps the codes only.
        model: description of the model, for the trace.
        warnings: sentences for the trace.

    Raises:
        PromptError: if the question or the perception mode cannot be used with this model.
    """

    def __init__(
        self,
        request: Request,
        processor: VPTProcessor,
        vocabulary: Vocabulary,
        decode_map: DecodeMap | None = None,
        model: Mapping[str, Any] | None = None,
        warnings: Iterable[str] = (),
    ) -> None:
        self.request = request
        self.recorder = Recorder(request, processor, vocabulary, decode_map, model, warnings)
        self._processor = processor
        self.vocabulary = vocabulary
        self._grammar = PerceptionGrammar(vocabulary)
        self._openers = {
            vocabulary.opener(branch): BRANCH_TOKENS[branch]
            for branch in vocabulary.branches
            if branch in BRANCH_TOKENS
        }
        self._images = list(request.images)  # of the stream: given and cut out
        self._show = REPLACEMENTS[request.replace_looks]
        self._branches = branches_of_mode(
            request.perception, vocabulary.branches if request.images else ()
        )
        writes_content = bool(request.images) and request.perception != "none"
        self._content = vocabulary.content.kinds if writes_content else ()
        self._prescribed = _prescribed_ids(request, vocabulary)
        question = invite(request.question, request.perception)
        system = {} if request.system is None else {"system": request.system}
        self._prompt = processor.prompt(question, request.images, **system)
        self._num_rounds = 0
        self._last_call: tuple[object, ...] | None = None
        self._must_answer = self._is_out_of_tokens = False

    def run(self) -> Exchange:
        """Answer the question, once; only to an :class:`Append` a :class:`Step` must be sent."""
        self.recorder.start()
        pieces: Sequence[Piece] = self._prompt
        calls: list[CallRecord] = []
        while True:
            ids = yield from self._write_turn(pieces, calls)
            source = 0 if self.request.look_at == "first" else len(self._images) - 1
            parsed = parse_turn(self.vocabulary.symbols(ids), self.vocabulary.grid_size)
            for content in self.recorder.end_turn(ids, parsed, source):
                yield ContentEvent(content)
            wanted = [one for one in parsed.calls if one.branch in self.vocabulary.branches]
            reason = self._reason_to_stop(wanted, source, self._ends_turn(ids[-1]))
            outcome = {"": "executed", "repeated_call": "repeated"}.get(reason, "not_executed")
            calls = [self.recorder.add_call(call, ids, source, outcome) for call in wanted]
            for record in calls:
                yield CallEvent(record)
            if reason:
                break
            pairs = zip(wanted, calls, strict=True)
            results = [self._execute(call, source, record) for call, record in pairs]
            pieces = [self._closing(ids[-1]), *self._processor.reply(results)]
            self._num_rounds += 1
        yield StopEvent(self.recorder.stop(reason))

    def _write_turn(
        self, pieces: Sequence[Piece], calls: Sequence[CallRecord]
    ) -> Generator[Append | Event, Step | None, list[int]]:
        """Append pieces and let the model write a turn, whose ids are returned."""
        ids: list[int] = []
        state, reserve = TurnState(), self._reserve()
        while True:
            step = yield Append(pieces, self._rule(state, len(ids)), reserve)
            assert step is not None, "the driver must answer Append with a Step"
            self.recorder.add_step(step, calls)
            for call in calls:
                yield ResultEvent(call)
            ids.append(step.token_id)
            state = self._grammar.advance(state, step.token_id)
            num_written = self.recorder.trace.counts.generated_tokens + 1
            self._is_out_of_tokens = step.is_last or num_written >= self.request.max_new_tokens
            is_last = self._is_out_of_tokens or self._ends_turn(step.token_id)
            yield self.recorder.add_token(step.token_id, is_last)
            if is_last:
                return ids
            pieces, calls, reserve = [TokenPiece((step.token_id,))], (), 0

    def _execute(
        self, call: PerceptionCall, source: int, record: CallRecord
    ) -> ImagePiece | FeaturePiece:
        """Make the result of a call on an image; a crop becomes an image of the stream."""
        image, box = self._images[source], None
        if call.region is not None:
            box = crop_box_px(call.region, image.size_wh, grid_size=self.vocabulary.grid_size)
        shown, box = self._show(image, box, self.request.sampling.seed)
        if box is None:
            return FeaturePiece(call.branch, shown)
        self._images.append(shown)
        self.recorder.add_crop(record, shown, box)
        return ImagePiece(shown)

    def _rule(self, state: TurnState, num_written: int) -> TokenRule | None:
        is_first = self._num_rounds == 0
        if is_first and num_written < len(self._prescribed):
            return TokenRule(only=(self._prescribed[num_written],))
        if not self.request.constrain:
            return None
        if self._must_answer or self._num_rounds >= self.request.max_calls:
            return self._grammar.rule(state, self._content)
        must_call = (
            is_first and num_written == 0 and self.request.perception not in ("auto", "none")
        )
        return self._grammar.rule(state, (*self._branches, *self._content), must_call)

    def _reason_to_stop(
        self, calls: Sequence[PerceptionCall], source: int, is_complete: bool
    ) -> str:
        """Why the run ends with this turn; empty if it continues."""
        if not calls and self._must_answer:
            return "repeated_call"
        if not calls or self.request.perception == "none" or not self.request.images:
            return "stop" if is_complete else "length"
        if self._num_rounds >= self.request.max_calls:
            return "max_calls"
        key = (source, *((call.branch, call.region) for call in calls))
        if key == self._last_call:
            if not self.request.constrain:
                return "repeated_call"
            self._must_answer = True  # the call is executed once more, then the model must answer
        self._last_call = key
        return "length" if self._is_out_of_tokens else ""

    def _ends_turn(self, token_id: int) -> bool:
        """Whether a turn ends with this token: its end, or the start of a re-encoding call."""
        return token_id == self.vocabulary.ids[TURN_END] or token_id in self._openers

    def _closing(self, last: int) -> TokenPiece:
        """The last chosen token, which the stream has not read yet, and what must follow it.

        A turn that is cut at a branch's start token continues with the rest of the call, which is
        not the model's choice.
        """
        ids = self.vocabulary.ids
        if (row := self._openers.get(last)) is None:
            return TokenPiece((last,))
        return TokenPiece((last, ids[row.action], ids[row.end], ids[TURN_END]))

    def _reserve(self) -> int:
        """Tokens the stream may soon take: those to be written, and results of calls."""
        num_tokens = self.request.max_new_tokens
        if self._branches:
            processor = self._processor.image_processor
            width, height = self.request.images[0].size_wh
            area = min(width * height, processor.size["longest_edge"])
            per_call = max(area // (processor.patch_size * processor.merge_size) ** 2, 256) + 64
            num_tokens += (self.request.max_calls - self._num_rounds) * per_call
        return min(num_tokens, _MOST_RESERVED)


def _prescribed_ids(request: Request, vocabulary: Vocabulary) -> list[int]:
    """Ids of the call that the request makes in place of the model; may raise ``PromptError``."""
    if request.region is None:
        return []
    try:
        tokens = [*split_symbols(format_region(request.region, vocabulary.grid_size)), TURN_END]
    except RegionError as exc:
        raise PromptError(f"region: {exc}") from exc
    if "crop" not in vocabulary.branches:
        raise PromptError("region: this model has no region tokens")
    return [vocabulary.ids[token] for token in tokens]
