"""``vpt chat``: questions one after the other, each of which continues the stream of the last."""

from __future__ import annotations

import argparse
import contextlib
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vpt.cli.ask import (
    Screen,
    add_question_arguments,
    check_picture_name,
    check_text,
    kind_of,
    load_image_word,
    note,
    options_of,
    write_outputs,
)
from vpt.cli.model import check_model_arguments, load_runtime, print_loading
from vpt.cli.output import check_targets, print_err, write_file
from vpt.cli.parser import EXIT_FAULTS, Command, path_or_other
from vpt.errors import BudgetError, PromptError, VPTError
from vpt.inference.request import OPTIONS, Request
from vpt.view.wording import count_text

if TYPE_CHECKING:
    from vpt.images import LoadedImage
    from vpt.runtime import Runtime

PROMPT = "> "


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "images",
        nargs="*",
        type=path_or_other,
        metavar="IMAGE",
        help="files or URLs, shown with the first question",
    )
    add_question_arguments(parser)


def _run(args: argparse.Namespace) -> int | None:
    options = options_of(args)
    Request.of([], "?", {**options, "perception": "auto"})  # refuses impossible values
    check_model_arguments(args)
    print_loading(args)
    images = [_load(path, args) for path in args.images]
    return _Session(load_runtime(args), images, args).run()


def _load(path: str, args: argparse.Namespace) -> LoadedImage:
    if path == "-":
        raise PromptError("- is stdin, where the questions come from; name a file or URL")
    return load_image_word(path, args)


class _Session:
    """A chat at a terminal, or with lines of a pipe."""

    def __init__(
        self, runtime: Runtime, images: list[LoadedImage], args: argparse.Namespace
    ) -> None:
        self._runtime, self._first, self._args = runtime, images, args
        self._is_terminal = sys.stdin.isatty()
        self._chat = runtime.chat(images, **options_of(args))
        self._new: list[LoadedImage] = []  # for the next question
        self._look_at: str | int = args.look_at
        self._is_over = False

    def run(self) -> int | None:
        """Read lines to the end; the exit code."""
        num_failed = 0
        self._prepare()
        while not self._is_over:
            try:
                line = self._read()
                if line:
                    self._obey(line)
            except EOFError:
                if self._is_terminal:
                    print_err("", name="")
                break
            except KeyboardInterrupt:
                if not self._is_terminal:
                    raise
                print_err("Ctrl-D ends the chat", before="\n", is_dim=True)
            except VPTError as exc:
                num_failed += 1
                is_long = isinstance(exc, BudgetError) and self._chat.messages
                advice = "; or /reset begins a new chat" if is_long else ""
                print_err(f"error: {' '.join(str(exc).split())}{advice}")
        if num_failed and not self._is_terminal:
            print_err(f"error: {count_text(num_failed, 'line')} failed")
            return EXIT_FAULTS
        return None

    def _prepare(self) -> None:
        if not self._is_terminal:
            sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]
            return
        with contextlib.suppress(ImportError):  # which some systems lack: then without history
            import readline

            readline.set_completer_delims(" \t\n")
            readline.parse_and_bind("tab: complete")  # names of files
        names = ", ".join(Path(image.source).name for image in self._first) or "no image yet"
        print_err(f"{names}; /help lists the commands, Ctrl-D ends", is_dim=True)

    def _read(self) -> str:
        """The next line, stripped; ``EOFError`` at the end."""
        if self._is_terminal:
            is_shown = sys.stdout.isatty()
            if not is_shown:
                sys.stderr.write(PROMPT)
                sys.stderr.flush()
            return input(PROMPT if is_shown else "").strip()
        if not (line := sys.stdin.readline()):
            raise EOFError
        return line.strip()

    def _obey(self, line: str) -> None:
        path = _path_of(line)
        if kind_of(path) == "file":
            self._add_image(path)
        elif not line.startswith("/"):
            self._ask(line)
        else:
            name, _, words = line.partition(" ")
            if name not in _COMMANDS:
                raise PromptError(f"{name} is no command and no file; /help lists the commands")
            _COMMANDS[name][0](self, words.strip())

    def _ask(self, question: str) -> None:
        check_text(question)
        before = len(self._chat.messages)
        screen = self._screen()
        try:
            events = self._chat.stream(question, self._new, look_at=self._look_at)
            with contextlib.closing(events):  # type: ignore[type-var]
                for event in events:
                    screen.show(event)
        except KeyboardInterrupt:
            screen.end_turn()
            if not self._is_terminal:
                raise
            if len(self._chat.messages) == before:
                print_err("note: stopped; the chat continues as if this had not been asked")
                return
        self._new = []
        trace = self._chat.answers[-1].trace
        if not trace.answer:
            print_err("note: the answer is empty")
        note(trace, self._runtime, self._args.verbose)

    def _screen(self) -> Screen:
        answers = self._chat.answers
        known: list[Any] = [*answers[-1].trace.images] if answers else self._first
        boxes = [getattr(one, "box_xyxy_px", None) for one in known]
        return Screen([one.source for one in (*known, *self._new)], True, boxes)

    def _add_image(self, path: str) -> None:
        if not path:
            print_err(f"note: took back {count_text(len(self._new), 'image')}")
            self._new = []
            return
        image = _load(path, self._args)
        self._new.append(image)
        index = self._chat.num_images + len(self._new) - 1
        name, (width, height) = Path(image.source).name, image.size_wh
        print_err(f"[image {index}: {name} {width}x{height}]", name="", is_dim=True)

    def _look(self, words: str) -> None:
        is_index = re.fullmatch(r"[0-9]{1,9}", words) is not None
        number = self._chat.num_images + len(self._new)
        if is_index and int(words) >= number:
            raise PromptError(f"there is no image {words}: the chat has {number}, counted from 0")
        self._look_at = OPTIONS["look_at"].check("/look", int(words) if is_index else words)

    def _draw(self, words: str) -> None:
        picture = self._file("/picture", words)
        check_picture_name(picture)
        given = [image for message in self._chat.messages for image in message.images]
        write_outputs(self._chat.answers[-1].trace, given, picture, None)

    def _save(self, words: str) -> None:
        file = self._file("/save", words)
        write_file(self._chat.save, file)
        print_err(f"saved {file}")

    def _file(self, command: str, words: str) -> Path:
        """The file that a command names, to write an answer to."""
        if not words:
            raise PromptError(f"{command} needs the name of a file")
        if not self._chat.answers:
            raise PromptError(f"{command}: there is no answer yet; ask a question first")
        sources = [image.source for image in self._chat.answers[-1].trace.images]
        check_targets({command: (file := Path(_path_of(words)))}, sources)
        return file

    def _reset(self, words: str) -> None:
        self._chat.reset()
        self._new, self._look_at = [], self._args.look_at
        print_err(f"note: a new chat, with {count_text(len(self._first), 'image')}")

    def _help(self, words: str) -> None:
        lines = [f"  {f'{name} {of}':24} {text}" for name, (_, of, text) in _COMMANDS.items()]
        print_err("A line is a question, or the path of a further image.", name="")
        print_err("\n".join([*lines, "  Ctrl-C stops an answer; Ctrl-D ends the chat."]), name="")

    def _quit(self, words: str) -> None:
        self._is_over = True


