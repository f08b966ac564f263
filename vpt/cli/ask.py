"""``vpt ask``: one question about images, answered while it is watched."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vpt.boxes import PixelBox
from vpt.cli.model import (
    add_model_arguments,
    add_request_arguments,
    check_model_arguments,
    load_runtime,
)
from vpt.cli.output import check_targets, print_err, print_out, write_file
from vpt.cli.parser import Command, add_flag, add_path
from vpt.errors import PromptError
from vpt.inference.request import OPTIONS, Request
from vpt.protocol.tokens import invite
from vpt.view.wording import STOP_TEXT, call_text, content_text, count_text, tokens_text

if TYPE_CHECKING:
    from vpt.images import LoadedImage
    from vpt.inference.events import Event
    from vpt.runtime import Runtime
    from vpt.trace.records import CallRecord, Trace

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")

CUT_SHORT = {
    "length": "the answer is cut off at the token limit; allow more with --max-new-tokens",
    "max_calls": "the run ended because the model wanted more calls; allow more with --max-calls",
    "repeated_call": "the model repeated one call, so looking again was ended",
}


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "words", nargs="+", metavar="IMAGE ... QUESTION", help="image files, then the question"
    )
    add_model_arguments(parser)
    looking = parser.add_argument_group("looking again")
    add_request_arguments(looking, ("perception", "max_calls", "look_at", "constrain"))
    writing = parser.add_argument_group("writing")
    add_request_arguments(writing, ("max_new_tokens", "temperature", "top_p", "top_k", "seed"))
    output = parser.add_argument_group("output")
    add_flag(output, "--json", "print the trace as JSON, nothing else")
    add_path(output, "--trace", "FILE", "save the trace as JSON")
    drawing = f"save a drawing of the trace ({', '.join(PICTURE_SUFFIXES)})"
    add_path(output, "--picture", "FILE", drawing)


def _ask(args: argparse.Namespace) -> None:
    """Check all there is to check, load the model, ask it, write what is wanted."""
    *paths, question = args.words
    _check_words(question, args.perception)
    check_model_arguments(args)
    if args.picture and args.picture.suffix.lower() not in PICTURE_SUFFIXES:
        raise PromptError(
            f"cannot save a picture as {args.picture.name}; expected a name that ends in "
            f"{', '.join(PICTURE_SUFFIXES)}"
        )
    check_targets({"--picture": args.picture, "--trace": args.trace}, paths)
    from vpt.images import load_image

    images = [load_image(path) for path in paths]
    for image in images:
        if image.num_frames > 1:
            print_err(f"note: {image.source} has {image.num_frames} frames; only the first is seen")
    options = {name: value for name, value in vars(args).items() if name in OPTIONS}
    request = Request.of(images, question, options)
    runtime = load_runtime(args)
    from vpt.inference.events import StopEvent

    screen = Screen([image.source for image in images], show_text=not args.json)
    for event in runtime.stream(images, question, **request.options):
        screen.show(event)
    assert isinstance(event, StopEvent), "a stream that does not fail ends with it"
    trace = event.trace
    if args.json:
        print_out(json.dumps(trace.to_dict(images=False)))
    _write_outputs(trace, images, args)
    for warning in trace.warnings:
        print_err(f"warning: {warning}")
    _note_content(trace, runtime)
    if trace.malformed:
        print_err(f"note: {count_text(len(trace.malformed), 'malformed call')} read as text")
    if trace.stop_reason in CUT_SHORT:
        print_err(f"note: {CUT_SHORT[trace.stop_reason]}")
    if args.verbose:
        _summarise(trace)


def _check_words(question: str, perception: str) -> None:
    invite(question, perception)  # refuses an empty question
    if any("\ud800" <= char <= "\udfff" for char in question):  # bytes that Python could not read
        raise PromptError("the question is not valid text in the terminal's encoding; use UTF-8")
    try:
        is_file = Path(question).is_file()
    except (OSError, ValueError):  # too long for a name, or with a NUL in it
        is_file = False
    if is_file:
        raise PromptError(
            f"the last word is the question, but {question!r} is a file; add a question after it"
        )


def _write_outputs(trace: Trace, images: list[LoadedImage], args: argparse.Namespace) -> None:
    if args.picture:
        from vpt.view.picture import draw

        picture = draw(trace, [image.pixels for image in images])
        write_file(picture.save, args.picture)
    if args.trace:
        write_file(trace.save, args.trace)


def _note_content(trace: Trace, runtime: Runtime) -> None:
    """Report which of the model's own depth maps and boxes cannot be used."""
    for one in trace.content:
        if one.is_whole:
            continue
        most = runtime.vocabulary.content.num_cells
        of = f" of {most}" if one.kind == "depth" else ""
        print_err(f"note: {content_text(one)}{of}; allow more with --max-new-tokens")
    has_map = any(one.kind == "depth" and one.is_whole for one in trace.content)
    if has_map and runtime.depth_tokenizer is None:
        print_err(
            "note: the depth map is kept as codes; this model has no depth tokenizer to decode "
            "them, name one with --depth-tokenizer"
        )


