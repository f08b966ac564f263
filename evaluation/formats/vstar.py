"""V*Bench: multiple choice in JSON lines, and beside each image a file that says where to look.

Layout of https://huggingface.co/datasets/craigwu/vstar_bench: ``test_questions.jsonl`` with
``text`` (question, options ``(A) ...``, instruction), ``image``, ``label``, ``category`` and
``question_id``; ``direct_attributes/sa_1.jpg`` with ``direct_attributes/sa_1.json``, which holds
``target_object`` and ``bbox`` (XYWH), see https://github.com/penghao-wu/vstar.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from vpt.boxes import Box
from vpt.data.row_files import read_entries
from vpt.errors import DataError
from vpt.evaluation.formats.boxes import box_around, read_box
from vpt.evaluation.formats.choices import offer, split_options
from vpt.evaluation.formats.image_roots import ImageRoots
from vpt.evaluation.formats.rows import name_of, read_rows, text_of
from vpt.evaluation.samples import BadRow, ImageRef, Sample


def read(file: Path, images: ImageRoots) -> Iterator[Sample | BadRow]:
    """Read questions of V*Bench.

    The id is ``category/question_id``, for ids begin anew in each category. A sample's ``box`` is
    around all targets; its ``facts`` are ``asked``, the text as it stands in the file, and if the
    file beside the image is there ``targets``, ``boxes`` (XYXY), or ``problem`` if it is broken.

    Args:
        file: ``test_questions.jsonl``.
        images: where they are; relative paths are in the folder of the file.

    Raises:
        DataError: if the file cannot be read.
    """
    find = partial(images.find, folder=file.parent)
    return read_rows(read_entries(file), lambda row, name: _read_row(row, name, find), _name)


def _name(row: Mapping[str, Any]) -> str:
    category, number = name_of(row, "category"), name_of(row, "question_id")
    return f"{category}/{number}" if category and number else number


def _read_row(row: Mapping[str, Any], name: str, find: Callable[[str], str]) -> Sample:
    text = text_of(row, "text")
    question, choices = split_options(text)
    if not question or not choices:
        raise DataError("expected 'text' to be a question with options (A), (B), ... below it")
    path = find(text_of(row, "image"))
    box, facts = _evidence(Path(path).with_suffix(".json"))
    sample = Sample(
        id=name,
        images=(ImageRef(path, path),),
        question=question,
        answers=(text_of(row, "label"),),
        box=box,
        group=name_of(row, "category"),
        facts={"asked": text, **facts},
    )
    return offer(sample, choices)


def _evidence(file: Path) -> tuple[Box | None, dict[str, Any]]:
    """Where the targets are, by the file beside the image; nothing if there is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
        boxes = tuple(read_box(box, is_xywh=True) for box in content["bbox"])
        targets = tuple(content["target_object"])
        return box_around(boxes), {"targets": targets, "boxes": boxes}
    except FileNotFoundError:
        return None, {}
    except (OSError, ValueError, TypeError, KeyError) as exc:
        return None, {"problem": f"{file.name} does not say where to look: {exc}"}
