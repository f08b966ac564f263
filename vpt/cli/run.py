"""The ``vpt`` command: arguments that a person typed go in, an exit code comes out.

The text of the model goes to stdout, all else to stderr. Heavy imports wait until the arguments are
known to be good, so that ``vpt --help`` and wrong usage answer at once.

A further command is one file with a :class:`vpt.cli.parser.Command`, and one row in `COMMANDS`;
a group of commands is a file with a table of its own.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence

from vpt import errors
from vpt.cli import ask, chat, data, demo, depth_tokenizer, init, parser, serve, train_policy
from vpt.cli import eval as evaluating
from vpt.cli import set as setting
from vpt.cli.output import print_err
from vpt.cli.parser import Command, CommandGroup, build_parser
from vpt.released import models_text

COMMANDS = CommandGroup(
    help="",
    description="Run multimodal LLMs that decide by themselves to look again.",
    examples=(
        "examples:\n"
        '  vpt ask examples/tags.jpg "What number is on the blue one?" --picture look.jpg\n'
        "  vpt demo\n"
        "  vpt COMMAND --help"
    ),
    models=models_text(),
    commands={
        "ask": ask.COMMAND,
        "chat": chat.COMMAND,
        "demo": demo.COMMAND,
        "serve": serve.COMMAND,
        "init": init.COMMAND,
        "set": setting.COMMAND,
        "data": data.COMMANDS,
        "depth-tokenizer": depth_tokenizer.COMMANDS,
        "train-policy": train_policy.COMMAND,
        "compare": evaluating.COMPARE,
        "eval": evaluating.RUN,
    },
)

MEMORY_ADVICE = (
    "out of memory: try --dtype bfloat16, smaller images, fewer --max-new-tokens or --device cpu"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``vpt`` with the arguments of the process by default; returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:2] == ["eval", "compare"]:  # as in evaluation.py
        del words[0]
    return run(COMMANDS, "vpt", words)


def run(program: Command | CommandGroup, prog: str, argv: Sequence[str] | None = None) -> int:
    """Run a program that is called ``prog``; returns its exit code."""
    try:
        args = build_parser(program, prog).parse_args(argv)
    except SystemExit as exc:  # argparse has written its message
        return exc.code if isinstance(exc.code, int) else parser.EXIT_USAGE
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # characters the terminal lacks must not end the run
            stream.reconfigure(errors="backslashreplace", line_buffering=True)  # as gradio expects
    try:
        with contextlib.nullcontext() if args.verbose else _quiet():
            code: int | None = args.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print_err("interrupted", before="\n")
        return parser.EXIT_INTERRUPTED
    except BrokenPipeError:
        # Python flushes stdout once more when it ends, and would complain then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return parser.EXIT_PIPE
    except Exception as exc:
        return _report(exc, args.verbose)
    return parser.EXIT_FINE if code is None else code


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep warnings of libraries off stderr, where they would hide our own lines."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _report(exc: Exception, verbose: bool) -> int:
    """Write what went wrong; returns the exit code for it."""
    code = _exit_code(exc)
    if code == parser.EXIT_BUG or verbose:
        print_err(traceback.format_exc().rstrip(), name="")
    if code == parser.EXIT_BUG:
        print_err("this is a bug; please report it with the lines above")
        return code
    message = " ".join(str(exc).split())
    if code == parser.EXIT_MEMORY:
        message = f"{message} ({MEMORY_ADVICE})" if message else MEMORY_ADVICE
    print_err(f"error: {message}")
    return code


def _exit_code(exc: Exception) -> int:
    from vpt.branches import BranchError

    if errors.is_out_of_memory(exc):
        return parser.EXIT_MEMORY
    if isinstance(exc, errors.RunError) and isinstance(exc.__cause__, Exception):
        return _exit_code(exc.__cause__)
    codes: dict[int, tuple[type[Exception], ...]] = {
        parser.EXIT_IMAGE: (errors.ImageError,),
        parser.EXIT_USAGE: (errors.PromptError, errors.DataError, errors.BudgetError),
        parser.EXIT_MODEL: (errors.CheckpointError, errors.NonFiniteError, BranchError),
        parser.EXIT_SERVICE: (errors.ServiceError,),
    }
    return next((code for code, kinds in codes.items() if isinstance(exc, kinds)), parser.EXIT_BUG)
