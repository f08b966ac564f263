"""Files that a command is to write: refused before the work where they cannot be."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from vpt.errors import PromptError


def check_targets(targets: Mapping[str, Path | None], inputs: Sequence[str]) -> None:
    """Find out now what would prevent writing, so that no work is lost.

    Args:
        targets: option -> file, or ``None`` where the option is not given.
        inputs: images, which must not be overwritten.

    Raises:
        PromptError: naming the option and what is wrong.
    """
    images = {Path(path).resolve() for path in inputs}
    taken: dict[Path, str] = {}
    for option, target in targets.items():
        if target is None:
            continue
        if not target.parent.is_dir():
            raise PromptError(f"{option}: there is no folder {target.parent}; make it first")
        if target.is_dir():
            raise PromptError(f"{option}: {target} is a folder; expected a file name")
        if target.resolve() in images:
            raise PromptError(f"{option}: {target} is an input image and would be overwritten")
        if not os.access(target if target.exists() else target.parent, os.W_OK):
            raise PromptError(f"{option}: no permission to write {target}")
        if (other := taken.setdefault(target.resolve(), option)) != option:
            raise PromptError(f"{other} and {option} name the same file {target}")


def write_file(save: Callable[[Path], object], target: Path) -> None:
    """Save something to a file or folder.

    Raises:
        PromptError: if it cannot be written.
    """
    try:
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
    for folder in (out, *out.parents):
        if folder.exists() and not folder.is_dir():
            raise PromptError(f"--out: {folder} is a file; expected a folder")