_COMMANDS: dict[str, tuple[Callable[[_Session, str], None], str, str]] = {
    "/image": (
        lambda session, words: session._add_image(_path_of(words)),
        "PATH",
        "show an image with the next question; without PATH, take such images back",
    ),
    "/look": (_Session._look, "first|latest|N", "image that calls concern; N counts from 0"),
    "/picture": (_Session._draw, "FILE", "draw the last answer"),
    "/save": (_Session._save, "FILE", "save the traces of all answers as JSON"),
    "/reset": (_Session._reset, "", "begin again with the images of the command line"),
    "/help": (_Session._help, "", "show this list"),
    "/quit": (_Session._quit, "", "end the chat"),
}


def _path_of(words: str) -> str:
    """A path as typed, or as a terminal pastes it: in quotes, or with backslashes."""
    path = words
    if words.startswith("~"):
        with contextlib.suppress(RuntimeError):  # no such user
            path = str(Path(words).expanduser())
    if kind_of(path) is None:
        with contextlib.suppress(ValueError):  # a question with an apostrophe
            parts = shlex.split(path)
            if len(parts) == 1 and kind_of(parts[0]):
                return parts[0]
    return path


COMMAND = Command(
    help="ask questions one after the other",
    usage="vpt chat [options] [--] [IMAGE ...]",
    description=(
        "Ask questions that continue one conversation: a question is read together with all\n"
        "that was seen and said before, at the cost of what is new. Answers are written to stdout\n"
        "token by token. From a pipe or file, each line is a question."
    ),
    examples=(
        "examples:\n"
        "  vpt chat examples/tags.jpg\n"
        "  vpt chat --model ./my-model --device cuda photo.jpg\n"
        "  vpt chat examples/tags.jpg < questions.txt > answers.txt"
    ),
    add_arguments=_add_arguments,
    run=_run,
    verbose="show a summary of each answer, library messages and tracebacks",
)
