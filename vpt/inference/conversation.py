"""The conversation: answer, or call for perception, append the result of the call, and continue.

:class:`Conversation` decides what to append, which tokens are permitted next, and when to stop. It
runs no model: it yields :class:`Append` to have pieces appended and one more token chosen, is sent
a :class:`Step`, and yields events on the way. So a test can drive it with a plain list of tokens,
and one stream or many are driven the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any

from vpt.boxes import GridBox, crop_box_px, grid_box_covering, region_to_show
from vpt.errors import PromptError, RegionError
from vpt.images import LoadedImage, from_pixels
from vpt.inference.content import ContentReplacer
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
from vpt.inference.results import REPLACEMENTS, Mask, Part, Place, dim_rest
from vpt.model.processing import FeaturePiece, ImagePiece, Piece, TokenPiece, VPTProcessor
from vpt.protocol.calls import (
    PerceptionCall,
    format_found,
    format_region,
    parse_turn,
    split_symbols,
)
from vpt.protocol.grammar import PerceptionGrammar, TokenRule, TurnState
from vpt.protocol.tokens import (
    BRANCH_TOKENS,
    GROUNDING,
    TURN_END,
    Vocabulary,
    branches_of_mode,
    invite,
)
from vpt.trace.records import CallRecord, ImageRecord

if TYPE_CHECKING:
    from vpt.branches import Proposal

Propose = Callable[[LoadedImage, str], "Sequence[Proposal]"]
"""Finds boxes for a phrase in an image, best first."""

Segment = Callable[[LoadedImage, Place], Mask]
"""Finds the object at a place of an image."""

_MOST_FOUND = 8  # boxes of a call that the model is told


@dataclass(frozen=True)
class Transcript:
    """A conversation whose last answer is complete.

    Attributes:
        pieces: of its whole stream.
        images: of the stream, given and cut out, with their records.
        first: index of the image that ``look_at="first"`` means.
    """

    pieces: Sequence[Piece]
    images: Sequence[LoadedImage]
    records: Sequence[ImageRecord]
    first: int


class Conversation:
    """One question, from prompt to answer, alone or as the next of a conversation.

    Args:
        request: the question, its images and options.
        processor: makes pieces of text and images.
        vocabulary: ids of the model's control tokens.
        decode_map: codes of a depth map -> its image; ``None`` keeps the codes only.
        model: description of the model, for the trace.
        warnings: sentences for the trace.
        before: the conversation that the question continues; the request's history tells its text
            and images, for the trace.
        propose: finds boxes for a phrase in an image, best first; needed for ``look_for``, and for
            a vocabulary with grounding.
        segment: finds the object at a place of an image; needed for ``mask``.

    Attributes:
        before: the conversation that it continues, if any.
        keep: whether the driver keeps the stream for a further question.

    Raises:
        PromptError: if the question or the perception mode cannot be used with this model.
    """

    keep = False

    def __init__(
        self,
        request: Request,
        processor: VPTProcessor,
        vocabulary: Vocabulary,
        decode_map: DecodeMap | None = None,
        model: Mapping[str, Any] | None = None,
        warnings: Iterable[str] = (),
        before: Transcript | None = None,
        propose: Propose | None = None,
        segment: Segment | None = None,
    ) -> None:
        self.request, self.before = request, before
        earlier = () if before is None else before.records
        self.recorder = Recorder(
            request, processor, vocabulary, decode_map, model, warnings, earlier
        )
        self._processor = processor
        self.vocabulary = vocabulary
        self._grammar = PerceptionGrammar(vocabulary)
        self._openers = {
            vocabulary.opener(branch): BRANCH_TOKENS[branch]
            for branch in vocabulary.branches
            if branch in BRANCH_TOKENS
        }
        self._show = REPLACEMENTS[request.replace_looks]
        self._branches = branches_of_mode(
            request.perception, vocabulary.branches if request.has_images else ()
        )
        writes_content = request.has_images and request.perception != "none"
        self._content = vocabulary.content.kinds if writes_content else ()
        self._replacer = None
        if (how := request.replace_content) is not None:
            self._replacer = ContentReplacer(how, vocabulary, request.sampling.seed)
        self._propose, self._segment = propose, segment
        self._objects: dict[tuple[int, GridBox], Place] = {}  # of an image and a region
        self._begin(before)
        self._num_rounds = 0
        self._last_call: tuple[object, ...] | None = None
        self._must_answer = self._is_out_of_tokens = False

    def _begin(self, before: Transcript | None) -> None:
        """Set the images of the stream, the pieces of the prompt, and a prescribed first call."""
        request = self.request
        if before is None:
            shown = [len(message.images) for message in request.messages]
            last = max((i for i, num in enumerate(shown) if num), default=0)
            self._images, self._first = request.all_images, sum(shown[:last])
        else:
            self._images = [*before.images, *request.images]
            self._first = len(before.images) if request.images else before.first
        self._check_look_at()
        regions, parts = [] if request.region is None else [request.region], []
        if request.point is not None:
            regions = [self._look_at_point(*request.point)]
        if request.look_for is not None:
            regions = self._look_for(request.look_for)
            if "crop" not in self.vocabulary.branches:
                parts, regions = [self._show_part(region) for region in regions], []
        self._prescribed = _region_ids(regions, self.vocabulary)
        question = invite(request.question, request.perception)
        images = [*request.images, *parts]
        if before is None:
            system = {} if request.system is None else {"system": request.system}
            self._prompt = self._processor.prompt(
                question, images, history=request.history, **system
            )
        else:
            self._prompt = [*before.pieces, *self._processor.follow_up(question, images)]
        self._pieces: list[Piece] = []

    def _check_look_at(self) -> None:
        request = self.request
        if isinstance(look_at := request.look_at, int) and look_at >= max(len(self._images), 1):
            raise PromptError(
                f"look_at={look_at} is the index of no image: the conversation has "
                f"{len(self._images)}, counted from 0"
            )

    @property
    def transcript(self) -> Transcript:
        """The conversation up to now, for a further question; only after the run has ended."""
        (last,) = self._pieces[-1].ids  # type: ignore[union-attr]
        end = self.vocabulary.ids[TURN_END]
        closing = self._closing(last)
        if closing.ids[-1] != end:
            closing = TokenPiece((*closing.ids, end))
        return Transcript(
            [*self._pieces[:-1], closing], self._images, self.recorder.trace.images, self._first
        )

    def _source(self) -> int:
        """Index of the image that a call concerns."""
        if isinstance(look_at := self.request.look_at, int):
            return look_at
        return self._first if look_at == "first" else len(self._images) - 1

    def _find(self, phrase: str, source: int) -> Sequence[Proposal]:
        """Boxes for a phrase in an image, best first, which are recorded."""
        assert self._propose is not None, "a phrase needs a detector"
        found = self._propose(self._images[source], phrase)
        self.recorder.add_proposals(phrase, source, found)
        return found

    def _region_of(self, proposal: Proposal, source: int) -> GridBox:
        """The smallest region whose crop holds a box."""
        box, size_wh = proposal.box_xyxy_px, self._images[source].size_wh
        region = region_to_show(box, size_wh, grid_size=self.vocabulary.grid_size)
        self._objects.setdefault((source, region), box)
        return region

    def _look_for(self, phrase: str) -> list[GridBox]:
        """Regions of the request's phrase, best first, each once; none if it is not found."""
        found = self._find(phrase, source := self._source())
        if not found:
            self.recorder.warn(
                f"{phrase!r} was not found in image {source}: the model looks where it chooses"
            )
        regions = [self._region_of(one, source) for one in found[: self.request.max_boxes]]
        return list(dict.fromkeys(regions))

    def _look_at_point(self, x: int, y: int) -> GridBox:
        """The cell of the request's point."""
        width, height = self._images[source := self._source()].size_wh
        if x >= width or y >= height:
            raise PromptError(
                f"point {x}, {y} lies outside image {source}, which has {width}x{height} px"
            )
        grid_size = self.vocabulary.grid_size
        cell = grid_box_covering((x, y, x + 1, y + 1), (width, height), grid_size=grid_size)
        region = GridBox(cell.x_min, cell.y_min, cell.x_min, cell.y_min)
        self._objects[source, region] = x, y
        return region

    def _show_part(self, region: GridBox) -> LoadedImage:
        """The crop of a region, as one more image of the prompt."""
        source = self._source()
        part = self._cut(region, source)
        self._images = [*self._images, part.image]
        self.recorder.add_shown(part, source)
        return part.image

    def _cut(self, region: GridBox, source: int) -> Part:
        """The crop of a region, narrowed to an object if that is asked for, or what replaces it."""
        image, grid_size = self._images[source], self.vocabulary.grid_size
        cut = crop_box_px(region, image.size_wh, grid_size=grid_size)
        shown, box = self._show(image, cut, self.request.sampling.seed)
        assert box is not None
        if not self.request.mask or self.request.replace_looks is not None:
            return Part(shown, box)
        assert self._segment is not None, "mask needs a segmenter"
        cells = crop_box_px(region, image.size_wh, grid_size=grid_size, margin=0)
        mask = self._segment(image, self._objects.get((source, region), cells))
        mask = mask[box[1] : box[3], box[0] : box[2]]
        dimmed = from_pixels(dim_rest(shown.pixels, mask), shown.source)
        return Part(dimmed, box, float(mask.mean()))

    def run(self) -> Exchange:
        """Answer the question, once; only to an :class:`Append` a :class:`Step` must be sent."""
        self.recorder.start()
        pieces: Sequence[Piece] = self._prompt
        calls: list[CallRecord] = []
        while True:
            ids = yield from self._write_turn(pieces, calls)
            source = self._source()
            parsed = parse_turn(self.vocabulary.symbols(ids), self.vocabulary.grid_size)
            for content in self.recorder.end_turn(ids, parsed, source):
                yield ContentEvent(content)
            wanted = [one for one in parsed.calls if one.branch in self.vocabulary.branches]
            reason = self._reason_to_stop(wanted, ids, source)
            outcome = {"": "executed", "repeated_call": "repeated"}.get(reason, "not_executed")
            calls = [self.recorder.add_call(call, ids, source, outcome) for call in wanted]
            for record in calls:
                yield CallEvent(record)
            if reason:
                break
            pairs = zip(wanted, calls, strict=True)
            results = [self._execute(call, source, record) for call, record in pairs]
            looks = [look for look, _ in results if look is not None]
            note = "".join(note for _, note in results)
            self._pieces.pop()  # the last token, which is appended with what must follow it
            pieces = [self._closing(ids[-1]), *self._processor.reply(looks, note)]
            self._num_rounds += 1
        yield StopEvent(self.recorder.stop(reason))

    def _write_turn(
        self, pieces: Sequence[Piece], calls: Sequence[CallRecord]
    ) -> Generator[Append | Event, Step | None, list[int]]:
        """Append pieces and let the model write a turn, whose ids are returned."""
        ids, state = ([], TurnState()) if calls else self._certain_start()
        if certain := tuple(ids):
            pieces = [*pieces, TokenPiece(certain)]
        while True:
            step = yield Append(pieces, self._rule(state, len(ids)))
            assert step is not None, "the driver must answer Append with a Step"
            self._pieces += pieces
            self.recorder.add_step(step, calls, len(certain))
            for call in calls:
                yield ResultEvent(call)
            for token_id in certain:
                yield self.recorder.add_token(token_id, is_last=False)
            token_id = step.token_id
            if self._replacer is not None:
                token_id = self._replacer.read(state, token_id)
            ids.append(token_id)
            state = self._grammar.advance(state, token_id)
            num_written = self.recorder.trace.counts.generated_tokens + 1
            self._is_out_of_tokens = step.is_last or num_written >= self.request.max_new_tokens
            is_last = self._is_out_of_tokens or self._ends_turn(token_id)
            yield self.recorder.add_token(token_id, is_last)
            if is_last:
                self._pieces.append(TokenPiece((token_id,)))
                return ids
            pieces, calls, certain = [TokenPiece((token_id,))], (), ()

    def _certain_start(self) -> tuple[list[int], TurnState]:
        """Ids with which the first turn must begin, short of its last: they are read at once."""
        ids: list[int] = []
        state = TurnState()
        while len(ids) + 1 < self.request.max_new_tokens:
            rule = self._rule(state, len(ids))
            if rule is None or rule.only is None or len(rule.only) != 1:
                break
            (token_id,) = rule.only
            if self._ends_turn(token_id):
                break
            ids.append(token_id)
            state = self._grammar.advance(state, token_id)
        return ids, state

    def _execute(
        self, call: PerceptionCall, source: int, record: CallRecord
    ) -> tuple[ImagePiece | FeaturePiece | None, str]:
        """Make the result of a call on an image: a look, if any, and a note.

        A crop becomes an image of the stream.
        """
        region, note = call.region, ""
        if call.branch == GROUNDING:
            found = self._find_for_call(record)
            note = format_found([one.box_xyxy_px for one in found], self._images[source].size_wh)
            if not found:
                return None, note
            region = self._region_of(found[0], source)
            record.region = astuple(region)
        if region is None:
            shown, _ = self._show(self._images[source], None, self.request.sampling.seed)
            return FeaturePiece(call.branch, shown), note
        part = self._cut(region, source)
        self._images.append(part.image)
        self.recorder.add_crop(record, part)
        return ImagePiece(part.image), note

    def _find_for_call(self, record: CallRecord) -> Sequence[Proposal]:
        """Boxes for the phrase of a call; a phrase that no detector can read finds none."""
        phrase, reason = record.phrase or "", ""
        try:
            if found := self._find(phrase, record.image)[:_MOST_FOUND]:
                return found
        except PromptError as exc:
            reason = f" ({exc})"
        record.outcome = "not_found"
        self.recorder.warn(f"{phrase!r} was not found in image {record.image}{reason}")
        return ()

    def _rule(self, state: TurnState, num_written: int) -> TokenRule | None:
        is_first = self._num_rounds == 0
        if is_first and num_written < len(self._prescribed):
            return TokenRule(only=(self._prescribed[num_written],))
        content = self._content
        if self._replacer is not None:
            if (rule := self._replacer.rule(state)) is not None:
                return rule
            content = self._replacer.permitted(content)
        if not self.request.constrain:
            return None
        if self._must_answer or self._num_rounds >= self.request.max_calls:
            return self._grammar.rule(state, content)
        must_call = (
            is_first and num_written == 0 and self.request.perception not in ("auto", "none")
        )
        return self._grammar.rule(state, (*self._branches, *content), must_call)

    def _reason_to_stop(
        self, calls: Sequence[PerceptionCall], ids: Sequence[int], source: int
    ) -> str:
        """Why the run ends with this turn of ``ids``; empty if it continues."""
        if not calls and self._must_answer:
            return "repeated_call"
        if not calls or self.request.perception == "none" or not self.request.has_images:
            return "stop" if self._ends_turn(ids[-1]) else "length"
        if self._num_rounds >= self.request.max_calls:
            return "max_calls"
        said = (
            (call.branch, ids[call.start : call.end] if call.branch == GROUNDING else call.region)
            for call in calls
        )
        key = (source, *said)
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


def _region_ids(regions: Sequence[GridBox], vocabulary: Vocabulary) -> list[int]:
    """Ids of a call at regions, which the request makes in place of the model; none without any."""
    if not regions:
        return []
    try:
        text = "".join(format_region(region, vocabulary.grid_size) for region in regions)
        tokens = [*split_symbols(text), TURN_END]
    except RegionError as exc:
        raise PromptError(f"region: {exc}") from exc
    if "crop" not in vocabulary.branches:
        raise PromptError("region: this model has no region tokens")
    return [vocabulary.ids[token] for token in tokens]
