"""``vpt ask``: one question about images, answered while it is watched."""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vpt.boxes import PixelBox
from vpt.cli.model import (
    add_finders,
    add_model_arguments,
    add_request_arguments,
    check_model_arguments,
    load_runtime,
    print_loading,
)
from vpt.cli.output import check_out_folder, check_targets, print_err, print_out, write_file
from vpt.cli.parser import (
    EXIT_FAULTS,
    Command,
    add_flag,
    add_path,
    add_value,
    comma_list,
    path_or_other,
    whole_number,
)
from vpt.errors import PromptError
from vpt.inference.request import OPTIONS, Request
from vpt.protocol.tokens import invite
from vpt.view.wording import STOP_TEXT, call_text, content_text, count_text, tokens_text

if TYPE_CHECKING:
    from vpt.images import LoadedImage
    from vpt.inference.events import Event
    from vpt.runtime import Runtime, Snapshot
    from vpt.trace.records import CallRecord, Trace

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")

CUT_SHORT = {
    "length": "the answer is cut off at the token limit; allow more with --max-new-tokens",
    "max_calls": "the run ended because the model wanted more calls; allow more with --max-calls",
    "repeated_call": "the model repeated one call, so looking again was ended",
}


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "words",
        nargs="+",
        type=path_or_other,
        metavar="IMAGE ... QUESTION",
        help="files, URLs, or - for the bytes of an image on stdin; or one folder, each image of "
        "which is asked about separately; then the question",
    )
    add_value(parser, "--batch-size", "B", whole_number(1), "images of a folder at once", 8)
    add_question_arguments(parser)
    finding = parser.add_argument_group("where to look first")
    phrase = "look first where a detector finds this, such as 'the blue tag'"
    add_value(finding, "--look-for", "PHRASE", str, phrase)
    add_request_arguments(finding, ("max_boxes",))
    place = "look first at this pixel of the image; --mask then narrows the crop to what is there"
    add_value(finding, "--point", "X,Y", _point, place)
    output = parser.add_argument_group("output")
    add_flag(output, "--json", "print the trace as JSON, nothing else; one line per image")
    add_path(output, "--trace", "FILE", "save the trace as JSON; of a folder, name a folder")
    drawing = f"save a drawing of the trace ({', '.join(PICTURE_SUFFIXES)}); of a folder, a folder"
    add_path(output, "--picture", "FILE", drawing)


def _point(text: str) -> tuple[int, int]:
    x, _, y = text.partition(",")
    try:
        return int(x), int(y)
    except ValueError as exc:
        raise argparse.ArgumentTypeError(f"expected two whole numbers X,Y, got {text!r}") from exc


