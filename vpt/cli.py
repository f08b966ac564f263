"""The ``vpt`` command: ask a model about pictures, or make a model of a base one.

What the model says goes to stdout, all else to stderr. Heavy imports wait until the arguments are
known to be good, so that ``vpt --help`` and wrong usage answer at once.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vpt import __version__
from vpt.errors import BudgetError, CheckpointError, ImageError, PromptError
from vpt.tokens import (
    ENCODER_TO_BRANCH,
    PERCEPTION_MODES,
    RELEASED_GRID_SIZE,
    invite,
    perception_tokens,
)

if TYPE_CHECKING:
    from vpt.controller import Event, Request
    from vpt.images import LoadedImage
    from vpt.runtime import Runtime
    from vpt.trace import CallRecord, Trace

EXIT_FINE, EXIT_BUG, EXIT_USAGE, EXIT_IMAGE, EXIT_MODEL, EXIT_MEMORY = range(6)
EXIT_INTERRUPTED = 130
EXIT_PIPE = 141

EXIT_CODES = """\
exit codes:
  0    fine
  1    something unexpected: a bug, shown with a traceback
  2    wrong usage
  3    an input image cannot be used
  4    the model cannot be loaded or built
  5    out of memory
  130  interrupted with Ctrl-C
  141  the reader of stdout went away
"""
DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("cpu", "cuda", "mps", "xpu")
LOOK_AT = ("first", "latest")  # vpt.controller.LOOK_AT, whose import is heavy
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")

CUT_SHORT = {
    "length": "the answer is cut off at the token limit; allow more with --max-new-tokens",
    "max_calls": "the run ended because the model wanted more calls; allow more with --max-calls",
    "repeated_call": "the model repeated one call, so looking again was ended",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code.

    Args:
        argv: arguments without the program's name; those of the process by default.
    """
    try:
        args = build_parser().parse_args(argv)
    except SystemExit as exc:  # argparse has said what there is to say
        return exc.code if isinstance(exc.code, int) else EXIT_USAGE
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # characters the terminal lacks must not end the run
            stream.reconfigure(errors="backslashreplace")
    try:
        args.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        _say("interrupted", before="\n")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Python flushes stdout once more when it ends, and would complain then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE
    except Exception as exc:
        code, advice = _judge(exc)
        if code == EXIT_BUG or args.verbose:
            _say(traceback.format_exc().rstrip(), name="")
        if code == EXIT_BUG:
            _say("this is a bug; please report it with the lines above")
        else:
            _say(f"error: {' '.join(str(exc).split())}{advice}")
        return code
    return EXIT_FINE


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="vpt",
        description="Run multimodal LLMs that decide by themselves to look again.",
        epilog=f'example:\n  vpt ask photo.jpg "What does the sign say?"\n\n{EXIT_CODES}',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"vpt {__version__}")
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", required=True, parser_class=_Parser
    )
    _add_ask(commands)
    _add_init(commands)
    return parser


class _Parser(argparse.ArgumentParser):
    """Lets options stand between the images and the question, as argparse by itself does not."""

    _is_inner = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._is_inner:
            return super().parse_known_args(args, namespace)
        self._is_inner = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._is_inner = False


