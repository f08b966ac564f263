"""Long work in parts: each is kept when it is done, so that a stopped command can go on."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vpt.data.dataset_info import dataset_entry, write_dataset_info
from vpt.files import write_whole

INFO = "dataset_info.json"

_PARTS = ".parts"
_PART_SIZE = 100


@dataclass
class Part:
    """What a part of the work gives.

    Attributes:
        lines: name of a file of rows -> rows.
        counts: of what happened, for the report at the end.
        problems: sources that gave nothing: which, and why.
    """

    lines: dict[str, list[Any]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    problems: list[tuple[str, str]] = field(default_factory=list)


def work_in_parts(
    folder: Path, sources: Sequence[Any], make: Callable[[int, Any, Part], None]
) -> Iterator[int]:
    """Make something of every source; parts that an earlier run has made are left alone.

    Args:
        folder: in which parts are kept until :func:`join_parts`.
        sources: one after the other.
        make: takes number and source, and adds to the part.

    Yields:
        How many more sources are done.

    Raises:
        OSError: if a part cannot be written.
    """
    (folder / _PARTS).mkdir(parents=True, exist_ok=True)
    for first in range(0, len(sources), _PART_SIZE):
        here = range(first, min(first + _PART_SIZE, len(sources)))
        file = _part_file(folder, first)
        if file.exists():
            yield len(here)
            continue
        part = Part()
        for number in here:
            make(number, sources[number], part)
            yield 1
        write_whole(json.dumps(vars(part), ensure_ascii=False), file)


def join_parts(folder: Path, num_sources: int, names: Iterable[str]) -> Part:
    """Write the files of rows out of all parts, and take the parts away.

    Args:
        folder: as for :func:`work_in_parts`.
        num_sources: of all parts.
        names: of the files, without ``.jsonl``; a file without rows is not written.

    Returns:
        All parts as one.

    Raises:
        OSError: if a file cannot be written.
    """
    files = [_part_file(folder, first) for first in range(0, num_sources, _PART_SIZE)]
    whole = Part({name: [] for name in names})
    for file in files:
        part = json.loads(file.read_text(encoding="utf-8"))
        for name, rows in part["lines"].items():
            whole.lines[name] += rows
        whole.counts.update(part["counts"])
        whole.problems += [(which, why) for which, why in part["problems"]]
    for name, rows in whole.lines.items():
        if rows:
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
            write_whole("".join(lines), folder / f"{name}.jsonl")
    for file in files:
        file.unlink()
    (folder / _PARTS).rmdir()
    return whole


def write_index(folder: Path, names: Iterable[str]) -> None:
    """Write the ``dataset_info.json`` by which training configs name the files of rows.

    Raises:
        OSError: if it cannot be written.
    """
    info = {name: dataset_entry(f"{name}.jsonl") for name in names}
    write_dataset_info(info, folder / INFO)


def _part_file(folder: Path, first: int) -> Path:
    return folder / _PARTS / f"{first:08d}.json"
