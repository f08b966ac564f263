"""Checks of calls against the images that answer them: is there one, and is it the right one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vpt.boxes import GridBox, PixelBox, compose, crop_box_px
from vpt.data.findings import Finding
from vpt.data.image_sizes import Images
from vpt.data.row_view import RowView
from vpt.data.turn_checks import KnownTokens, has_sound_calls
from vpt.protocol.rows import KINDS, split_crop_suffix

_CROP = "crop"


def check_calls(view: RowView, known: KnownTokens) -> Iterator[Finding]:
    """Find calls that no image answers, and images that answer no call.

    Not found are re-encoded images in the first turn, for alignment data is made so, and plain
    images in later turns. Answers with malformed calls are passed over: what they call for is
    not known.
    """
    for number, turn in enumerate(view.turns):
        if not has_sound_calls(turn, known):
            continue
        where = f"messages[{turn.number + 1}]"
        for branch, kind in KINDS.items():
            called = _CROP if branch == "image" else branch
            num_calls = sum(call.branch == called for call in turn.calls)
            num_shown, num_brought = _images_behind(view, number, branch)
            said = f"{where} calls for {num_calls} {kind.placeholder}, the turn behind it has "
            if num_shown < num_calls:
                yield Finding("call-without-image", f"{said}{num_shown}")
            elif num_brought > num_calls:
                crops = " that are crops" if branch == "image" else ""
                yield Finding("image-without-call", f"{said}{num_brought}{crops}")


def check_crops(
    view: RowView, known: KnownTokens, images: Images, grid_size: int
) -> Iterator[Finding]:
    """Find crops that are not those the runtime cuts for the regions named.

    Args:
        view: of the row.
        known: control tokens.
        images: what is known of files. Where a size is not known, nothing is found.
        grid_size: cells per side of the region grid.
    """
    by_turn = view.images_by_turn("image")
    if by_turn is None:
        return
    for number, turn in enumerate(view.turns[:-1]):
        regions = [call.region for call in turn.calls if call.region is not None]
        crops = by_turn[number + 1]
        if len(regions) != len(crops) or not has_sound_calls(turn, known):
            continue
        before = [path for paths in by_turn[: number + 1] for path in paths]
        for region, crop in zip(regions, crops, strict=True):
            if detail := _crop_problem(region, crop, before, images, grid_size):
                yield Finding("crop-mismatch", f"messages[{turn.number + 1}]: {detail}")


def _images_behind(view: RowView, number: int, branch: str) -> tuple[int, int]:
    """Images of a kind in the turn behind, and how many of them only a call can have brought."""
    if number + 1 == len(view.turns):
        return 0, 0
    num_shown = view.turns[number + 1].asked.count(KINDS[branch].placeholder)
    if branch != "image":
        return num_shown, num_shown
    by_turn = view.images_by_turn(branch)
    shown = [] if by_turn is None else by_turn[number + 1]
    return num_shown, sum(split_crop_suffix(path)[1] is not None for path in shown)


def _crop_problem(
    region: GridBox, crop: str, before: Sequence[str], images: Images, grid_size: int
) -> str:
    """What is wrong with the crop that answers a region; empty if nothing is, or none can tell."""
    plain, box = split_crop_suffix(crop)
    sources = [outer for path, outer in map(split_crop_suffix, before) if path == plain]
    if not sources:  # a file of its own may have been cut beforehand
        return "" if box is None else f"{crop} is cut out of an image that was not shown before"
    facts = images.get(plain)
    if facts is None or facts.size_wh is None:
        return ""
    whole: PixelBox = (0, 0, *facts.size_wh)
    right = [_cut(region, outer or whole, grid_size) for outer in sources]
    if (box or whole) in right:
        return ""
    expected = " or ".join(",".join(map(str, one)) for one in dict.fromkeys(right))
    width, height = facts.size_wh
    return f"the region is {expected} of {width}x{height} px, the image is {crop}"


def _cut(region: GridBox, outer: PixelBox, grid_size: int) -> PixelBox:
    """Box of a region of a piece of an image, in pixels of the image."""
    size_wh = outer[2] - outer[0], outer[3] - outer[1]
    return compose(outer, crop_box_px(region, size_wh, grid_size=grid_size))
