"""Aurora's files: questions in one file of JSON lines, answers in another, images in a folder.

Layouts that are understood::

    DIR/questions.jsonl  DIR/answers.jsonl  DIR/images/0.png
    DIR/questions/NAME_questions.jsonl  DIR/answers/NAME_answers.jsonl  DIR/images/NAME/0.png

The second is that of HardBLINK in https://github.com/mahtabbigverdi/Aurora-perception,
`Data/evals/hardblink`, where NAME is written without underscores for the folder of images, and
the questions may be ``NAME_questions_long.jsonl``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vpt.data.row_files import read_entries
from vpt.errors import DataError
from vpt.evaluation.formats.image_roots import ImageRoots
from vpt.evaluation.formats.rows import as_text, cells_of, name_of, read_rows, text_of
from vpt.evaluation.samples import BadRow, ImageRef, Sample

_LETTER = re.compile(r"\(([A-Z])\)")


def read(file: Path, images: ImageRoots) -> Iterator[Sample | BadRow]:
    """Read questions and their answers.

    Questions are ``{"question_id", "image", "text", "category"}``, answers ``{"question_id",
    "text"}``; of an answer ``"(A)"`` the letter is taken. The category becomes the group. An
    answer that no question asks for is a bad row at the end. A question may have ``points``, as
    :func:`vpt.evaluation.scores.map_support.read_points` takes them; they become a fact.

    Args:
        file: of questions, with ``questions`` in its name.
        images: where they are; relative paths are in the folder of images.

    Raises:
        DataError: if a file cannot be read, or that of the answers is not found.
    """
    answers = _read_answers(_answer_file(file))
    folder = _image_folder(file)
    asked: set[str] = set()

    def read_row(row: Mapping[str, Any], name: str) -> Sample:
        asked.add(name)
        path = images.find(text_of(row, "image"), folder)
        return Sample(
            id=name,
            images=(ImageRef(path, path),),
            question=text_of(row, "text"),
            answers=_answers_to(name, answers),
            group=name_of(row, "category"),
            facts={key: row[key] for key in ("points",) if row.get(key) is not None},
        )

    yield from read_rows(read_entries(file), read_row, lambda row: text_of(row, "question_id"))
    for name in answers:
        if name not in asked:
            yield BadRow(f"answer {name}", f"there is an answer, but no question {name}")


def _read_answers(file: Path) -> dict[str, list[str]]:
    """Id of a question -> what was answered.

    Raises:
        DataError: naming the row that makes no sense.
    """
    answers: dict[str, list[str]] = {}
    for number, row in enumerate(read_entries(file)):
        try:
            cells = cells_of(row)
            answer = as_text(cells.get("text"), "text")
            found = _LETTER.fullmatch(answer)
            answers.setdefault(text_of(cells, "question_id"), []).append(
                found[1] if found else answer
            )
        except DataError as exc:
            raise DataError(f"{file}, row {number}: {exc}") from exc
    return answers


def _answers_to(name: str, answers: Mapping[str, list[str]]) -> tuple[str, ...]:
    if name not in answers:
        raise DataError(f"question {name} has no answer")
    if len(found := dict.fromkeys(answers[name])) > 1:
        raise DataError(f"question {name} has {len(found)} answers: {', '.join(found)}; keep one")
    return tuple(found)


def _answer_file(file: Path) -> Path:
    """Where the answers to a file of questions are.

    Raises:
        DataError: if the name of the file does not tell, or there is none.
    """
    if "questions" not in file.name:
        raise DataError(
            f"{file} does not tell where its answers are; expected a name such as "
            "questions.jsonl, beside answers.jsonl"
        )
    names = [file.name.replace("questions", "answers")]
    names += [name.replace("_long", "") for name in names if "_long" in name]
    folders = [file.parent]
    if file.parent.name == "questions":
        folders.append(file.parent.parent / "answers")
    places = [folder / name for folder in folders for name in names]
    for place in places:
        if place.is_file():
            return place
    raise DataError(f"{file} has no answers; expected them in {' or '.join(map(str, places))}")


def _image_folder(file: Path) -> Path:
    """Folder of the images that a file of questions names."""
    if file.parent.name != "questions":
        places = [file.parent / "images", file.parent]
    else:
        name = file.stem.replace("questions", "").replace("long", "").replace("_", "")
        images = file.parent.parent / "images"
        places = [images / name, images]
    return next((place for place in places if place.is_dir()), places[0])