def _add_ask(commands: Any) -> None:
    parser = commands.add_parser(
        "ask",
        help="ask a question about images",
        usage="vpt ask [options] [IMAGE ...] QUESTION",
        description=(
            "Ask a question about images. What the model says is written to stdout as it comes;\n"
            "when it looks again, a line on stderr says where."
        ),
        epilog=(
            "examples:\n"
            '  vpt ask photo.jpg "What does the sign say?" --picture seen.png\n'
            '  vpt ask --model ./my-model --perception region a.png b.png "Which is older?"\n\n'
            + EXIT_CODES
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=_ask)
    parser.add_argument(
        "words", nargs="+", metavar="IMAGE ... QUESTION", help="image files, then the question"
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model",
        metavar="M",
        help="folder or hub id; by default a tiny built-in model with random weights, "
        "whose answers mean nothing",
    )
    model.add_argument("--revision", metavar="R", help="branch, tag or commit on the hub")
    model.add_argument(
        "--device", type=_device, metavar="D", help="cpu, cuda, cuda:1, ...; a GPU if there is one"
    )
    model.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights")
    looking = parser.add_argument_group("looking again")
    looking.add_argument(
        "--perception",
        choices=PERCEPTION_MODES,
        default="auto",
        help="auto: as the model likes; none: never; region: at a region; reencode: with any "
        "branch; or with the one named (default: auto)",
    )
    looking.add_argument(
        "--max-calls", type=_at_least(0), default=4, metavar="N", help="at most (default: 4)"
    )
    looking.add_argument(
        "--look-at",
        choices=LOOK_AT,
        default="first",
        help="the first image, or the latest, which may be a crop (default: first)",
    )
    looking.add_argument(
        "--no-constrain",
        dest="constrain",
        action="store_false",
        help="let the model write malformed calls; they are recorded and read as text",
    )
    writing = parser.add_argument_group("writing")
    writing.add_argument(
        "--max-new-tokens", type=_at_least(1), default=256, metavar="N", help="(default: 256)"
    )
    writing.add_argument(
        "--temperature",
        type=_number(0, math.inf),
        default=0.0,
        metavar="T",
        help="0 takes the likeliest token (default: 0)",
    )
    writing.add_argument(
        "--top-p",
        type=_number(0, 1),
        default=1.0,
        metavar="P",
        help="sample from the likeliest tokens that hold this probability (default: 1)",
    )
    writing.add_argument(
        "--top-k",
        type=_at_least(0),
        default=0,
        metavar="K",
        help="sample from so many of the likeliest tokens; 0 for all (default: 0)",
    )
    writing.add_argument("--seed", type=_at_least(0), default=0, metavar="S", help="(default: 0)")
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print the trace as JSON, nothing else")
    output.add_argument("--trace", type=Path, metavar="FILE", help="save the trace as JSON")
    output.add_argument(
        "--picture",
        type=Path,
        metavar="FILE",
        help=f"save a drawing of the trace ({', '.join(PICTURE_SUFFIXES)})",
    )
    output.add_argument(
        "--verbose", action="store_true", help="show a summary, library messages and tracebacks"
    )


def _add_init(commands: Any) -> None:
    parser = commands.add_parser(
        "init",
        help="make a VPT model of a Qwen2-VL one",
        description=(
            "Make a VPT model of a Qwen2-VL one: add perception tokens, vision branches and\n"
            "projectors. What is added is untrained."
        ),
        epilog=(
            "example:\n"
            "  vpt init --base Qwen/Qwen2-VL-2B-Instruct --branches clip,dino --out ./my-model\n\n"
            + EXIT_CODES
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=_init)
    parser.add_argument(
        "--base", required=True, metavar="ID_OR_FOLDER", help="a Qwen2-VL model to start from"
    )
    parser.add_argument(
        "--branches",
        required=True,
        type=_branches,
        metavar="LIST",
        help=f"out of {','.join(ENCODER_TO_BRANCH)}; regions can always be asked for, so an "
        "empty list is possible",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write")
    parser.add_argument("--dino", metavar="ID", help="DINOv2 encoder, if not the released one")
    parser.add_argument("--sam", metavar="ID_OR_PTH", help="SAM encoder, if not the released one")
    parser.add_argument(
        "--grid-size",
        type=_at_least(1),
        default=RELEASED_GRID_SIZE,
        metavar="K",
        help=f"cells per side of the region grid (default: {RELEASED_GRID_SIZE})",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights")
    parser.add_argument(
        "--seed", type=_at_least(0), default=0, metavar="S", help="of what is drawn (default: 0)"
    )
    parser.add_argument("--force", action="store_true", help="write into a folder that has files")
    parser.add_argument(
        "--verbose", action="store_true", help="show library messages and tracebacks"
    )


def _at_least(least: int) -> Callable[[str], int]:
    def whole_number(text: str) -> int:
        if not text.isascii() or not text.strip().lstrip("-").isdigit():
            raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}")
        if not least <= int(text) < 2**63:
            raise argparse.ArgumentTypeError(f"expected at least {least}, got {text}")
        return int(text)

    return whole_number


def _number(least: float, most: float) -> Callable[[str], float]:
    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None
        if not (math.isfinite(value) and least <= value <= most):
            bounds = f"from {least} to {most}" if math.isfinite(most) else f"of at least {least}"
            raise argparse.ArgumentTypeError(f"expected a number {bounds}, got {text}")
        return value

    return number


def _device(text: str) -> str:
    kind, _, index = text.partition(":")
    if kind not in DEVICES or not (index.isdigit() if ":" in text else not index):
        raise argparse.ArgumentTypeError(
            f"unknown device {text!r}; expected {', '.join(DEVICES)}, or one with an index "
            "as in cuda:1"
        )
    return text


def _branches(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if unknown := [name for name in names if name not in ENCODER_TO_BRANCH]:
        raise argparse.ArgumentTypeError(
            f"unknown branch {unknown[0]!r}; available: {', '.join(ENCODER_TO_BRANCH)}"
        )
    return names


def _ask(args: argparse.Namespace) -> None:
    """Check all there is to check, load the model, ask it, write what is wanted."""
    *paths, question = args.words
    _check_words(paths, question, args)
    _check_outputs(paths, args)
    from vpt.images import load_image

    images = [load_image(path) for path in paths]
    for image in images:
        if image.num_frames > 1:
            _say(f"note: {image.source} has {image.num_frames} frames; only the first is seen")
    request = _request(images, question, args)
    runtime = _load(args)
    if not runtime.trained:
        _say("note: this is the built-in model; its weights are random, its answer means nothing")
    trace = _show(runtime, request, show_text=not args.json)
    if args.json:
        print(json.dumps(trace.to_dict()), flush=True)
    _write_outputs(runtime, trace, images, args)
    if trace.malformed:
        _say(f"note: {_count(len(trace.malformed), 'malformed call')} read as text")
    if trace.stop_reason in CUT_SHORT:
        _say(f"note: {CUT_SHORT[trace.stop_reason]}")
    if args.verbose:
        _summarise(trace)


def _check_words(paths: Sequence[str], question: str, args: argparse.Namespace) -> None:
    invite(question, args.perception)  # refuses an empty question
    if any("\ud800" <= char <= "\udfff" for char in question):  # bytes that Python could not read
        raise PromptError("the question is not valid text in the terminal's encoding; use UTF-8")
    if _is_file(question):
        raise PromptError(
            f"the last word is the question, but {question!r} is a file; put a question behind it"
        )
    if args.revision and not args.model:
        raise PromptError("--revision needs --model; the built-in model has no revisions")


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # too long for a name, or with a NUL in it
        return False


def _check_outputs(paths: Sequence[str], args: argparse.Namespace) -> None:
    """Find out now what would prevent writing, so that no work is lost."""
    if args.picture and args.picture.suffix.lower() not in PICTURE_SUFFIXES:
        raise PromptError(
            f"cannot save a picture as {args.picture.name}; expected a name that ends in "
            f"{', '.join(PICTURE_SUFFIXES)}"
        )
    given = {Path(path).resolve() for path in paths}
    for option, target in (("--picture", args.picture), ("--trace", args.trace)):
        if target is None:
            continue
        if not target.parent.is_dir():
            raise PromptError(f"{option}: there is no folder {target.parent}; make it first")
        if target.is_dir():
            raise PromptError(f"{option}: {target} is a folder; expected a file name")
        if target.resolve() in given:
            raise PromptError(f"{option}: {target} is an input image and would be overwritten")
        if not os.access(target if target.exists() else target.parent, os.W_OK):
            raise PromptError(f"{option}: no permission to write {target}")
    if args.picture and args.trace and args.picture.resolve() == args.trace.resolve():
        raise PromptError(f"--picture and --trace name the same file {args.trace}")


def _request(images: list[LoadedImage], question: str, args: argparse.Namespace) -> Request:
    from vpt.controller import Request
    from vpt.decoding import Sampling

    try:
        sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
    except ValueError as exc:
        raise PromptError(str(exc)) from exc
    return Request(
        images,
        question,
        perception=args.perception,
        max_calls=args.max_calls,
        max_new_tokens=args.max_new_tokens,
        constrain=args.constrain,
        look_at=args.look_at,
        sampling=sampling,
    )


def _load(args: argparse.Namespace) -> Runtime:
    import vpt

    _quieten(args)
    if args.device:
        _check_device(args.device)
    hub = {"revision": args.revision} if args.revision else {}
    return vpt.load(args.model, device=args.device, dtype=args.dtype, **hub)


def _quieten(args: argparse.Namespace) -> None:
    """Keep transformers' bars and messages out of the way."""
    from transformers.utils import logging

    if not args.verbose:
        logging.disable_progress_bar()
        logging.set_verbosity_error()


def _check_device(name: str) -> None:
    import torch

    kind = name.partition(":")[0]
    try:
        if kind == "cuda" and not torch.cuda.is_available():  # asking is quieter than trying
            raise RuntimeError("torch finds no CUDA device")
        torch.empty(1, device=name)
    except (AssertionError, NotImplementedError, RuntimeError) as exc:
        if _is_out_of_memory(exc):
            raise
        reason = str(exc).strip().splitlines()[0]
        raise PromptError(f"device {name} is not there: {reason}; try --device cpu") from exc


def _show(runtime: Runtime, request: Request, show_text: bool) -> Trace:
    """Ask, and show what happens as it happens."""
    from vpt.controller import StopEvent

    screen = _Screen(request.images, show_text)
    for _, event in runtime.stream_many([request], batch_size=1):
        screen.show(event)
        if isinstance(event, StopEvent):
            return event.trace
    raise AssertionError("a stream ends with a StopEvent")


class _Screen:
    """What the model says on stdout, turn by turn, and its calls on stderr, line by line.

    White space at both ends of a turn is left out, as in ``trace.answer``.
    """

    def __init__(self, images: Sequence[LoadedImage], show_text: bool) -> None:
        self._show_text = show_text
        self._names = [Path(image.source).name for image in images]
        self._boxes: list[tuple[int, int, int, int] | None] = [None] * len(images)
        self._is_fresh = True  # nothing of this turn is shown yet
        self._held = ""  # white space that more text may follow
        self._num_calls = 0  # of this turn

    def show(self, event: Event) -> None:
        from vpt.controller import CallEvent, ResultEvent, TokenEvent

        if isinstance(event, TokenEvent):
            self._num_calls = 0
            self._add(event.text)
            return
        self._end_turn()
        if isinstance(event, CallEvent):
            self._num_calls += 1
            if event.call.outcome != "executed":
                _say(self._refusal(event.call), name="")
        elif isinstance(event, ResultEvent):
            _say(self._result(event.call), name="")

    def _add(self, text: str) -> None:
        from vpt.picture import printable

        text = self._held + text
        if self._is_fresh:
            text = text.lstrip()
        shown = text.rstrip()
        self._held = text[len(shown) :]
        if shown and self._show_text:
            print(printable(shown), end="", flush=True)
        self._is_fresh = self._is_fresh and not shown

    def _end_turn(self) -> None:
        if not self._is_fresh and self._show_text:
            print(flush=True)
        self._is_fresh, self._held = True, ""

    def _result(self, call: CallRecord) -> str:
        from vpt.picture import call_words

        name, box = self._names[call.image], call.box_xyxy_px or self._boxes[call.image]
        if call.result_image is not None:
            self._names.append(name)
            self._boxes.append(box)
        place = f"box {','.join(map(str, box))} of {name}" if box else name
        together = f" for all {self._num_calls} calls" if self._num_calls > 1 else ""
        return (
            f"[looks again: {call_words(call)} → {place}, {_count(call.num_tokens, 'token')}, "
            f"{call.encode_ms + call.run_ms:.0f} ms{together}]"
        )

    def _refusal(self, call: CallRecord) -> str:
        from vpt.picture import call_words

        why = "the same call as before" if call.outcome == "repeated" else "the run ends here"
        return f"[does not look again: {call_words(call)}, {why}]"


def _write_outputs(
    runtime: Runtime, trace: Trace, images: list[LoadedImage], args: argparse.Namespace
) -> None:
    if args.picture:
        from vpt.picture import draw, settings_of

        picture = draw(trace, [image.pixels for image in images], **settings_of(runtime))
        _write(picture.save, args.picture)
    if args.trace:
        trace.keep_thumbnails(images)
        _write(trace.save, args.trace)


def _write(save: Callable[[Path], object], target: Path) -> None:
    try:
        save(target)
    except OSError as exc:
        raise PromptError(f"cannot write {target}: {exc.strerror or exc}") from exc


def _summarise(trace: Trace) -> None:
    from vpt.picture import STOP_WORDS

    counts, timings = trace.counts, trace.timings
    _say(
        f"{counts.prompt_tokens} prompt + {counts.appended_tokens} appended + "
        f"{counts.generated_tokens} generated tokens, {counts.llm_tokens} read by the LLM; "
        f"{_count(len(trace.calls), 'call')}; {_count(counts.images_encoded, 'image')} encoded, "
        f"{counts.images_reused} reused"
    )
    _say(
        f"prefill {timings.prefill:.0f} ms, first token after {timings.first_token:.0f} ms, "
        f"{timings.total:.0f} ms in all"
    )
    _say(f"end: {STOP_WORDS.get(trace.stop_reason, trace.stop_reason)}")


def _init(args: argparse.Namespace) -> None:
    """Check the folder, build, save, and say what was made."""
    if args.out.exists() and not args.out.is_dir():
        raise PromptError(f"--out: {args.out} is a file; expected a folder")
    if args.out.is_dir() and any(args.out.iterdir()) and not args.force:
        raise PromptError(
            f"--out: {args.out} is not empty; choose another folder, or --force to write into it"
        )
    encoders = {name: source for name in ("dino", "sam") if (source := getattr(args, name))}
    if stray := [name for name in encoders if name not in args.branches]:
        raise PromptError(f"--{stray[0]} is given, but {stray[0]} is not among --branches")
    _quieten(args)
    from vpt.building import branches_named, build_from_base

    model, processor = build_from_base(
        args.base,
        args.branches,
        encoders=encoders,
        grid_size=args.grid_size,
        dtype=args.dtype,
        seed=args.seed,
    )
    _write(model.save_pretrained, args.out)
    _write(processor.save_pretrained, args.out)
    special, ordinary = perception_tokens(branches_named(args.branches), args.grid_size)
    num_all = sum(parameter.numel() for parameter in model.parameters())
    num_new = sum(parameter.numel() for parameter in model.projectors.parameters())
    print(f"made {args.out} of {args.base}")
    print(f"  branches    {', '.join(['region', *args.branches])}")
    print(f"  parameters  {num_all:,}, of which {num_new:,} in untrained projectors")
    print(f"  tokens      {len(special) + len(ordinary)} for perception, untrained")
    print(f'ask it:  vpt ask --model {shlex.quote(str(args.out))} photo.jpg "What is this?"')


def _judge(exc: Exception) -> tuple[int, str]:
    """Exit code of an error, and advice to add to its message."""
    from branches import BranchError

    if _is_out_of_memory(exc):
        advice = (
            "out of memory: try --dtype bfloat16, smaller images, fewer --max-new-tokens "
            "or --device cpu"
        )
        return EXIT_MEMORY, f" ({advice})" if str(exc) else advice
    if isinstance(exc, ImageError):
        return EXIT_IMAGE, ""
    if isinstance(exc, (PromptError, BudgetError)):
        return EXIT_USAGE, ""
    if isinstance(exc, (CheckpointError, BranchError)):
        return EXIT_MODEL, ""
    return EXIT_BUG, ""


def _is_out_of_memory(exc: Exception) -> bool:
    """Whether memory ran out, on a GPU or on the CPU, where torch has no class for it."""
    if isinstance(exc, MemoryError) or type(exc).__name__ == "OutOfMemoryError":
        return True
    return isinstance(exc, RuntimeError) and "DefaultCPUAllocator: can't allocate" in str(exc)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _say(text: str, *, name: str = "vpt: ", before: str = "") -> None:
    """Write lines for the person, on stderr."""
    from vpt.picture import printable

    print(f"{before}{name}{printable(text)}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
