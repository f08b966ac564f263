"""Files of published benchmarks: VPT's released rows, Aurora's questions, V*Bench.

**Released rows** are lists of turns (user ``"<image> question [invitation]"``, assistant call, user
``"<image>"``, assistant answer) with the paths of their images. A path that ends in
``.png_x0,y0,x1,y1`` denotes that box of the image. Source:
https://github.com/yu-rp/VisualPerceptionToken, `evaluation/evaluation.py`.

**Aurora** has questions in one file of JSON lines, answers in another, images in a folder::

    DIR/questions.jsonl  DIR/answers.jsonl  DIR/images/0.png
    DIR/questions/NAME_questions.jsonl  DIR/answers/NAME_answers.jsonl  DIR/images/NAME/0.png

The second is that of HardBLINK in https://github.com/mahtabbigverdi/Aurora-perception,
`Data/evals/hardblink`, where NAME has no underscores in the folder of images, and the questions may
be ``NAME_questions_long.jsonl``.

**V*Bench** (https://huggingface.co/datasets/craigwu/vstar_bench) is ``test_questions.jsonl`` with
``text`` (question, options ``(A) ...``, instruction), ``image``, ``label``, ``category`` and
``question_id``; beside ``sa_1.jpg`` is ``sa_1.json``: ``target_object`` and ``bbox`` (XYWH), see
https://github.com/penghao-wu/vstar.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from vpt.boxes import Box, PixelBox
from vpt.data.checks import Finding, RowTurn, view_row
from vpt.data.rows import read_entries
from vpt.errors import DataError
from vpt.evaluation.formats.rows import (
    as_text,
    box_around,
    cells_of,
    name_of,
    offer,
    read_box,
    read_rows,
    split_options,
    text_of,
)
from vpt.evaluation.samples import BadRow, ImageRef, ImageRoots, Sample
from vpt.protocol.rows import KINDS, split_crop_suffix
from vpt.protocol.tokens import INVITE_REENCODE, INVITE_REGION, RELEASED_GRID_SIZE

_INVITATIONS = "|".join(re.escape(w.rstrip(".")) for w in (INVITE_REGION, INVITE_REENCODE))
_INVITATION = re.compile(rf"\s*(?:{_INVITATIONS})\.?")
_BEFORE_ANSWER = "Now answer the question.\n"  # some answers begin so; the released scoring cuts it


def read_released(file: Path, images: ImageRoots) -> Iterator[Sample | BadRow]:
    """Read released rows.

    A sample's ``box`` is that of the crop: the region named, one cell wider on each side. Its
    ``facts`` are

    - ``asked``: the first turn, unchanged,
    - ``calls``: branches called for, in order,
    - ``region``: the :class:`vpt.boxes.GridBox` first named, or ``None``,
    - ``system``: the system message, if there is one,
    - ``problem``: errors in the calls, if any. Released GQA rows, for example, name ``<|x_8|>``,
      which no 8x8 grid has.
    """
    find = partial(images.find, folder=file.parent)
    return read_rows(read_entries(file), lambda row, name: _released_sample(row, name, find))


def _released_sample(row: Mapping[str, Any], name: str, find: Callable[[str], str]) -> Sample:
    view = view_row(row, RELEASED_GRID_SIZE)
    if isinstance(view, Finding):
        raise DataError(view.detail)
    first, *later = view.turns
    _check_turns(first, later)
    paths = view.images["image"]
    num_shown = first.asked.count(KINDS["image"].placeholder)
    if not 0 < num_shown <= len(paths):
        raise DataError(f"its first turn shows {num_shown} images, the row has {len(paths)}")
    box, problem = _crop_box(paths[0], paths[num_shown:])
    problems = [m.reason for turn in view.turns for m in turn.parsed.malformed]
    problems += [problem] if problem else []
    calls = [call for turn in view.turns for call in turn.calls]
    regions = [call.region for call in calls if call.region is not None]
    return Sample(
        id=name,
        images=tuple(_released_image(path, find) for path in paths[:num_shown]),
        question=_released_question(first.asked),
        answers=(as_text(view.turns[-1].answered.removeprefix(_BEFORE_ANSWER), "answer"),),
        box=box,
        facts={
            "asked": first.asked,
            "calls": tuple(call.branch for call in calls),
            "region": regions[0] if regions else None,
            **({"system": view.system} if view.system else {}),
            **({"problem": "; ".join(problems)} if problems else {}),
        },
    )


def _check_turns(first: RowTurn, later: Sequence[RowTurn]) -> None:
    """Refuse rows other than a single question with an answer at its end."""
    placeholders = [kind.placeholder for kind in KINDS.values()]
    for turn in later:
        if not any(placeholder in turn.asked for placeholder in placeholders):
            raise DataError(
                f"messages[{turn.number}] asks again; expected one question, and after each call "
                "the image that it returns"
            )
    last = later[-1] if later else first
    if last.calls or last.parsed.malformed:
        raise DataError(f"it ends with a call, messages[{last.number + 1}]; expected an answer")


def _released_question(asked: str) -> str:
    """The question without placeholders and invitations to call."""
    for kind in KINDS.values():
        asked = asked.replace(kind.placeholder, "")
    return as_text(_INVITATION.sub("", asked), "question")


def _released_image(path: str, find: Callable[[str], str]) -> ImageRef:
    plain, crop = split_crop_suffix(path)
    source = find(plain)
    return ImageRef(source, source if crop is None else f"{source} {list(crop)}", crop)


def _crop_box(first: str, later: Sequence[str]) -> tuple[PixelBox | None, str]:
    """Box of the first crop, in pixels of the first image, and its problem if any."""
    plain, outer = split_crop_suffix(first)
    source, box = split_crop_suffix(later[0]) if later else ("", None)
    if box is None or source != plain:
        return None, ""
    left, top = outer[:2] if outer else (0, 0)
    x0, y0, x1, y1 = box
    if x0 >= x1 or y0 >= y1:
        return None, f"crop {x0},{y0},{x1},{y1} is empty; expected x0 < x1 and y0 < y1"
    return (x0 - left, y0 - top, x1 - left, y1 - top), ""


_LETTER = re.compile(r"\(([A-Z])\)")


def read_aurora(file: Path, images: ImageRoots) -> Iterator[Sample | BadRow]:
    """Read questions and their answers.

    Questions are ``{"question_id", "image", "text", "category"}``, answers ``{"question_id",
    "text"}``; of an answer ``"(A)"`` the letter is taken. The category becomes the group. An
    answer that no question asks for is a bad row at the end. A question may have ``points``, as
    :func:`vpt.evaluation.scores.regions.read_points` takes them, and ``content``, the text of its
    true depth map or boxes; both become facts.
    """
    answers = _read_answers(_answer_file(file))
    folder = _image_folder(file)
    asked: set[str] = set()

    def read_row(row: Mapping[str, Any], name: str) -> Sample:
        asked.add(name)
        path, question = images.find(text_of(row, "image"), folder), text_of(row, "text")
        if name not in answers:
            raise DataError(f"question {name} has no answer")
        if (num := len(answers[name])) > 1:
            found = ", ".join(answers[name])
            raise DataError(f"question {name} has {num} answers: {found}; keep one")
        return Sample(
            id=name,
            images=(ImageRef(path, path),),
            question=question,
            answers=tuple(answers[name]),
            group=name_of(row, "category"),
            facts={key: row[key] for key in ("points", "content") if row.get(key) is not None},
        )

    yield from read_rows(read_entries(file), read_row, lambda row: text_of(row, "question_id"))
    for name in answers:
        if name not in asked:
            yield BadRow(f"answer {name}", f"there is an answer, but no question {name}")


def _read_answers(file: Path) -> dict[str, dict[str, None]]:
    """Id of a question -> its distinct answers; raises ``DataError`` naming a bad row."""
    answers: dict[str, dict[str, None]] = {}
    for number, row in enumerate(read_entries(file)):
        try:
            cells = cells_of(row)
            answer = as_text(cells.get("text"), "text")
            found = _LETTER.fullmatch(answer)
            of_question = answers.setdefault(text_of(cells, "question_id"), {})
            of_question[found[1] if found else answer] = None
        except DataError as exc:
            raise DataError(f"{file}, row {number}: {exc}") from exc
    return answers


def _answer_file(file: Path) -> Path:
    """The file of answers to a file of questions."""
    if "questions" not in file.name:
        raise DataError(
            f"{file} does not tell where its answers are; expected a name such as "
            "questions.jsonl, beside answers.jsonl"
        )
    names = [file.name.replace("questions", "answers")]
    names += [name.replace("_long", "") for name in names if "_long" in name]
    in_folder = file.parent.name == "questions"
    folders = [file.parent, *([file.parent.parent / "answers"] if in_folder else [])]
    places = [folder / name for folder in folders for name in names]
    for place in places:
        if place.is_file():
            return place
    raise DataError(f"{file} has no answers; expected them in {' or '.join(map(str, places))}")


def _image_folder(file: Path) -> Path:
    """Folder of the images of a file of questions."""
    if file.parent.name != "questions":
        places = [file.parent / "images", file.parent]
    else:
        name = file.stem.replace("questions", "").replace("long", "").replace("_", "")
        images = file.parent.parent / "images"
        places = [images / name, images]
    return next((place for place in places if place.is_dir()), places[0])


def read_vstar(file: Path, images: ImageRoots) -> Iterator[Sample | BadRow]:
    """Read questions of V*Bench.

    The id is ``category/question_id``, because ids restart in each category. A sample's ``box`` is
    around all targets; its ``facts`` are ``asked``, the text of the file, and if the
    file beside the image is there ``targets``, ``boxes`` (XYXY), or ``problem`` if it is broken.
    """
    find = partial(images.find, folder=file.parent)
    return read_rows(
        read_entries(file), lambda row, name: _vstar_sample(row, name, find), _vstar_id
    )


def _vstar_id(row: Mapping[str, Any]) -> str:
    category, number = name_of(row, "category"), name_of(row, "question_id")
    return f"{category}/{number}" if category and number else number


def _vstar_sample(row: Mapping[str, Any], name: str, find: Callable[[str], str]) -> Sample:
    text = text_of(row, "text")
    question, choices = split_options(text)
    if not question or not choices:
        raise DataError("expected 'text' to be a question with options (A), (B), ... below it")
    path = find(text_of(row, "image"))
    box, facts = _targets(Path(path).with_suffix(".json"))
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


def _targets(file: Path) -> tuple[Box | None, dict[str, Any]]:
    """Boxes of the targets, from the file beside the image; nothing without that file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
        boxes = tuple(read_box(box, is_xywh=True) for box in content["bbox"])
        targets = tuple(content["target_object"])
        return box_around(boxes), {"targets": targets, "boxes": boxes}
    except FileNotFoundError:
        return None, {}
    except (OSError, ValueError, TypeError, KeyError) as exc:
        return None, {"problem": f"{file.name} does not say where to look: {exc}"}
