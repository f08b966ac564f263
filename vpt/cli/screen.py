"""A run as it happens on a terminal: the model's words, and a line for each look and drawing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vpt.boxes import PixelBox
from vpt.cli.output import print_err, print_out
from vpt.inference.events import CallEvent, ContentEvent, Event, ResultEvent, TokenEvent
from vpt.trace.records import CallRecord
from vpt.view.wording import call_words, content_words, count_words


class Screen:
    """What the model says on stdout, turn by turn, and its calls on stderr, line by line.

    White space at both ends of a turn is left out, as in ``trace.answer``.

    Args:
        sources: of the given images.
        show_text: whether what the model says is shown.
    """

    def __init__(self, sources: Sequence[str], show_text: bool) -> None:
        self._show_text = show_text
        self._names = [Path(source).name for source in sources]
        self._boxes: list[PixelBox | None] = [None] * len(sources)
        self._is_fresh = True  # nothing of this turn is shown yet
        self._held = ""  # white space that more text may follow
        self._num_calls = 0  # of this turn

    def show(self, event: Event) -> None:
        """Take one event of the run in."""
        if isinstance(event, TokenEvent):
            self._num_calls = 0
            self._add(event.text)
            return
        self._end_turn()
        if isinstance(event, CallEvent):
            self._num_calls += 1
            if event.call.outcome != "executed":
                print_err(self._refusal(event.call), name="")
        elif isinstance(event, ContentEvent):
            print_err(f"[drew: {content_words(event.content)}, {event.content.ms:.0f} ms]", name="")
        elif isinstance(event, ResultEvent):
            print_err(self._result(event.call), name="")

    def _add(self, text: str) -> None:
        text = self._held + text
        if self._is_fresh:
            text = text.lstrip()
        shown = text.rstrip()
        self._held = text[len(shown) :]
        if shown and self._show_text:
            print_out(shown, end="")
        self._is_fresh = self._is_fresh and not shown

    def _end_turn(self) -> None:
        if not self._is_fresh and self._show_text:
            print_out("")
        self._is_fresh, self._held = True, ""

    def _result(self, call: CallRecord) -> str:
        name, box = self._names[call.image], call.box_xyxy_px or self._boxes[call.image]
        if call.result_image is not None:
            self._names.append(name)
            self._boxes.append(box)
        place = f"box {','.join(map(str, box))} of {name}" if box else name
        together = f" for all {self._num_calls} calls" if self._num_calls > 1 else ""
        return (
            f"[looks again: {call_words(call)} → {place}, "
            f"{count_words(call.num_tokens, 'token')}, "
            f"{call.encode_ms + call.run_ms:.0f} ms{together}]"
        )

    def _refusal(self, call: CallRecord) -> str:
        why = "the same call as before" if call.outcome == "repeated" else "the run ends here"
        return f"[does not look again: {call_words(call)}, {why}]"
