"""Folders of generated data: what decides their content, whole pictures, and resumable work."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vpt.data.rows import DATASET_INFO, dataset_entry, write_dataset_info, write_rows
from vpt.errors import DataError, ImageError, PromptError
from vpt.files import write_atomic

if TYPE_CHECKING:
    from PIL import Image

RECIPE = "recipe.json"
QUESTIONS, ANSWERS = "questions", "answers"
"""Names of the files of questions and answers in HardBLINK's layout, beside the files of rows."""

_JPEG = {"quality": 92, "subsampling": 0}
_PARTS = ".parts"
_PART_SIZE = 100  # sources


def keep_recipe(folder: Path, recipe: Mapping[str, Any]) -> None:
    """Write what decides the content of a folder; `PromptError` if it holds another recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / RECIPE
    wanted = json.dumps(recipe, ensure_ascii=False) + "\n"
    if not file.exists():
        write_atomic(wanted, file)
    elif (found := file.read_text(encoding="utf-8")) != wanted:
        raise PromptError(
            f"{folder} holds data made by {found.strip()}, not by {wanted.strip()}; "
            "choose another folder"
        )


def save_picture(picture: Image.Image, file: Path) -> None:
    """Write a picture as JPEG, whole or not at all."""
    draft = file.with_name(f".{file.name}.part")
    picture.save(draft, "JPEG", **_JPEG)
    draft.replace(file)


def path_from(folder: Path, file: Path) -> str:
    """The path of a file relative to a folder, with forward slashes."""
    return Path(os.path.relpath(file.resolve(), folder.resolve())).as_posix()


def digest(content: bytes) -> str:
    """Short hash of what a recipe refers to."""
    return hashlib.sha256(content).hexdigest()[:16]


@dataclass
class RowsMade:
    """Result of a part of the sources, or of all."""

    lines: dict[str, list[Any]] = field(default_factory=dict)  # name of a file -> its entries
    counts: Counter[str] = field(default_factory=Counter)  # for the report at the end
    problems: list[tuple[str, str]] = field(default_factory=list)  # skipped sources, and why


@dataclass(frozen=True)
class RowMaking:
    """Makes files of rows from many sources, in parts, so that a stopped command can resume.

    ``make`` takes number and source, adds to the counts, and returns any number of tuples with one
    entry for each file. It raises `DataError` or `ImageError` if the source cannot be used.
    """

    folder: Path
    recipe: Mapping[str, Any]  # what decides the content
    names: tuple[str, ...]  # of the files of rows; questions and answers come after them
    sources: Sequence[tuple[str, Any]]  # with their names in messages
    make: Callable[[int, Any, Counter[str]], Sequence[tuple[dict[str, Any], ...]]]
    noun: str  # for a source, in messages
    skip_bad: bool  # skip sources that cannot be used, instead of stopping at the first

    def run(self) -> Iterator[int]:
        """Process all sources, except those of finished parts; yields how many more are done.

        Raises:
            DataError: if there are no sources, or one cannot be used and is not to be skipped.
            ImageError: likewise.
            PromptError: if the folder holds other data.
        """
        if not self.sources:
            raise DataError(f"there is no {self.noun} to make rows of")
        keep_recipe(self.folder, self.recipe)
        (self.folder / _PARTS).mkdir(exist_ok=True)
        for file, numbers in self._parts():
            if file.exists():
                yield len(numbers)
                continue
            part = RowsMade()
            for number in numbers:
                self._add(number, part)
                yield 1
            write_atomic(json.dumps(vars(part), ensure_ascii=False), file)

    def finish(self) -> RowsMade:
        """Write the files of rows and ``dataset_info.json``, and remove the parts."""
        whole = RowsMade({name: [] for name in self._all_names})
        files = [file for file, _ in self._parts()]
        for file in files:
            part = json.loads(file.read_text(encoding="utf-8"))
            for name, rows in part["lines"].items():
                whole.lines[name] += rows
            whole.counts.update(part["counts"])
            whole.problems += [(which, why) for which, why in part["problems"]]
        for name, rows in whole.lines.items():
            if rows:
                write_rows(rows, self.folder / f"{name}.jsonl")
        for file in files:
            file.unlink()
        (self.folder / _PARTS).rmdir()
        if not whole.lines[self.names[0]]:
            which, why = whole.problems[0]
            raise DataError(f"no {self.noun} could be used; the first: {which}: {why}")
        info = {name: dataset_entry(f"{name}.jsonl") for name in self.names}
        write_dataset_info(info, self.folder / DATASET_INFO)
        return whole

    @property
    def _all_names(self) -> tuple[str, ...]:
        return (*self.names, QUESTIONS, ANSWERS)

    def _parts(self) -> Iterator[tuple[Path, range]]:
        """File of each part, and the numbers of its sources."""
        for first in range(0, len(self.sources), _PART_SIZE):
            numbers = range(first, min(first + _PART_SIZE, len(self.sources)))
            yield self.folder / _PARTS / f"{first:08d}.json", numbers

    def _add(self, number: int, part: RowsMade) -> None:
        name, source = self.sources[number]
        try:
            made = self.make(number, source, part.counts)
        except (DataError, ImageError) as exc:
            if not self.skip_bad:
                raise type(exc)(f"{name}: {exc} (--skip-bad skips such a {self.noun})") from exc
            part.problems.append((name, str(exc)))
            return
        for entries in made:
            for file_name, entry in zip(self._all_names, entries, strict=True):
                part.lines.setdefault(file_name, []).append(entry)
