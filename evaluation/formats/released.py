"""VPT's released rows: a conversation in which regions and re-encodings are called for.

A row is a list of turns (user ``"<image> question [invitation]"``, assistant call, user
``"<image>"``, assistant answer) with the paths of its images. A path that ends in
``.png_x0,y0,x1,y1`` means that box of the image; that is understood here and not carried on.

Layout and wording: https://github.com/yu-rp/VisualPerceptionToken, `evaluation/evaluation.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from vpt.boxes import PixelBox
from vpt.data.findings import Finding
from vpt.data.row_files import read_entries
from vpt.data.row_view import Turn, view_row
from vpt.errors import DataError
from vpt.evaluation.formats.image_roots import ImageRoots
from vpt.evaluation.formats.rows import as_text, read_rows
from vpt.evaluation.samples import BadRow, ImageRef, Sample
from vpt.protocol.rows import KINDS, split_crop_suffix
from vpt.protocol.tokens import INVITE_REENCODE, INVITE_REGION, RELEASED_GRID_SIZE

_INVITATION = re.compile(
    r"\s*(?:"
    + "|".join(re.escape(w.rstrip(".")) for w in (INVITE_REGION, INVITE_REENCODE))
    + r")\.?"
)
_BEFORE_ANSWER = "Now answer the question.\n"  # some answers begin so; the released scoring cuts it


def read(file: Path, images: ImageRoots) -> Iterator[Sample | BadRow]:
    """Read released rows.

    A sample's ``box`` is that of the crop: the region named, one cell wider on each side. Its
    ``facts`` are

    - ``asked``: the first turn as it stands in the row,
    - ``calls``: branches called for, in order,
    - ``region``: the :class:`vpt.boxes.GridBox` first named, or ``None``,
    - ``system``: the system message, if there is one,
    - ``problem``: what of the calls makes no sense, if anything. Released GQA rows, for example,
      name ``<|x_8|>``, which no 8x8 grid has.

    Args:
        file: a JSON list, or JSON lines.
        images: where they are; relative paths are in the folder of the file.

    Raises:
        DataError: if the file cannot be read.
    """
    find = partial(images.find, folder=file.parent)
    return read_rows(read_entries(file), lambda row, name: _read_row(row, name, find))


def _read_row(row: Mapping[str, Any], name: str, find: Callable[[str], str]) -> Sample:
    view = view_row(row, RELEASED_GRID_SIZE)
    if isinstance(view, Finding):
        raise DataError(view.detail)
    first, *later = view.turns
    _check_turns(first, later)
    paths = view.images["image"]
    num_shown = first.asked.count(KINDS["image"].placeholder)
    if not 0 < num_shown <= len(paths):
        raise DataError(f"its first turn shows {num_shown} images, the row has {len(paths)}")
    box, problem = _evidence(paths[0], paths[num_shown:])
    problems = [m.reason for turn in view.turns for m in turn.parsed.malformed]
    problems += [problem] if problem else []
    calls = [call for turn in view.turns for call in turn.calls]
    regions = [call.region for call in calls if call.region is not None]
    return Sample(
        id=name,
        images=tuple(_image(path, find) for path in paths[:num_shown]),
        question=_question(first.asked),
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


def _check_turns(first: Turn, later: Sequence[Turn]) -> None:
    """Refuse what is no single question with an answer at its end."""
    placeholders = [kind.placeholder for kind in KINDS.values()]
    for turn in later:
        if not any(placeholder in turn.asked for placeholder in placeholders):
            raise DataError(
                f"messages[{turn.number}] asks again; expected one question, and behind each call "
                "the image that it brings"
            )
    last = later[-1] if later else first
    if last.calls or last.parsed.malformed:
        raise DataError(f"it ends with a call, messages[{last.number + 1}]; expected an answer")


def _question(asked: str) -> str:
    """The question alone: without placeholders, and without the words that invite a call."""
    for kind in KINDS.values():
        asked = asked.replace(kind.placeholder, "")
    return as_text(_INVITATION.sub("", asked), "question")


def _image(path: str, find: Callable[[str], str]) -> ImageRef:
    plain, crop = split_crop_suffix(path)
    source = find(plain)
    return ImageRef(source, source if crop is None else f"{source} {list(crop)}", crop)


def _evidence(first: str, later: Sequence[str]) -> tuple[PixelBox | None, str]:
    """Box of the first crop, in pixels of the first image, and what is wrong with it."""
    plain, outer = split_crop_suffix(first)
    source, box = split_crop_suffix(later[0]) if later else ("", None)
    if box is None or source != plain:
        return None, ""
    left, top = outer[:2] if outer else (0, 0)
    x0, y0, x1, y1 = box
    if x0 >= x1 or y0 >= y1:
        return None, f"crop {x0},{y0},{x1},{y1} is empty; expected x0 < x1 and y0 < y1"
    return (x0 - left, y0 - top, x1 - left, y1 - top), ""