def add_question_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of model, image sources and answers."""
    hosts = "fetch images whose URLs are of these hosts; no others are fetched"
    add_value(parser, "--allowed-media-domains", "A,B", comma_list, hosts, ())
    add_model_arguments(parser)
    looking = parser.add_argument_group("looking again")
    add_request_arguments(looking, ("perception", "max_calls", "look_at", "constrain", "mask"))
    add_finders(parser)
    writing = parser.add_argument_group("writing")
    add_request_arguments(writing, ("max_new_tokens", "temperature", "top_p", "top_k", "seed"))


def _ask(args: argparse.Namespace) -> int | None:
    """Check all there is to check, load the model, ask it, write what is wanted."""
    *paths, question = args.words
    _check_words(question, args.perception)
    check_model_arguments(args)
    if any(kind_of(path) == "folder" for path in paths):
        return _ask_folder(args, paths, question)
    check_picture_name(args.picture)
    check_targets({"--picture": args.picture, "--trace": args.trace}, paths)
    print_loading(args)
    images = [load_image_word(path, args) for path in paths]
    options = {**options_of(args), "look_for": args.look_for, "point": args.point}
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
    write_outputs(trace, images, args.picture, args.trace)
    note(trace, runtime, args.verbose)
    return None


def _ask_folder(args: argparse.Namespace, paths: Sequence[str], question: str) -> int | None:
    """Ask about each image of a folder, in the order of their names; one that fails is reported."""
    if len(paths) > 1:
        raise PromptError("the images of a folder are asked about one by one; give nothing else")
    from vpt.images import find_images

    files = find_images(folder := Path(paths[0]))
    for option, out in (("--picture", args.picture), ("--trace", args.trace)):
        is_file = out and out.suffix.lower() in (*PICTURE_SUFFIXES, ".json")
        if out and (is_file or out.resolve() == folder.resolve()):
            raise PromptError(f"{option}: expected another folder, to save a file for each image")
        check_out_folder(out or Path(), option)
    options = options_of(args)
    Request.of([], question, {**options, "perception": "auto"})  # refuses impossible values
    options |= {"look_for": args.look_for, "point": args.point}
    print_loading(args)
    runtime = load_runtime(args)
    from vpt.inference.events import ErrorEvent

    requests = runtime.requests(files, question, **options)
    num_failed = 0
    for file, run in zip(
        files, _in_order(runtime.watch_many(requests, args.batch_size)), strict=True
    ):
        if isinstance(last := run[-1].event, ErrorEvent):
            num_failed += 1
            print_err(f"error: {Path(file).name}: {' '.join(str(last.error).split())}")
        else:
            _report_one(args, Path(file).name, run, runtime)
    if num_failed:
        print_err(f"error: {num_failed} of {count_text(len(files), 'image')} failed")
    return EXIT_FAULTS if num_failed else None


def _report_one(
    args: argparse.Namespace, name: str, run: Sequence[Snapshot], runtime: Runtime
) -> None:
    """Print what happened with one image of a folder, and save what is wanted of it."""
    screen = Screen([name], show_text=False)
    for one in run:
        screen.show(one.event)
    trace, images = run[-1].trace, list(run[-1].images)
    assert trace is not None, "a run that does not fail has a trace"
    if args.json:
        print_out(json.dumps(trace.to_dict(images=False)))
    else:
        print_out(" ".join(trace.answer.split()), label=f"{name}: ")
    picture = args.picture and args.picture / f"{name}.jpg"
    write_outputs(trace, images, picture, args.trace and args.trace / f"{name}.json")
    note(trace, runtime, args.verbose)


def _in_order(snapshots: Iterator[Snapshot]) -> Iterator[list[Snapshot]]:
    """Collect the snapshots of each request; yield them in the order of the requests."""
    from vpt.inference.events import ErrorEvent, StopEvent

    collected: dict[int, list[Snapshot]] = defaultdict(list)
    ended: set[int] = set()
    number = 0
    for one in snapshots:
        collected[one.index].append(one)
        if isinstance(one.event, StopEvent | ErrorEvent):
            ended.add(one.index)
        while number in ended:
            yield collected.pop(number)
            number += 1


def check_picture_name(picture: Path | None) -> None:
    """Refuse a file whose name is not that of a picture."""
    if picture and picture.suffix.lower() not in PICTURE_SUFFIXES:
        raise PromptError(
            f"cannot save a picture as {picture.name}; expected a name that ends in "
            f"{', '.join(PICTURE_SUFFIXES)}"
        )


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """The options of a request among the arguments."""
    return {name: value for name, value in vars(args).items() if name in OPTIONS}


def load_image_word(path: str, args: argparse.Namespace) -> LoadedImage:
    """Load an image from a path, a URL, a data URI, or stdin for ``-``."""
    from vpt.images import ImageLimits, load_image

    limits = ImageLimits(allowed_media_domains=args.allowed_media_domains)
    if path != "-":
        image = load_image(path, limits=limits)
    elif sys.stdin.isatty():
        raise PromptError("- reads an image from stdin, but that is the terminal; pipe a file in")
    else:
        image = load_image(sys.stdin.buffer, limits=limits, name="<stdin>")
    if image.num_frames > 1:
        print_err(f"note: {image.source} has {image.num_frames} frames; only the first is seen")
    return image


def kind_of(word: str) -> str | None:
    """``"file"`` or ``"folder"``, if a word names one."""
    try:
        return "folder" if Path(word).is_dir() else "file" if Path(word).is_file() else None
    except (OSError, ValueError):  # too long for a name, or with a NUL in it
        return None


def _check_words(question: str, perception: str) -> None:
    invite(question, perception)  # refuses an empty question
    check_text(question)
    if kind := kind_of(question):
        raise PromptError(
            f"the last word is the question, but {question!r} is a {kind}; add a question after it"
        )


def check_text(question: str) -> None:
    """Refuse bytes that Python could not read."""
    if any("\ud800" <= char <= "\udfff" for char in question):
        raise PromptError("the question is not valid text in the terminal's encoding; use UTF-8")


def write_outputs(
    trace: Trace, images: list[LoadedImage], picture: Path | None, saved: Path | None
) -> None:
    """Draw the trace, and save it, each to a file if one is named."""
    if picture:
        from vpt.view.picture import draw

        write_file(draw(trace, [image.pixels for image in images]).save, picture)
        print_err(f"saved {picture}")
    if saved:
        trace.keep_thumbnails(images)
        write_file(trace.save, saved)
        print_err(f"saved {saved}")


def note(trace: Trace, runtime: Runtime, verbose: bool) -> None:
    """Report what a person should know about a run that has ended."""
    for warning in trace.warnings:
        print_err(f"warning: {warning}")
    if trace.proposals:
        best, number = trace.proposals[0], count_text(len(trace.proposals), "place")
        print_err(f"found {best.phrase!r} in {number}, the best with a score of {best.score:.2f}")
    _note_content(trace, runtime)
    if trace.malformed:
        print_err(f"note: {count_text(len(trace.malformed), 'malformed call')} read as text")
    if trace.stop_reason in CUT_SHORT:
        print_err(f"note: {CUT_SHORT[trace.stop_reason]}")
    if verbose:
        _summarise(trace)


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

    Args:
        sources: of the images of the stream so far.
        boxes: of those of them that were cut out; by default of none.
    """

    def __init__(
        self, sources: Sequence[str], show_text: bool, boxes: Sequence[PixelBox | None] = ()
    ) -> None:
        self._show_text = show_text
        self._names = [Path(source).name for source in sources]
        self._boxes = [*boxes, *[None] * (len(sources) - len(boxes))]
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
        self.end_turn()
        if isinstance(event, CallEvent):
            self._num_calls += 1
            if not event.call.is_answered:
                is_repeated = event.call.outcome == "repeated"
                why = "the same call as before" if is_repeated else "the run ends here"
                print_err(
                    f"[does not look again: {call_text(event.call)}, {why}]", name="", is_dim=True
                )
        elif isinstance(event, ContentEvent):
            line = f"[drew: {content_text(event.content)}, {event.content.ms:.0f} ms]"
            print_err(line, name="", is_dim=True)
        elif isinstance(event, ResultEvent):
            print_err(self._result(event.call), name="", is_dim=True)

    def _add(self, text: str) -> None:
        text = self._held + text
        if self._is_fresh:
            text = text.lstrip()
        shown = text.rstrip()
        self._held = text[len(shown) :]
        if shown and self._show_text:
            print_out(shown, end="")
        self._is_fresh = self._is_fresh and not shown

    def end_turn(self) -> None:
        """End the line of text, if one has begun."""
        if not self._is_fresh and self._show_text:
            print_out("")
        self._is_fresh, self._held = True, ""

    def _result(self, call: CallRecord) -> str:
        if call.outcome == "not_found":
            return f"[looks for {call_text(call)}: not found]"
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
        "Ask a question about images. The answer is written to stdout token by token. For each\n"
        "call of the model, a line on stderr names the region or the branch."
    ),
    examples=(
        "examples:\n"
        '  vpt ask photo.jpg "What does the sign say?" --picture seen.png\n'
        '  vpt ask --model ./my-model --perception crop a.png b.png "Which is older?"\n'
        '  vpt ask photos "Is there a dog?" --json > traces.jsonl\n'
        '  curl -s https://example.com/a.jpg | vpt ask - "What is this?"'
    ),
    add_arguments=_add_arguments,
    run=_ask,
    verbose="show a summary, library messages and tracebacks",
)