def _summarise(trace: Trace) -> None:
    counts, timings = trace.counts, trace.timings
    print_err(
        f"{tokens_text(counts)}, {counts.llm_tokens} read by the LLM; "
        f"{count_text(len(trace.calls), 'call')}; "
        f"{count_text(counts.images_encoded, 'image')} encoded, {counts.images_reused} reused"
    )
    print_err(
        f"prefill {timings.prefill:.0f} ms, first token after {timings.first_token:.0f} ms, "
        f"{timings.total:.0f} ms in all"
    )
    print_err(f"end: {STOP_TEXT.get(trace.stop_reason, trace.stop_reason)}")


class Screen:
    """Shows a run on the terminal: the model's text on stdout, a line for each call on stderr.

    White space at both ends of a turn is left out, as in ``trace.answer``.
    """

    def __init__(self, sources: Sequence[str], show_text: bool) -> None:
        self._show_text = show_text
        self._names = [Path(source).name for source in sources]
        self._boxes: list[PixelBox | None] = [None] * len(sources)
        self._is_fresh = True  # nothing of this turn is shown yet
        self._held = ""  # white space that more text may follow
        self._num_calls = 0  # of this turn

    def show(self, event: Event) -> None:
        """Show one event of the run."""
        from vpt.inference.events import CallEvent, ContentEvent, ResultEvent, TokenEvent

        if isinstance(event, TokenEvent):
            self._num_calls = 0
            self._add(event.text)
            return
        self._end_turn()
        if isinstance(event, CallEvent):
            self._num_calls += 1
            if event.call.outcome != "executed":
                is_repeated = event.call.outcome == "repeated"
                why = "the same call as before" if is_repeated else "the run ends here"
                print_err(f"[does not look again: {call_text(event.call)}, {why}]", name="")
        elif isinstance(event, ContentEvent):
            print_err(f"[drew: {content_text(event.content)}, {event.content.ms:.0f} ms]", name="")
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
            f"[looks again: {call_text(call)} → {place}, "
            f"{count_text(call.num_tokens, 'token')}, "
            f"{call.encode_ms + call.run_ms:.0f} ms{together}]"
        )


COMMAND = Command(
    help="ask a question about images",
    usage="vpt ask [options] [--] [IMAGE ...] QUESTION",
    description=(
        "Ask a question about images. What the model says is written to stdout as it comes;\n"
        "when it looks again, a line on stderr says where."
    ),
    examples=(
        "examples:\n"
        '  vpt ask photo.jpg "What does the sign say?" --picture seen.png\n'
        '  vpt ask --model ./my-model --perception crop a.png b.png "Which is older?"'
    ),
    add_arguments=_add_arguments,
    run=_ask,
    verbose="show a summary, library messages and tracebacks",
)
