"""The ``vpt`` command: what a person typed goes in, an exit code comes out.

What the model says goes to stdout, all else to stderr. Heavy imports wait until the arguments are
known to be good, so that ``vpt --help`` and wrong usage answer at once.

A further command is one file with a :class:`vpt.cli.parser.Command`, and one row in `COMMANDS`;
a group of commands is a file with a table of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence

from vpt.cli import ask, data, demo, depth_tokenizer, init
from vpt.cli import eval as evaluating
from vpt.cli import set as setting
from vpt.cli.parser import Command, CommandGroup, build_command_parser, build_parser
from vpt.cli.terminal import print_err
from vpt.errors import (
    BudgetError,
    CheckpointError,
    DataError,
    ImageError,
    NonFiniteError,
    PromptError,
    RunError,
    ServiceError,
    is_out_of_memory,
)

COMMANDS: Mapping[str, Command | CommandGroup] = {
    "ask": ask.COMMAND,
    "demo": demo.COMMAND,
    "init": init.COMMAND,
    "set": setting.COMMAND,
    "data": data.COMMANDS,
    "depth-tokenizer": depth_tokenizer.COMMANDS,
    "compare": evaluating.COMPARE,
    "eval": evaluating.RUN,
}

EXIT_FINE, EXIT_BUG, EXIT_USAGE, EXIT_IMAGE, EXIT_MODEL, EXIT_MEMORY, EXIT_SERVICE = range(7)
EXIT_INTERRUPTED = 130
EXIT_PIPE = 141

EXIT_CODES = """\
exit codes:
  0    fine
  1    vpt data: something is wrong with the data; vpt eval: no sample was answered; else a bug,
       shown with a traceback
  2    wrong usage
  3    an input image cannot be used
  4    the model cannot be loaded or built, or its numbers are not finite
  5    out of memory
  6    a service that was asked, as a judge, is down or refuses
  130  interrupted with Ctrl-C
  141  the reader of stdout went away
"""
EXAMPLE = 'example:\n  vpt ask photo.jpg "What does the sign say?"'
MEMORY_ADVICE = (
    "out of memory: try --dtype bfloat16, smaller images, fewer --max-new-tokens or --device cpu"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code.

    Args:
        argv: arguments without the program's name; those of the process by default.
    """
    return run(build_parser(COMMANDS, EXAMPLE, EXIT_CODES), argv)


def run_alone(command: Command, prog: str, argv: Sequence[str] | None = None) -> int:
    """Run a program that is one command by itself; returns its exit code.

    Args:
        command: what it does.
        prog: how it is called.
        argv: arguments without the program's name; those of the process by default.
    """
    return run(build_command_parser(command, prog, EXIT_CODES), argv)


def run(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> int:
    """Do what arguments ask for; returns the exit code.

    Args:
        parser: sets ``run`` and ``verbose``, as that of a :class:`vpt.cli.parser.Command` does.
        argv: arguments without the program's name; those of the process by default.
    """
    try:
        args = parser.parse_args(argv)
    except SystemExit as exc:  # argparse has said what there is to say
        return exc.code if isinstance(exc.code, int) else EXIT_USAGE
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # characters the terminal lacks must not end the run
            stream.reconfigure(errors="backslashreplace")
    try:
        with contextlib.nullcontext() if args.verbose else _quiet():
            code = args.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print_err("interrupted", before="\n")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Python flushes stdout once more when it ends, and would complain then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE
    except Exception as exc:
        return _tell(exc, args.verbose)
    return EXIT_FINE if code is None else code


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the warnings of libraries off stderr, where they would bury what is said to people."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _tell(exc: Exception, verbose: bool) -> int:
    """Say what went wrong; returns the exit code that stands for it."""
    code = _exit_code(exc)
    if code == EXIT_BUG or verbose:
        print_err(traceback.format_exc().rstrip(), name="")
    if code == EXIT_BUG:
        print_err("this is a bug; please report it with the lines above")
        return code
    message = " ".join(str(exc).split())
    if code == EXIT_MEMORY:
        message = f"{message} ({MEMORY_ADVICE})" if message else MEMORY_ADVICE
    print_err(f"error: {message}")
    return code


def _exit_code(exc: Exception) -> int:
    from vpt.branches import BranchError

    if is_out_of_memory(exc):
        return EXIT_MEMORY
    if isinstance(exc, RunError) and isinstance(exc.__cause__, Exception):
        return _exit_code(exc.__cause__)
    if isinstance(exc, ImageError):
        return EXIT_IMAGE
    if isinstance(exc, (PromptError, DataError, BudgetError)):
        return EXIT_USAGE
    if isinstance(exc, (CheckpointError, NonFiniteError, BranchError)):
        return EXIT_MODEL
    if isinstance(exc, ServiceError):
        return EXIT_SERVICE
    return EXIT_BUG
