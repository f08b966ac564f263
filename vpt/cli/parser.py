"""The command line as argparse parses it: commands, exit codes, and the kinds of values."""

from __future__ import annotations

import argparse
import difflib
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vpt import __version__
from vpt.cli.output import print_out
from vpt.errors import CheckpointError
from vpt.protocol.tokens import BRANCH_TOKENS, branches_named

EXIT_FINE, EXIT_BUG, EXIT_USAGE, EXIT_IMAGE, EXIT_MODEL, EXIT_MEMORY, EXIT_SERVICE = range(7)
EXIT_INTERRUPTED = 130
EXIT_PIPE = 141
EXIT_FAULTS = 1
"""A command did what it was asked to, and found that something is wrong with the data."""

EXIT_CODES = """\
exit codes:
  0    success
  1    vpt ask: some images of a folder failed; vpt chat: some lines of a pipe or file failed;
       vpt data: something is wrong with the data; vpt eval: no sample was answered;
       else a bug, shown with a traceback
  2    wrong usage
  3    an input image cannot be used
  4    the model cannot be loaded or built, or its numbers are not finite
  5    out of memory
  6    a service, such as a judge, is down or refuses the request
  130  interrupted with Ctrl-C
  141  the reader of stdout has ended
"""


@dataclass(frozen=True)
class Command:
    """One command of ``vpt``, or a program that is one command by itself.

    Attributes:
        help: one line in the list of commands.
        run: does the work and returns the exit code, ``None`` for fine; errors it raises become
            messages and exit codes.
        usage: where argparse's own would be hard to read.
        verbose: help of ``--verbose``, which every command has.
    """

    help: str
    description: str
    examples: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int | None]
    usage: str | None = None
    verbose: str = "show library messages and tracebacks"


@dataclass(frozen=True)
class CommandGroup:
    """Commands under a common word, such as ``vpt data check``, by their names.

    ``models`` is what ``--list-models`` prints.
    """

    help: str
    description: str
    commands: Mapping[str, Command | CommandGroup]
    examples: str = ""
    models: str = ""


def build_parser(program: Command | CommandGroup, prog: str = "vpt") -> argparse.ArgumentParser:
    """Build the parser of a program; it sets ``run`` to that of the command, and ``verbose``."""
    parser = _Parser(prog=prog)
    if isinstance(program, CommandGroup):
        parser.add_argument("--version", action="version", version=f"vpt {__version__}")
        about = 'script that completes options: eval "$(vpt --print-completion bash)" in ~/.bashrc'
        parser.add_argument(
            "--print-completion",
            action=_PrintCompletion,
            choices=("bash", "zsh", "fish"),
            help=about,
        )
        if program.models:
            about = "show the available models, each with the command that runs it, and exit"
            parser.add_argument(
                "--list-models", action="version", version=program.models, help=about
            )
    _fill(parser, program)
    return parser


def _fill(parser: argparse.ArgumentParser, program: Command | CommandGroup) -> None:
    parser.description = program.description
    parser.epilog = "\n\n".join(filter(None, (program.examples, EXIT_CODES)))
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    if isinstance(program, Command):
        parser.usage = program.usage
        parser.set_defaults(run=program.run)
        program.add_arguments(parser)
        parser.add_argument("--verbose", action="store_true", help=program.verbose)
        return
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", required=True, parser_class=_Parser
    )
    for name, command in program.commands.items():
        _fill(commands.add_parser(name, help=command.help), command)


