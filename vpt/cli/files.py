"""Files that a command is to write: refused before the work where they cannot be."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from vpt.errors import PromptError


def check_targets(targets: Mapping[str, Path | None], inputs: Sequence[str]) -> None:
    """Find out now what would prevent writing, so that no work is lost.

    Args:
        targets: option -> file, or ``None`` where the option is not given. Folders that do not
            exist are made by :func:`write_file`.
        inputs: images, which must not be overwritten.

    Raises:
        PromptError: naming the option and what is wrong.
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


def write_file(save: Callable[[Path], object], target: Path) -> None:
    """Save something to a file or folder, in a new folder if need be.

    Raises:
        PromptError: if it cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        save(target)
    except OSError as exc:
        raise PromptError(f"cannot write {target}: {exc.strerror or exc}") from exc


def check_out_folder(out: Path) -> None:
    """Find out now whether a folder can be made there.

    Args:
        out: what was given as ``--out``.

    Raises:
        PromptError: if it, or a folder above it, is a file.
    """
    _nearest_folder("--out", out)


def _nearest_folder(option: str, folder: Path) -> Path:
    """The first that exists of a folder and those above it."""
    found = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    if not found.is_dir():
        raise PromptError(f"{option}: {found} is a file; expected a folder")
    return found
