"""The command line as argparse sees it: commands and the kinds of values they take."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vpt import __version__
from vpt.errors import CheckpointError
from vpt.protocol.tokens import branches_named

EXIT_FAULTS = 1
"""A command did what it was asked to, and found that something is wrong with the data."""


@dataclass(frozen=True)
class Command:
    """One command of ``vpt``.

    Attributes:
        help: one line in the list of commands.
        description: what it does, in lines as they shall be shown.
        examples: to be shown below the options.
        add_arguments: adds its own to a parser; among them ``--verbose``, which shows tracebacks.
        run: does it and returns the exit code, ``None`` for fine; errors it raises become
            messages and exit codes.
        usage: where argparse's own would be hard to read.
    """

    help: str
    description: str
    examples: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int | None]
    usage: str | None = None


@dataclass(frozen=True)
class CommandGroup:
    """Commands under a common word, as ``vpt data check``.

    Attributes:
        help: one line in the list of commands.
        description: what they have in common.
        commands: by name, in the order of the help.
    """

    help: str
    description: str
    commands: Mapping[str, Command]


def build_parser(
    commands: Mapping[str, Command | CommandGroup],
    example: str,
    exit_codes: str,
    prog: str = "vpt",
    description: str = "Run multimodal LLMs that decide by themselves to look again.",
) -> argparse.ArgumentParser:
    """Make the parser of the whole command line; it sets ``run`` to that of the command.

    Args:
        commands: by name, in the order of the help.
        example: of the whole.
        exit_codes: shown at the end of every help.
        prog: how the program is called.
        description: what it is for.
    """
    parser = _Parser(
        prog=prog,
        description=description,
        epilog=f"{example}\n\n{exit_codes}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"vpt {__version__}")
    _add_commands(parser, commands, exit_codes)
    return parser


def build_command_parser(command: Command, prog: str, exit_codes: str) -> argparse.ArgumentParser:
    """Make the parser of a program that is one command by itself.

    Args:
        command: what it does.
        prog: how it is called.
        exit_codes: shown at the end of the help.
    """
    parser = _Parser(
        prog=prog,
        description=command.description,
        epilog=f"{command.examples}\n\n{exit_codes}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=command.usage,
    )
    parser.set_defaults(run=command.run)
    command.add_arguments(parser)
    return parser


def _add_commands(
    parser: argparse.ArgumentParser,
    commands: Mapping[str, Command | CommandGroup],
    exit_codes: str,
) -> None:
    rows = parser.add_subparsers(
        title="commands", metavar="COMMAND", required=True, parser_class=_Parser
    )
    for name, command in commands.items():
        shown_below = "" if isinstance(command, CommandGroup) else f"{command.examples}\n\n"
        one = rows.add_parser(
            name,
            help=command.help,
            description=command.description,
            epilog=f"{shown_below}{exit_codes}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if isinstance(command, CommandGroup):
            _add_commands(one, command.commands, exit_codes)
        else:
            one.usage = command.usage
            one.set_defaults(run=command.run)
            command.add_arguments(one)


class _Word(str):
    """An argument after ``--``, which is no option whatever it begins with."""


def _words_marked(args: Sequence[str]) -> list[str]:
    """Arguments without the first ``--``, those after it marked."""
    if "--" not in args or any(isinstance(one, _Word) for one in args):
        return list(args)
    end = args.index("--")
    return [*args[:end], *map(_Word, args[end + 1 :])]


class _Parser(argparse.ArgumentParser):
    """Lets options stand between the images and the question, as argparse by itself does not.

    ``--`` ends the options of a command: argparse by itself loses it on the way to the command.
    """

    _is_inner = False

    def add_subparsers(self, **kwargs: Any) -> Any:
        self._is_inner = True  # a group has only commands; intermixing is for these
        return super().add_subparsers(**kwargs)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        args = _words_marked(sys.argv[1:] if args is None else args)
        if self._is_inner:
            return super().parse_known_args(args, namespace)
        self._is_inner = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._is_inner = False

    def _parse_optional(self, arg_string: str) -> Any:
        return None if isinstance(arg_string, _Word) else super()._parse_optional(arg_string)


def whole_number(least: int) -> Callable[[str], int]:
    """A type of argument: a whole number of at least ``least``."""

    def parse(text: str) -> int:
        if not text.isascii() or not text.strip().lstrip("-").isdigit():
            raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}")
        if not least <= int(text) < 2**63:
            raise argparse.ArgumentTypeError(f"expected at least {least}, got {text}")
        return int(text)

    return parse


def number(least: float, most: float = math.inf) -> Callable[[str], float]:
    """A type of argument: a finite number within bounds."""

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
    """A type of argument: names of re-encoding branches, with commas between them."""
    names = words(text)
    try:
        branches_named(names)
    except CheckpointError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from exc
    return names


def words(text: str) -> tuple[str, ...]:
    """A type of argument: words with commas between them; empty ones do not count."""
    return tuple(word.strip() for word in text.split(",") if word.strip())