class _PrintCompletion(argparse.Action):
    """Print a completion script of the whole program, and exit."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: Any = None
    ) -> None:
        import shtab

        parsers = [parser]
        for one in parsers:
            for action in one._actions:
                if isinstance(action, argparse._SubParsersAction):
                    parsers += action.choices.values()
                elif action.type in (Path, path_or_other):
                    action.complete = shtab.FILE  # type: ignore[attr-defined]
        print_out(shtab.complete(parser, shell=values))
        parser.exit()


class _Word(str):
    """An argument after ``--``, which is no option whatever it begins with."""


def _mark_words(args: Sequence[str]) -> list[str]:
    """Arguments without the first ``--``, those after it marked."""
    if "--" not in args or any(isinstance(arg, _Word) for arg in args):
        return list(args)
    end = args.index("--")
    return [*args[:end], *map(_Word, args[end + 1 :])]


class _Parser(argparse.ArgumentParser):
    """Allows options between the images and the question, which argparse by itself does not.

    ``--`` ends the options of a command: argparse by itself loses it on the way to the command.
    Unknown arguments are an error of the command, whose usage is shown; argparse shows the usage of
    the whole program.
    """

    _is_inner = False

    def add_subparsers(self, **kwargs: Any) -> Any:
        self._is_inner = True  # a group has only commands; intermixing is for these
        return super().add_subparsers(**kwargs)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        args = _mark_words(sys.argv[1:] if args is None else args)
        if self._is_inner:
            leading = itertools.takewhile(lambda arg: arg.startswith("-"), args)
            self._refuse_unknown_options(leading)
            return super().parse_known_args(args, namespace)
        self._refuse_unknown_options(args)
        self._is_inner = True
        try:
            namespace, unknown = self.parse_known_intermixed_args(args, namespace)
        finally:
            self._is_inner = False
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return namespace, unknown

    def _refuse_unknown_options(self, args: Iterable[str]) -> None:
        """Report an unknown option ahead of anything that is missing."""
        known = [name for name in self._option_string_actions if name.startswith("--")]
        for arg in args:
            name = arg.partition("=")[0]
            is_option = name.startswith("--") and " " not in name and not isinstance(arg, _Word)
            if is_option and not any(one.startswith(name) for one in known):
                close = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
                hint = f"; did you mean {close[0]}?" if close else ""
                self.error(f"unrecognized arguments: {arg}{hint}")

    def _parse_optional(self, arg_string: str) -> Any:
        return None if isinstance(arg_string, _Word) else super()._parse_optional(arg_string)


def add_path(
    group: argparse._ActionsContainer, name: str, metavar: str, help: str, **more: Any
) -> None:
    """Add an argument that is a path."""
    group.add_argument(name, type=Path, metavar=metavar, help=help, **more)


def add_flag(group: argparse._ActionsContainer, name: str, help: str) -> None:
    """Add an option without a value."""
    group.add_argument(name, action="store_true", help=help)


def add_value(
    group: argparse._ActionsContainer,
    name: str,
    metavar: str,
    kind: Callable[[str], Any],
    help: str,
    default: Any = None,
) -> None:
    """Add an option with a value; the help states its default, if there is one."""
    if isinstance(default, (int, float)):
        help = f"{help} (default: {default:g})"
    group.add_argument(name, type=kind, metavar=metavar, default=default, help=help)


def path_or_other(text: str) -> str:
    """Type of argument: text that may be a path; shells complete it as one."""
    return text


def whole_number(least: int) -> Callable[[str], int]:
    """Type of argument: a whole number of at least ``least``."""

    def parse(text: str) -> int:
        if not text.isascii() or not text.strip().lstrip("-").isdigit():
            raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}")
        if not least <= int(text) < 2**63:
            raise argparse.ArgumentTypeError(f"expected at least {least}, got {text}")
        return int(text)

    return parse


def number(least: float, most: float = math.inf) -> Callable[[str], float]:
    """Type of argument: a finite number within bounds."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None
        if not (math.isfinite(value) and least <= value <= most):
            bounds = f"from {least} to {most}" if math.isfinite(most) else f"of at least {least}"
            raise argparse.ArgumentTypeError(f"expected a number {bounds}, got {text}")
        return value

    return parse


def branch_names(text: str) -> tuple[str, ...]:
    """Type of argument: names of re-encoding branches, with commas between them."""
    try:
        branches = [branches_named([name])[0] for name in comma_list(text)]
    except CheckpointError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from exc
    return tuple(BRANCH_TOKENS[branch].encoder for branch in branches)


def comma_list(text: str) -> tuple[str, ...]:
    """Type of argument: values separated by commas; empty ones are dropped."""
    return tuple(word.strip() for word in text.split(",") if word.strip())
