"""Output of commands: lines for the person at the terminal, a progress bar, files."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TextIO, TypeVar

from vpt.errors import PromptError
from vpt.view.wording import count_text, printable

T = TypeVar("T")

_NUM_LISTED = 5

_COLOURS = {"error": "1;31", "warning": "1;33", "note": "33", "label": "35", "dim": "2"}
"""SGR codes of words at the start of a line on stderr, of labels on stdout, of dim lines."""


def print_out(text: str, *, end: str = "\n", label: str = "") -> None:
    """Write results on stdout, at once, without harm to the terminal; a label comes before them."""
    label = _coloured(printable(label), "label", sys.stdout)
    sys.stdout.write(label + printable(text) + end)
    sys.stdout.flush()


def print_err(text: str, *, name: str = "vpt: ", before: str = "", is_dim: bool = False) -> None:
    """Write lines about the run on stderr, at once, without harm to the terminal."""
    word, colon, rest = printable(text).partition(":")
    if is_dim:
        line = _coloured(name + printable(text), "dim", sys.stderr)
    else:
        line = name + _coloured(word, word, sys.stderr) + colon + rest
    sys.stderr.write(f"{before}{line}\n")
    sys.stderr.flush()


def print_status(text: str) -> None:
    """Write on stderr, if that is a terminal, what is being waited for."""
    if sys.stderr.isatty():
        print_err(text, is_dim=True)


def _coloured(text: str, colour: str, stream: TextIO) -> str:
    """Text in one of `_COLOURS`, on a terminal.

    NO_COLOR and FORCE_COLOR have their usual meaning: https://no-color.org, https://force-color.org.
    """
    is_terminal = stream.isatty() and os.environ.get("TERM") != "dumb" and os.name != "nt"
    if not text or colour not in _COLOURS or os.environ.get("NO_COLOR"):
        return text
    if not is_terminal and not os.environ.get("FORCE_COLOR"):
        return text
    return f"\x1b[{_COLOURS[colour]}m{text}\x1b[0m"


def report_left_out(problems: Sequence[tuple[str, str]], noun: str) -> None:
    """Write how many sources, e.g. photos, were left out, and the reasons of the first ones."""
    if not problems:
        return
    print_err(f"{count_text(len(problems), noun)} left out:")
    for which, why in problems[:_NUM_LISTED]:
        print_err(f"  {which}: {why}")


def progress(items: Iterable[T], total: int, what: str) -> Iterable[T]:
    """Pass items through and show on stderr, if that is a terminal, how many have passed.

    Args:
        items: to iterate over.
        total: number of items.
        what: what they are, e.g. ``"images"``.
    """
    from tqdm import tqdm

    bar: Iterable[T] = tqdm(
        items, total=total, desc=what, leave=False, disable=not sys.stderr.isatty()
    )
    return bar


def check_targets(targets: Mapping[str, Path | None], inputs: Sequence[str] = ()) -> None:
    """Check before the work that the files of options can be written, without harm to ``inputs``.

    Folders that do not exist are made by :func:`write_file`.
    """
    images = {Path(path).resolve() for path in inputs}
    taken: dict[Path, str] = {}
    for option, target in targets.items():
        if target is None:
            continue
        folder = _nearest_folder(option, target.parent)
        if target.is_dir():
            raise PromptError(f"{option}: {target} is a folder; expected a file name")
        if target.resolve() in images:
            raise PromptError(f"{option}: {target} is an input image and would be overwritten")
        if not os.access(target if target.exists() else folder, os.W_OK):
            raise PromptError(f"{option}: no permission to write {target}")
        if (other := taken.setdefault(target.resolve(), option)) != option:
            raise PromptError(f"{other} and {option} name the same file {target}")


def check_out_folder(out: Path, option: str = "--out") -> None:
    """Check before the work that the folder given as an option can be made."""
    _nearest_folder(option, out)


def _nearest_folder(option: str, folder: Path) -> Path:
    """The first that exists of a folder and those above it."""
    found = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    if not found.is_dir():
        raise PromptError(f"{option}: {found} is a file; expected a folder")
    return found


def write_file(save: Callable[[Path], object], target: Path) -> None:
    """Save something to a file or folder, in a new folder if need be, or raise ``PromptError``."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        save(target)
    except OSError as exc:
        raise PromptError(f"cannot write {target}: {exc.strerror or exc}") from exc
