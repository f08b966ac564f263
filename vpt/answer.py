"""An answer and the looks that led to it, as pictures and arrays."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vpt.boxes import GridBox, PixelBox, clamp, compose
from vpt.errors import VPTError
from vpt.protocol.tokens import BRANCH_TOKENS
from vpt.trace.records import CallRecord, Trace, brief
from vpt.view.picture import draw
from vpt.view.renderers import BLANK, Album, draw_look, score_map, seen_of_call
from vpt.view.wording import OUTCOME_TEXT, STOP_TEXT, call_facts, call_text, html_environment


@dataclass(frozen=True, repr=False)
class Answer:
    """The answer to a question; a notebook shows it with its picture.

    Attributes:
        text: the answer, without control tokens.
        stop_reason: ``"stop"``, ``"length"``, ``"max_calls"`` or ``"repeated_call"``.
        trace: the record of the run.
        images: the given images, in order; ``None`` for the copies that the trace contains (JPEG,
            longer side at most 768 px).
    """

    text: str
    stop_reason: str
    trace: Trace
    images: Sequence[Image.Image] | None = field(default=None, compare=False)

    @classmethod
    def from_trace(cls, trace: Trace, images: Sequence[Image.Image] | None = None) -> Answer:
        """Make the answer of a run from its trace, such as one that ``Trace.load`` returned."""
        return cls(trace.answer, trace.stop_reason, trace, images)

    @property
    def num_calls(self) -> int:
        """Number of perception calls that were executed."""
        return len(self.looks)

    @property
    def warnings(self) -> list[str]:
        """Reasons not to rely on the answer, as sentences."""
        return self.trace.warnings

    @cached_property
    def looks(self) -> tuple[Look, ...]:
        """The executed calls and their results, in order."""
        calls = [call for call in self.trace.calls if call.outcome == "executed"]
        return tuple(Look(call, self) for call in calls)

    def picture(self) -> Image.Image:
        """Draw the run as one picture, as ``vpt ask --picture`` does: RGB, 1200 pixels wide.

        Raises:
            ImageError: if neither the answer nor its trace has the given images.
        """
        return draw(self.trace, self.images)

    @cached_property
    def _album(self) -> Album:
        """The images of the run; may raise ``ImageError``, as :meth:`picture` does."""
        return Album(self.trace, self.images)

    def __repr__(self) -> str:
        looks = ", ".join(look._summary for look in self.looks)
        return f"Answer(text={brief(self.text)}, stop_reason={self.stop_reason!r}, looks=[{looks}])"

    def _repr_html_(self) -> str:
        """HTML for notebooks; all text in it is escaped."""
        picture, why_none = "", ""
        try:
            buffer = io.BytesIO()
            self.picture().save(buffer, format="JPEG", quality=80)
            picture = base64.b64encode(buffer.getvalue()).decode("ascii")
        except VPTError as exc:
            why_none = str(exc)
        end = self.stop_reason
        calls = [
            (call_text(call), call.box_xyxy_px, self._facts(call)) for call in self.trace.calls
        ]
        return (
            html_environment("vpt.view")
            .get_template("answer.html")
            .render(
                answer=self,
                calls=calls,
                picture=picture,
                why_none=why_none,
                end="" if end == "stop" else STOP_TEXT.get(end, end),
            )
        )

    def _facts(self, call: CallRecord) -> str:
        if call.outcome != "executed":
            return OUTCOME_TEXT.get(call.outcome, call.outcome)
        return call_facts(call, sum(other.turn == call.turn for other in self.trace.calls))


@dataclass(frozen=True, repr=False, eq=False)
class Look:
    """An executed call of a run and its result.

    Attributes:
        call: the record of the call.
        answer: the answer it led to.
    """

    call: CallRecord
    answer: Answer

    @property
    def branch(self) -> str:
        """``"crop"`` or a re-encoding branch."""
        return self.call.branch

    @property
    def region(self) -> GridBox | None:
        """Cells of the grid that a region call names."""
        return None if self.call.region is None else GridBox(*self.call.region)

    @property
    def image_index(self) -> int:
        """Index, in ``trace.images``, of the image that it looked at: a given one or a crop."""
        return self.call.image

    @property
    def image(self) -> Image.Image:
        """The image that it looked at, RGB; may raise ``ImageError``, as :meth:`Answer.picture`."""
        return self.answer._album.image(self.call.image)

    @property
    def crop(self) -> Image.Image | None:
        """What the model saw of a region, RGB; ``None`` for a re-encoding."""
        if self.call.result_image is None:
            return None
        crop = self.answer._album.image(self.call.result_image)
        is_blank = self.answer.trace.settings.get("replace_looks") == "blank"
        return Image.new("RGB", crop.size, BLANK) if is_blank else crop

    @property
    def score_map(self) -> Image.Image | None:
        """The scores as z-scores over the image in grey, RGB, of its size; ``None`` without."""
        if self.scores is None:
            return None
        return draw_look(self.answer._album, self.call, self.image.size).picture

    @cached_property
    def scores(self) -> NDArray[np.float32] | None:
        """``[h, w]``: similarity of each cell to the control state; ``None`` without scores."""
        return score_map(self.call)

    @property
    def box_xyxy_px(self) -> PixelBox:
        """The part of the given image that the model saw, in pixels, ends exclusive."""
        if self.call.box_xyxy_px is not None:
            return self.call.box_xyxy_px
        trace = self.answer.trace
        record = trace.images[self.call.image]
        frame = record.box_xyxy_px or (0, 0, *record.size_wh)
        if self.branch not in BRANCH_TOKENS:
            return frame
        x0, y0, x1, y1 = map(round, clamp(seen_of_call(trace, self.call), record.size_wh))
        return compose(frame, (x0, y0, x1, y1))

    @property
    def grid_hw(self) -> tuple[int, int] | None:
        """``(h, w)`` of the tokens that it appended to the stream."""
        return self.call.grid_hw

    @property
    def num_tokens(self) -> int:
        """Number of tokens that it appended to the stream as features."""
        return self.call.num_tokens

    @property
    def ms(self) -> float:
        """Wall time of the encoder and the LLM, for all calls of the turn together."""
        return self.call.encode_ms + self.call.run_ms

    @property
    def _summary(self) -> str:
        """``"crop 112,56,280,224"`` or the name of the branch."""
        box = self.call.box_xyxy_px
        return self.branch if box is None else f"{self.branch} {','.join(map(str, box))}"

    def __repr__(self) -> str:
        return f"Look({self._summary}, num_tokens={self.num_tokens}, ms={self.ms:.0f})"
