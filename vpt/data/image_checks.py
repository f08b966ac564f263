"""Checks of the images of a row: columns, placeholders, files, and boxes cut out of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from vpt.boxes import contains
from vpt.data.findings import Finding
from vpt.data.image_sizes import Images
from vpt.data.row_view import RowView
from vpt.protocol.rows import KINDS, split_crop_suffix

_COLUMNS = frozenset(kind.column for kind in KINDS.values())
_OTHER_MEDIA = ("videos", "audios")


def check_columns(row: Mapping[str, Any]) -> Iterator[Finding]:
    """Find images in columns that are not read."""
    for column, value in row.items():
        is_media = column.endswith("images") or column in _OTHER_MEDIA
        if is_media and column not in _COLUMNS and value:
            yield Finding("unread-column", column)


def check_placeholders(view: RowView) -> Iterator[Finding]:
    """Find placeholders without images, images without placeholders, and any in an answer."""
    for branch, kind in KINDS.items():
        num_asked = sum(turn.asked.count(kind.placeholder) for turn in view.turns)
        if num_asked != (num_images := len(view.images[branch])):
            detail = f"{num_asked} {kind.placeholder} in the text, {num_images} in {kind.column}"
            yield Finding("placeholder-count", detail)
        for turn in view.turns:
            if kind.placeholder in turn.answered:
                detail = f"messages[{turn.number + 1}] is an answer, but holds {kind.placeholder}"
                yield Finding("placeholder-count", detail)


def check_files(paths: Iterable[str], images: Images) -> Iterator[Finding]:
    """Find images that are missing or damaged.

    Args:
        paths: of a row, with their crop suffixes.
        images: what is known of files; those of which nothing is known pass.
    """
    for path in dict.fromkeys(split_crop_suffix(path)[0] for path in paths):
        facts = images.get(path)
        if facts is not None and facts.size_wh is None:
            kind = "missing-image" if facts.is_missing else "unreadable-image"
            yield Finding(kind, facts.problem)


def check_boxes(paths: Iterable[str], images: Images) -> Iterator[Finding]:
    """Find crop suffixes that name nothing, or what lies outside of the image.

    Args:
        paths: of a row, with their crop suffixes.
        images: what is known of files; boxes of others are only checked for being empty.
    """
    for path in dict.fromkeys(paths):
        plain, box = split_crop_suffix(path)
        if box is None:
            continue
        facts = images.get(plain)
        if box[0] >= box[2] or box[1] >= box[3]:
            yield Finding("crop-outside", f"{path} is empty; expected x0 < x1 and y0 < y1")
        elif facts and facts.size_wh and not contains((0, 0, *facts.size_wh), box):
            width, height = facts.size_wh
            yield Finding("crop-outside", f"{path} reaches out of {width}x{height} px")
