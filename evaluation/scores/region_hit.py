"""Whether the places that the model looked at show the evidence.

All boxes are XYXY in pixels of one image, the original one. Where the model cropped several times,
each measure is that of its best crop: pieces of the evidence in two crops are not added up, since
neither shows it whole.
"""

from __future__ import annotations

from collections.abc import Sequence

from vpt.boxes import Box, contains, coverage, iou
from vpt.errors import RegionError

ROUNDING_PX = 1.0
"""How far evidence may stick out: a crop is cut at whole pixels, annotations are not."""


def is_shown(crops: Sequence[Box], evidence: Box) -> bool:
    """Whether some crop holds the evidence wholly, give or take `ROUNDING_PX` on each side.

    Args:
        crops: what was cropped; none if the model did not look again.
        evidence: the annotated box.

    Raises:
        RegionError: if the evidence has no area.
    """
    x0, y0, x1, y1 = _checked(evidence)
    return any(
        contains(
            (
                crop[0] - ROUNDING_PX,
                crop[1] - ROUNDING_PX,
                crop[2] + ROUNDING_PX,
                crop[3] + ROUNDING_PX,
            ),
            (x0, y0, x1, y1),
        )
        for crop in crops
    )


def share_shown(crops: Sequence[Box], evidence: Box) -> float:
    """Share of the evidence's area inside the best crop, in [0, 1]; 0 without crops.

    Raises:
        RegionError: if the evidence has no area.
    """
    box = _checked(evidence)
    return max((coverage(crop, box) for crop in crops), default=0.0)


def best_iou(crops: Sequence[Box], evidence: Box) -> float:
    """Intersection over union of the best crop with the evidence, in [0, 1]; 0 without crops.

    It is low for a generous crop, even if all the evidence is shown.

    Raises:
        RegionError: if the evidence has no area.
    """
    box = _checked(evidence)
    return max((iou(crop, box) for crop in crops), default=0.0)


def _checked(evidence: Box) -> Box:
    x0, y0, x1, y1 = evidence
    if not (x0 < x1 and y0 < y1):
        raise RegionError(f"expected an evidence box XYXY with an area, got {evidence}")
    return evidence
