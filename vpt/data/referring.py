"""Phrases and their boxes: annotations for ``vpt data build`` from RefCOCO's and LVIS's files."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vpt.boxes import whole_px
from vpt.data.coco import AnnotatedObject, CocoFile, Picture, corners, is_sound, read_coco
from vpt.data.rows import parse_json, read_text
from vpt.errors import DataError
from vpt.protocol.calls import format_found


def find_coco(file: Path) -> dict[str, Any] | None:
    """The JSON object of a file in COCO's format, else ``None``; `DataError` if it is unread."""
    text = read_text(file)
    if not text.lstrip().startswith("{"):
        return None
    try:
        content: dict[str, Any] = parse_json(text)
    except (ValueError, RecursionError):  # JSON lines, or damaged: whoever reads them reports it
        return None
    return content if "annotations" in content else None


def read_phrases(
    file: Path, content: dict[str, Any] | None = None
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Read phrases that mean one object, as the entries that ``vpt data build`` takes.

    A phrase is each sentence of ``refs`` (RefCOCO), the ``caption`` of a picture with one object
    (RefCOCO in MDETR's form), or else a category that has one object in a picture (LVIS, COCO).
    The question is where it is; the answer is its box, as a detector's result is written.

    Args:
        content: of the file, if it was parsed already.

    Returns:
        Entries, and the number of phrases left out, by reason.

    Raises:
        DataError: if the file cannot be read, or has another format.
    """
    coco, left_out = read_coco(file, content), Counter[str]()
    pictures = {picture.id: picture for picture in coco.images}
    entries = []
    for phrase, thing, problem in _phrases(coco):
        picture = pictures[thing.image_id]
        size_wh = picture.width, picture.height
        if not problem and not is_sound(thing.bbox, size_wh):
            problem = "a box that is empty, not four numbers, or outside of the picture"
        if problem:
            left_out[problem] += 1
        else:
            entries.append(_entry(phrase, thing, picture))
    return entries, left_out


def _phrases(content: CocoFile) -> Iterator[tuple[str, AnnotatedObject, str]]:
    """Each phrase, its object, and why it cannot be used, if so."""
    if content.refs:
        things = {thing.id: thing for thing in content.annotations}
        for ref in content.refs:
            if ref.ann_id not in things:
                raise DataError(f"refs name annotation {ref.ann_id}, which is none")
            for sentence in ref.sentences:
                yield sentence.sent, things[ref.ann_id], ""
        return
    found: defaultdict[int, list[AnnotatedObject]] = defaultdict(list)
    for thing in content.annotations:
        found[thing.image_id].append(thing)
    for picture in content.images:
        things_here = found[picture.id]
        if picture.caption is not None:
            for thing in things_here[:1]:
                several = "a caption of several objects" if len(things_here) > 1 else ""
                yield picture.caption, thing, several
            continue
        numbers = Counter(content.names[thing.category_id] for thing in things_here)
        for thing in things_here:
            name = content.names[thing.category_id]
            problem = ""
            if numbers[name] > 1 or thing.iscrowd:
                problem = "a category with several objects in the picture"
            elif thing.category_id in (picture.not_exhaustive_category_ids or ()):
                problem = "annotation that is not exhaustive"
            yield f"the {name}", thing, problem


def _entry(phrase: str, thing: AnnotatedObject, picture: Picture) -> dict[str, Any]:
    box, size_wh = corners(thing.bbox), (picture.width, picture.height)
    phrase = " ".join(phrase.split())
    return {
        "image": picture.path,
        "question": f"Where is {phrase}?",
        "answer": format_found([whole_px(box, size_wh)], size_wh),
        "box": list(box),
        "phrase": phrase,
    }
